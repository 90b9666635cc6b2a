"""What every field of the configuration changes, and that it changes nothing else.

Both layers of a comparison have equal values in all parameters of one name and one shape.
"""

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer

BASE = {"embed_dim": 24, "num_heads": 4, "num_experts": 6, "top_k": 2, "expert_ffn_dim": 16}
CAPACITY = {"routing": "capacity", "capacity_factor": 0.5, "eval_capacity_fraction": 0.1}
ROUTING = {"hidden", "balance", "z"}  # what follows from other logits


class Effect(NamedTuple):
    """A change and what is different with it.

    Attributes:
        change: of the fields.
        changes: of hidden, balance and z.
        fields: that both layers have besides.
        training: compare in training.
        dtype: of layers and input.
    """

    change: dict[str, Any]
    changes: set[str]
    fields: dict[str, Any] = {}
    training: bool = False
    dtype: torch.dtype = torch.float64


EFFECTS = {
    "num_heads": Effect({"num_heads": 2}, ROUTING),
    "latent_dim": Effect({"latent_dim": 16}, ROUTING),
    "expert_banks": Effect({"expert_banks": "per-head"}, ROUTING),
    "expert_banks of one head": Effect({"expert_banks": "per-head"}, set(), {"num_heads": 1}),
    "router_input": Effect({"router_input": "token"}, ROUTING, {"num_heads": 1, "latent_dim": 16}),
    "num_experts": Effect({"num_experts": 5}, ROUTING),
    "top_k": Effect({"top_k": 3}, {"hidden"}),
    "expert_ffn_dim": Effect({"expert_ffn_dim": 15}, {"hidden"}),
    "router": Effect({"router": "linear"}, ROUTING),
    "routing": Effect({"routing": "capacity"}, {"hidden"}),
    "activation gelu to relu": Effect({"activation": "relu"}, {"hidden"}),
    "activation gelu to swiglu": Effect({"activation": "swiglu"}, {"hidden"}),
    "activation swiglu to swiglu7": Effect({"activation": "swiglu7"}, {"hidden"}, {"activation": "swiglu"}),
    "activation of the shared expert": Effect({"activation": "relu"}, {"hidden"}, {"shared_expert_dim": 8}),
    "expert_bias": Effect({"expert_bias": False}, {"hidden"}),
    "expert_layernorm": Effect({"expert_layernorm": True}, {"hidden"}),
    "activation_dropout": Effect({"activation_dropout": 0.3}, {"hidden"}, training=True),
    "activation_dropout in evaluation": Effect({"activation_dropout": 0.3}, set()),
    "dropout": Effect({"dropout": 0.3}, {"hidden"}, training=True),
    "dropout in evaluation": Effect({"dropout": 0.3}, set()),
    "head_projection": Effect({"head_projection": False}, ROUTING),
    "head_projection of one head": Effect({"head_projection": True}, ROUTING, {"num_heads": 1}),
    "merge_projection": Effect({"merge_projection": False}, {"hidden"}),
    "merge_norm": Effect({"merge_norm": True}, {"hidden"}),
    "num_projection_layers": Effect({"num_projection_layers": 2}, ROUTING),
    "projection_gain with the same weights": Effect({"projection_gain": 2.0}, set()),
    "projection_bias": Effect({"projection_bias": False}, ROUTING),
    "split": Effect({"split": False}, ROUTING),
    "subtoken_residual": Effect({"subtoken_residual": True}, {"hidden"}),
    "shared_expert_dim": Effect({"shared_expert_dim": 8}, {"hidden"}),
    "quantize_experts": Effect({"quantize_experts": True}, {"hidden"}),
    "router_dim": Effect({"router_dim": 4}, ROUTING),
    "router_normalize": Effect({"router_normalize": "both"}, ROUTING),
    "router_temperature": Effect({"router_temperature": 0.5}, ROUTING),
    "gating_fp32": Effect({"gating_fp32": False}, ROUTING, {"num_projection_layers": 0}, dtype=torch.bfloat16),
    "gate_score": Effect({"gate_score": "sigmoid"}, {"hidden", "balance"}),
    "gate_scale": Effect({"gate_scale": 2.5}, {"hidden"}),
    "expert_groups": Effect({"expert_groups": 2}, {"hidden"}, {"num_experts": 6}),
    "kept_groups": Effect({"kept_groups": 2}, {"hidden"}, {"num_experts": 6, "expert_groups": 3}),
    "group_score": Effect({"group_score": "top2"}, {"hidden", "balance"}, {"num_experts": 8, "expert_groups": 4}),
    "normalize_gates": Effect({"normalize_gates": False}, {"hidden"}),
    "normalize_gates of one expert": Effect({"normalize_gates": False}, set(), {"top_k": 1}),
    "normalize_before_dropping": Effect({"normalize_before_dropping": True}, {"hidden"}, CAPACITY),
    "normalize_before_dropping without drops": Effect({"normalize_before_dropping": True}, set()),
    "balancing before it has moved": Effect({"balancing": "bias-sign"}, set()),
    "balancing_rate in one call": Effect({"balancing_rate": 0.5}, set(), {"balancing": "quantile"}, training=True),
    "balance_assignment": Effect({"balance_assignment": "topk"}, {"balance"}),
    "second_expert_policy sampling": Effect({"second_expert_policy": "sampling"}, {"hidden"}, training=True),
    "second_expert_policy random": Effect({"second_expert_policy": "random"}, {"hidden"}, training=True),
    "second_expert_policy in evaluation": Effect({"second_expert_policy": "sampling"}, set()),
    "capacity_factor": Effect({"capacity_factor": 1.5}, {"hidden"}, CAPACITY, training=True),
    "capacity_factor in evaluation": Effect({"capacity_factor": 1.5}, set(), CAPACITY),
    "capacity_factor without capacity": Effect({"capacity_factor": 0.1}, set(), training=True),
    "eval_capacity_fraction": Effect({"eval_capacity_fraction": 0.3}, {"hidden"}, CAPACITY),
    "eval_capacity_fraction in training": Effect({"eval_capacity_fraction": 0.3}, set(), CAPACITY, training=True),
}
NOT_HERE = {
    "embed_dim": "the width of the input: another one is refused",
    "balance_scope": "the same for one sequence in one process; see test_sequence_balance.py and tests/parallel",
}


def output(fields: dict[str, Any], effect: Effect) -> dict[str, Tensor]:
    layer = MHMoELayer(MHMoEConfig(**{**BASE, **effect.fields, **fields}))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.dim():  # a temperature keeps its value
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.size(-1) ** 0.5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 24, generator=generator).to(effect.dtype)
    torch.manual_seed(1)
    out = layer.to(effect.dtype).train(effect.training)(x)
    return {"hidden": out.hidden, "balance": out.balance_loss, "z": out.z_loss}


@pytest.mark.parametrize("name", EFFECTS)
def test_a_field_changes_what_it_says_and_nothing_else(name: str) -> None:
    effect = EFFECTS[name]
    before, after = output({}, effect), output(effect.change, effect)
    scale = {key: float(value.detach().abs().max()) for key, value in before.items()}
    changed = {key for key in before if float((before[key] - after[key]).detach().abs().max()) > 1e-6 * scale[key]}
    assert changed == effect.changes
    for key in set(before) - changed:
        torch.testing.assert_close(before[key], after[key], rtol=1e-9, atol=0)


def test_every_field_has_its_comparison_or_a_reason_for_none() -> None:
    fields = {field.name for field in dataclasses.fields(MHMoEConfig)}
    compared = {name.split()[0] for name in EFFECTS}
    assert compared | set(NOT_HERE) == fields and not compared & set(NOT_HERE)
    assert all(list(effect.change) == [name.split()[0]] for name, effect in EFFECTS.items())


@pytest.mark.parametrize("name", EFFECTS)
def test_a_comparison_begins_from_another_value(name: str) -> None:
    effect = EFFECTS[name]
    config = MHMoEConfig(**{**BASE, **effect.fields})
    assert all(getattr(config, field) != value for field, value in effect.change.items())
