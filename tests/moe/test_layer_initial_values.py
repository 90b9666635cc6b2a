"""The initial values of every parameter of the layer, in every kind of configuration, against the rule that is stated.

A parameter that no rule names, or two, fails; so does a rule that no configuration has a parameter for.
"""

import math
import re
from collections.abc import Callable

import pytest
import torch
from drawn_values import ONES, ZEROS, Values, assert_follows, uniform, xavier

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer

D, F, SHARED, ROUTER = 96, 40, 56, 12
CONFIGS = {
    "plain": {},
    "one head": {"num_heads": 1},
    "one head projected": {"num_heads": 1, "head_projection": True, "merge_projection": True},
    "linear router": {"router": "linear"},
    "cosine router": {"router_normalize": "both", "router_temperature": 0.07},
    "no biases": {"expert_bias": False, "projection_bias": False, "shared_expert_dim": SHARED},
    "swiglu": {"activation": "swiglu", "shared_expert_dim": SHARED},
    "swiglu without biases": {"activation": "swiglu", "expert_bias": False},
    "stable latent": {"activation": "swiglu7", "merge_norm": True},
    "relu sub-LN": {"activation": "relu", "expert_layernorm": True},
    "deep projections": {"num_projection_layers": 3},
    "scaled projections": {"projection_gain": 1.5},
    "no projections": {"num_projection_layers": 0},
    "whole tokens": {"split": False, "head_projection": False},
    "shared expert": {"shared_expert_dim": SHARED, "routing": "capacity"},
    "quantized": {"quantize_experts": True, "shared_expert_dim": SHARED},
}
# d is the width of a sub-token.
RULES: dict[str, Callable[[int], Values]] = {
    r"experts\.(fc1|gate)_(weight|bias)": lambda d: uniform(d),
    r"experts\.fc2_(weight|bias)": lambda d: uniform(F),
    r"experts\.layernorm_weight": lambda d: ONES,
    r"experts\.layernorm_bias": lambda d: ZEROS,
    r"router\.(reduction\.)?weight": lambda d: uniform(d),
    r"router\.expert_embedding": lambda d: Values("orthogonal", 1.5),
    r"router\.temperature": lambda d: Values("constant", 0.07),
    r"head_projection\.\d\.weight": lambda d: xavier(D, 1 / math.sqrt(2)),
    r"head_projection\.\d\.bias": lambda d: uniform(D),
    r"merge_projection\.\d\.weight": lambda d: xavier(D, 1.0),
    r"merge_projection\.\d\.bias": lambda d: ZEROS,
    r"merge_norm\.weight": lambda d: ONES,
    r"shared_expert\.(fc1|gate)\.(weight|bias)": lambda d: uniform(D),
    r"shared_expert\.fc2\.(weight|bias)": lambda d: uniform(SHARED),
}


def build(kind: str) -> MHMoELayer:
    torch.manual_seed(0)
    fields = {"embed_dim": D, "num_heads": 4, "num_experts": 9, "expert_ffn_dim": F, "router_dim": ROUTER}
    return MHMoELayer(MHMoEConfig(**{**fields, **CONFIGS[kind]}))


def rules_for(name: str) -> list[str]:
    return [pattern for pattern in RULES if re.fullmatch(pattern, name)]


def expected_values(name: str, config: MHMoEConfig) -> Values:
    rule = RULES[rules_for(name)[0]](config.subtoken_dim)
    gain = config.projection_gain if re.search(r"projection\.\d\.weight", name) else 1
    return rule._replace(size=rule.size * gain)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_follows_its_rule(kind: str) -> None:
    layer = build(kind)
    for name, parameter in layer.named_parameters():
        assert len(rules_for(name)) == 1, f"{name}: rules {rules_for(name)}"
        assert_follows(name, parameter, expected_values(name, layer.config))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_expert_follows_the_rule_by_itself_with_values_of_its_own(kind: str) -> None:
    layer = build(kind)
    for name, parameter in layer.experts.named_parameters():
        rule = expected_values(f"experts.{name}", layer.config)
        for expert, values in enumerate(parameter):
            assert_follows(f"{name}[{expert}]", values, rule)
        if rule.kind != "constant":
            assert len(torch.unique(parameter.detach().flatten(1)[:, 0])) == layer.config.num_experts, name


def test_every_rule_has_a_parameter() -> None:
    names = [name for kind in CONFIGS for name, _ in build(kind).named_parameters()]
    assert [pattern for pattern in RULES if not any(pattern in rules_for(name) for name in names)] == []


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_layer_that_gets_its_memory_afterwards_follows_the_same_rules(kind: str, at_once: bool) -> None:
    """Reset as a whole, or module by module, parents before children, as sharding does it."""
    first = dict(build(kind).named_parameters())
    with torch.device("meta"):
        layer = build(kind)
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7.0)  # what memory may hold
    torch.manual_seed(1)
    for module in [layer] if at_once else layer.modules():
        if at_once or any(True for _ in module.parameters(recurse=False)):
            module.reset_parameters()
    for name, parameter in layer.named_parameters():
        rule = expected_values(name, layer.config)
        assert_follows(name, parameter, rule)
        assert torch.equal(parameter, first[name]) == (rule.kind == "constant"), name
