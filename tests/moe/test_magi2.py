"""MAGI-2's layer and the clamped SwiGLU against a reference of their own, written from the published formulas."""

import argparse
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.flags import moe_config
from mhmoe_fairseq.models.language_model import MHMoELanguageModel
from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe.heads import MergeNorm

DOCUMENT = Path(__file__).parents[2] / "docs" / "layer.md"
CONFIG = MHMoEConfig(
    embed_dim=24, num_heads=4, num_experts=5, top_k=3, expert_ffn_dim=16, expert_banks="per-head", router="linear",
    gate_score="sigmoid", gate_scale=4.9, balancing="bias-sign", activation="swiglu7", expert_bias=False,
    projection_bias=False, shared_expert_dim=20,
)  # fmt: skip


def swiglu7(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """``down[min(g, 7) * sigmoid(1.702 min(g, 7)) * (max(-7, min(u, 7)) + 1)]`` on one vector."""
    g, u = gate @ x, up @ x
    g = torch.where(g > 7, 7, g)
    u = torch.where(u > 7, 7, torch.where(u < -7, -7, u))
    return down @ (g / (1 + torch.exp(-1.702 * g)) * (u + 1))


def reference(layer: MHMoELayer, x_TD: Tensor) -> Tensor:
    """One token, one head and one expert at a time."""
    experts, shared, outputs = layer.experts, layer.shared_expert, []
    for token in x_TD:
        inner = layer.head_projection[0].weight @ token
        of_heads = []
        for head in range(4):
            z = inner[6 * head : 6 * head + 6]
            scores = torch.sigmoid(layer.router[head].weight @ z)
            biased = [float(score + bias) for score, bias in zip(scores, layer.gate.balancing.bias[head])]
            chosen = sorted(range(5), key=lambda expert: -biased[expert])[:3]
            total, output = sum(scores[expert] for expert in chosen), 0
            for expert in chosen:
                number = 5 * head + expert
                weights = experts.fc1_weight[number], experts.gate_weight[number], experts.fc2_weight[number]
                output = output + 4.9 * scores[expert] / total * swiglu7(z, *weights)
            of_heads.append(output)
        y = layer.merge_projection[0].weight @ torch.cat(of_heads)
        outputs.append(y + swiglu7(token, shared.fc1.weight, shared.gate.weight, shared.fc2.weight))
    return torch.stack(outputs)


@pytest.fixture(params=["loop", "blocked"])
def layer(request) -> MHMoELayer:
    """With weights so large that every clamp is reached, and a bias that decides."""
    torch.manual_seed(0)
    layer = MHMoELayer(CONFIG, backend=request.param).double()
    with torch.no_grad():
        for weight in (layer.experts.fc1_weight, layer.experts.gate_weight):
            weight.mul_(30)
        layer.shared_expert.fc1.weight.mul_(12)
        layer.shared_expert.gate.weight.mul_(12)
        layer.gate.balancing.bias.normal_(std=0.2)
    return layer


def test_output_and_gradients_of_the_whole_layer(layer: MHMoELayer) -> None:
    x = torch.randn(40, 24, dtype=torch.float64, requires_grad=True)
    named = {"x": x, **dict(layer.named_parameters())}
    weights = torch.randn(40, 24, dtype=torch.float64)
    got, want = layer(x).hidden, reference(layer, x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for name, *of in zip(named, *(torch.autograd.grad((y * weights).sum(), [*named.values()]) for y in (got, want))):
        torch.testing.assert_close(*of, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("hidden, gate, inner", [(20.0, -20.0, 7 * -6), (20, 20, 7 * 8), (-20, 3, 0), (7, 0, 7)])
def test_the_clamps_by_hand(hidden: float, gate: float, inner: float) -> None:
    config = MHMoEConfig(embed_dim=1, num_experts=1, top_k=1, expert_ffn_dim=1, activation="swiglu7", expert_bias=False)
    layer = MHMoELayer(config).double()
    with torch.no_grad():
        for weight, value in zip(layer.experts.parameters(), (hidden, gate, 1)):
            weight.fill_(value)
    assert layer(torch.ones(1, 1, dtype=torch.float64)).hidden.item() == pytest.approx(inner, abs=1e-3)


def test_the_merge_norm_is_computed_in_float32_whatever_its_input() -> None:
    """Rounded once, at the end: half a unit of the last place, and a little for float32's own rounding."""
    for dtype in (torch.bfloat16, torch.float16):
        for weights in (torch.float32, dtype):  # as under mixed precision, and all in half
            norm, x = MergeNorm(400).to(weights), (30 * torch.randn(20, 400)).to(dtype)
            with torch.no_grad():
                norm.weight.copy_(1 + torch.rand(400))
            got, exact = norm(x), x.double()
            want = norm.weight.double() * exact / (exact.square().mean(1, keepdim=True) + 1e-5).sqrt()
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), want, rtol=0.501 * torch.finfo(dtype).eps, atol=2**-25)


def test_the_documented_flags_are_the_released_layer() -> None:
    arch, words = re.search(r"`--arch (\S+) ([^`]+swiglu7[^`]+)`", DOCUMENT.read_text()).groups()
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    MHMoELanguageModel.add_args(parser)
    options = architecture_options(arch, **vars(parser.parse_args(words.split())))
    sizes = {"embed_dim": 3072, "num_heads": 12, "num_experts": 256, "top_k": 6, "expert_ffn_dim": 1280}
    regularised = {"dropout": 0.1}  # not said of MAGI-2
    assert moe_config(options) == dataclasses.replace(CONFIG, **sizes, shared_expert_dim=1280, **regularised)
