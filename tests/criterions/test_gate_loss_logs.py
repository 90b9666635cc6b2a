"""Logs of the auxiliary losses and of the exchange over several batches: sums, units, batches that lack a figure."""

from typing import Any

import pytest
import torch
from fairseq.logging import metrics

from mhmoe_fairseq.criterions.base import GateLossConfig, MoECriterion, log_layers
from mhmoe_fairseq.moe import MHMoEOutput, RoutingStats
from mhmoe_fairseq.moe.parallelism import Traffic


def extra_of(losses: list[tuple[float, float] | None], traffic: list[tuple[int, int]] = ()) -> dict[str, Any]:
    """What a model returns: a dense layer for each None, else an MoE layer with its balance and z-loss."""
    count = torch.tensor(4.0)
    stats = RoutingStats(torch.tensor([3.0, 1.0]), count * 0, count, count)
    sent = [Traffic(*rows_and_bytes) for rows_and_bytes in traffic] or [None] * len(losses)
    outputs = [
        None if pair is None else MHMoEOutput(torch.empty(0), *torch.tensor(pair), stats, rows)
        for pair, rows in zip(losses, sent, strict=True)
    ]
    return {"moe": outputs}


def losses(combine: str) -> MoECriterion:
    flags = {"moe_gate_loss_wt": 0.5, "moe_gate_loss_combine_method": combine, "mhmoe_z_loss_wt": 0.25}
    return MoECriterion(None, GateLossConfig(**flags))


def log_of(extra: dict[str, Any], sample_size: int) -> dict[str, Any]:
    return losses("average").add_gate_losses(torch.zeros(()), [extra], sample_size)[1]


def logged(*updates: list[dict[str, Any]]) -> dict[str, float]:
    """After the logs of all ranks, or batches, of each update."""
    with metrics.aggregate(new_root=True) as found:
        for logs in updates:
            log_layers(logs, sum(log["n"] for log in logs))
        return {name: float(value) for name, value in found.get_smoothed_values().items()}


@pytest.mark.parametrize("combine, balance, z", [("sum", 4.0, 10.0), ("average", 2.0, 5.0)])
def test_both_losses_are_combined_weighted_and_scaled_by_the_sample_size(combine, balance, z):
    extra = extra_of([None, (1.0, 2.0), None, (3.0, 8.0)])
    loss, log = losses(combine).add_gate_losses(torch.tensor(7.0), [extra], 6)
    assert float(loss) == pytest.approx(7 + 6 * (0.5 * balance + 0.25 * z))
    assert (float(log["gate_loss"]), float(log["z_loss"])) == (6 * balance, 6 * z)  # without the weights


def test_several_calls_weigh_alike_and_figures_are_of_those_that_count():
    extras = [extra_of([(1.0, 0.0)]), extra_of([(5.0, 2.0)])]
    loss, log = losses("average").add_gate_losses(torch.tensor(0.0), extras, 6, counted=[True, False])
    assert float(loss) == pytest.approx(6 * (0.5 * 3 + 0.25 * 1))
    assert (float(log["gate_loss"]), float(log["z_loss"])) == (6, 0)
    assert float(log["moe_load"].sum()) == 4


def test_means_are_over_targets_of_all_logs_whether_they_come_together_or_one_by_one():
    logs = [{**log_of(extra_of([(balance, 2 * balance)]), n), "n": n} for balance, n in ((1.0, 1), (2.0, 7))]
    for values in (logged(logs), logged(*([log] for log in logs))):
        assert values["gate_loss"] == pytest.approx(15 / 8, abs=1e-3)
        assert values["z_loss"] == pytest.approx(30 / 8, abs=1e-3)


def test_the_exchange_is_logged_for_an_average_layer_and_update_over_all_ranks():
    ranks = [log_of(extra_of([(1.0, 1.0)] * 2, traffic), 4) | {"n": 4} for traffic in (
        [(10, 4_000_000), (30, 8_000_000)],
        [(20, 2_000_000), (40, 2_000_000)],
    )]  # fmt: skip
    values = logged(ranks)
    assert (values["a2a_rows"], values["a2a_mb"]) == (50, 8.0)
    values = logged(ranks, ranks[:1])  # the second update on one rank
    assert (values["a2a_rows"], values["a2a_mb"]) == (35, 7.0)


def test_a_dense_batch_among_others_has_no_part_in_the_figures():
    dense = {"n": 4, **losses("sum").add_gate_losses(torch.tensor(3.0), [extra_of([None, None])], 4)[1]}
    assert dense == {"n": 4}
    sparse = {**log_of(extra_of([(1.0, 1.0)]), 4), "n": 4}
    values = logged([sparse, dense])
    assert values["moe_load_max"] == 1.5 and values["gate_loss"] == 0.5
    assert "gate_loss" not in logged([dense]) and "moe_load_max" not in logged([dense])
