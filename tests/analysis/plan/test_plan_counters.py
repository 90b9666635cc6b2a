"""The plan's all-to-all and memory against the counters of real models on 2 and 4 ranks."""

from typing import Any

import pytest
import torch
from language_models import small_dictionary
from plan_ranks import LENGTH, ROWS, measure, options_of

from mhmoe_fairseq.analysis.plan.activation_memory import ActivationMemory, shape_of
from mhmoe_fairseq.analysis.plan.ranks import Cluster, exchange
from mhmoe_fairseq.models.counts import build_on_meta

TOKENS = ROWS * LENGTH
CASES = [
    ("mhmoe_lm_tiny", {"mhmoe_budget": "none"}),
    ("mhmoe_lm_tiny", {"mhmoe_budget": "none", "moe_freq": 1, "checkpoint_activations": True}),
    ("mhmoe_lm_tiny", {"mhmoe_budget": "none", "mhmoe_precision": "bf16", "mhmoe_heads_number": 8}),
    ("xmoe_lm_tiny", {"moe_top_k": 1}),
    ("smoe_lm_tiny", {}),
]


@pytest.fixture
def workers(request: pytest.FixtureRequest, ranks: int):
    return request.getfixturevalue(f"workers{ranks}")


@pytest.mark.parametrize("ranks, size", [(2, 2), (4, 4), (4, 2)], ids=["EP2", "EP4", "EP2xDP2"])
@pytest.mark.parametrize("arch, flags", CASES, ids=str)
def test_rows_and_bytes_are_those_that_were_counted(
    workers: Any, ranks: int, size: int, arch: str, flags: dict[str, Any]
) -> None:
    shape = shape_of(build_on_meta(options_of(arch, flags), small_dictionary()))
    cluster = Cluster(ranks=ranks, ranks_per_node=ranks, tokens=TOKENS, link=1e9, network=1e9)
    plan = exchange(shape.moe, cluster, size, element=2 if shape.half else 4, recompute=shape.recompute)
    measured = workers.run(measure, arch, size, flags)
    for rank, one in enumerate(measured):
        # Per layer and direction, the rank's own rows included: exact whatever the router did.
        assert [rows for rows, _ in one.traffic] == [plan.rows] * shape.moe_layers
        assert one.counter.calls == plan.transfers * shape.moe_layers
        assert one.counter.count_bytes == plan.count_bytes * plan.count_transfers * shape.moe_layers
        # Off-rank bytes follow from the logged loads, exactly; the plan has their expectation.
        own = slice(rank % size * shape.moe.num_experts // size, (rank % size + 1) * shape.moe.num_experts // size)
        for (_, sent), load in zip(one.traffic, one.load):
            assert sent == int(load.sum() - load[own].sum()) * plan.row_bytes
    # What all ranks send is what all receive, so every direction moves as many rows.
    total_rows = sum(one.counter.rows for one in measured)
    assert total_rows == ranks * plan.rows * plan.transfers * shape.moe_layers
    counted = sum(sent for one in measured for _, sent in one.traffic)
    expected = ranks * shape.moe_layers * plan.off_rank
    print(f"{arch} {size} of {ranks} ranks: off-rank bytes {counted:,}, expected under uniform routing {expected:,.0f}")
    assert 0.5 * expected < counted < 1.5 * expected


@pytest.mark.parametrize("arch, flags", CASES[:1] + CASES[2:], ids=str)
def test_activation_memory_of_a_rank(workers2: Any, arch: str, flags: dict[str, Any]) -> None:
    shape = shape_of(build_on_meta(options_of(arch, flags), small_dictionary()))
    planned = ActivationMemory(shape, "loop", exchanged=True, cpu=True).kept()
    measured = sum(one.kept for one in workers2.run(measure, arch, 2, flags)) / 2 / TOKENS
    measured += shape.moe_layers * shape.moe.subtokens_per_token * shape.moe.top_k * 2 * 8  # the order of the rows
    assert planned == pytest.approx(measured, rel=0.05)


def test_the_workers_differ(workers2: Any) -> None:
    first, second = workers2.run(measure, "mhmoe_lm_tiny", 2, {"mhmoe_budget": "none"})
    assert not torch.equal(first.load[0], second.load[0])
