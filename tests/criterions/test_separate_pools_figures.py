"""Routing figures where images and text have a pool of experts each: every pool counts alike, however much it got."""

from typing import Any

import pytest
import torch
from beit3_models import IMAGE_POSITIONS, beit3_batch, small_beit3
from fairseq.logging import metrics

from mhmoe_fairseq.criterions.base import GateLossConfig, MoECriterion, log_layers
from mhmoe_fairseq.moe import MHMoEOutput, RoutingStats
from mhmoe_fairseq.moe.stats import active_share, load_max_over_mean


def model_of(**flags: Any) -> torch.nn.Module:
    flags = {"mhmoe_modality_experts": "separate", "moe_expert_count": 4, "encoder_layers": 4, **flags}
    return small_beit3(**flags).double().eval()


@torch.no_grad()
def outputs_of(model: torch.nn.Module, kind: str, lengths: list[int]) -> list[MHMoEOutput]:
    return [output for output in model(**beit3_batch(kind, lengths))[1]["moe"] if output is not None]


@torch.no_grad()
def log_of(model: torch.nn.Module, kind: str, lengths: list[int]) -> dict[str, Any]:
    extra = model(**beit3_batch(kind, lengths))[1]
    return MoECriterion(None, GateLossConfig()).add_gate_losses(torch.zeros(()), [extra], 1)[1]


def logged(*logs: dict[str, Any]) -> dict[str, float]:
    with metrics.aggregate(new_root=True) as found:
        for log in logs:
            log_layers([log], 1)
        return {key: float(value) for key, value in found.get_smoothed_values().items()}


def test_uniform_pools_are_balanced_whatever_their_shares() -> None:
    model = model_of(moe_top_k=4)  # every sub-token goes to all experts of its pool
    assert IMAGE_POSITIONS == 5
    few_words = logged(log_of(model, "pair", [1]))
    assert (few_words["moe_load_max"], few_words["moe_active"]) == (1, 1)
    few_patches = logged(log_of(model, "pair", [1]), log_of(model, "text", [12] * 100))
    assert (few_patches["moe_load_max"], few_patches["moe_active"]) == (1, 1)


def test_figures_are_means_over_the_pools_of_all_layers() -> None:
    model = model_of(moe_top_k=1, mhmoe_routing="capacity", moe_eval_capacity_token_fraction=0.05)
    values = logged(log_of(model, "pair", [9, 2, 1]))
    pools = [
        RoutingStats(*(count[pool] for count in layer.stats))
        for layer in outputs_of(model, "pair", [9, 2, 1])
        for pool in (0, 1)
    ]
    expected = {
        "moe_active": [active_share(pool.expert_load) for pool in pools],
        "moe_load_max": [load_max_over_mean(pool.expert_load) for pool in pools],
        "moe_overflow": [pool.dropped / pool.expert_load.sum() for pool in pools],
        "moe_entropy": [pool.entropy / pool.num_subtokens for pool in pools],
    }
    for name, figures in expected.items():
        assert values[name] == pytest.approx(float(sum(figures)) / 4, abs=1e-4), name
    assert values["moe_overflow"] > 0


def test_a_pool_without_positions_is_in_no_figure() -> None:
    model = model_of(moe_top_k=4)
    values = logged(log_of(model, "image", [1, 1]))
    assert (values["moe_load_max"], values["moe_active"]) == (1, 1)
    stats = [layer.stats for layer in outputs_of(model, "image", [1, 1])]
    entropy = [float(layer.entropy[0] / layer.num_subtokens[0]) for layer in stats]
    assert values["moe_entropy"] == pytest.approx(sum(entropy) / 2, abs=1e-4)
