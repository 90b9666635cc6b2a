"""A layer that is built without memory and gets its initial values afterwards."""

import pytest
import torch

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer

SIZES = {"embed_dim": 64, "num_heads": 2, "num_experts": 8, "top_k": 2, "expert_ffn_dim": 48, "shared_expert_dim": 16}
VARIANTS = [
    {"router": "linear"},
    {"router_temperature": 0.3, "router_normalize": "both", "expert_layernorm": True, "activation": "swiglu"},
    {"num_projection_layers": 2, "expert_bias": False, "projection_bias": False},
    {"quantize_experts": True},
]


def spread(parameter):
    """Mean and deviation, or the value of a single number."""
    return (parameter.item(), 0.0) if parameter.numel() == 1 else (parameter.mean().item(), parameter.std().item())


@pytest.mark.parametrize("everything_at_once", [True, False])
@pytest.mark.parametrize("changes", VARIANTS)
def test_reset_parameters_gives_a_materialised_layer_its_initial_values(changes, everything_at_once):
    config = MHMoEConfig(**{**SIZES, **changes})
    torch.manual_seed(0)
    built = MHMoELayer(config)
    with torch.device("meta"):
        layer = MHMoELayer(config)
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)  # what memory may hold
    torch.manual_seed(1)
    if everything_at_once:
        layer.reset_parameters()
    else:  # as sharding does it: parents before children
        for module in layer.modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.reset_parameters()
    for (name, ours), expected in zip(layer.named_parameters(), built.parameters()):
        (mean, deviation), (expected_mean, expected_deviation) = spread(ours), spread(expected)
        error = ours.numel() ** -0.5
        assert mean == pytest.approx(expected_mean, abs=6 * error * expected_deviation + 1e-6), name
        assert deviation == pytest.approx(expected_deviation, rel=4 * error), name
        assert ours.abs().max() <= expected.abs().max() * 1.3, name
