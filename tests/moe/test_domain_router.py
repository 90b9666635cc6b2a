"""An expert for each domain (DEMix): every token's expert is named, its weight is 1, others learn nothing of it."""

import copy

import pytest
import torch
import torch.nn.functional as F

from mhmoe_fairseq.moe import ConfigError, MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe.experts import BACKENDS
from mhmoe_fairseq.moe.layer import taken_for_padding

FIELDS = {"embed_dim": 16, "num_experts": 3, "expert_ffn_dim": 24, "router": "domain", "top_k": 1}


def layer_and_input(backend: str = "auto", dtype: torch.dtype = torch.float64, **fields):
    torch.manual_seed(0)
    layer = MHMoELayer(MHMoEConfig(**{**FIELDS, **fields}), backend=backend).to(dtype)
    return layer, torch.randn(2, 5, 16, dtype=dtype, requires_grad=True)


def by_hand(layer: MHMoELayer, x, domain, mask):
    """Token by token through its domain's expert; zero where padded."""
    bank = layer.experts
    rows = []
    for row, expert, padded in zip(x.reshape(-1, 16), domain.flatten().tolist(), mask.flatten().tolist()):
        inner = F.gelu(F.linear(row, bank.fc1_weight[expert], bank.fc1_bias[expert]))
        inner = F.layer_norm(inner, inner.shape) * bank.layernorm_weight[expert] + bank.layernorm_bias[expert]
        output = F.linear(inner, bank.fc2_weight[expert], bank.fc2_bias[expert])
        rows.append(output * 0 if padded else output)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients_are_those_of_each_tokens_own_expert(backend: str) -> None:
    dtype = torch.bfloat16 if backend == "grouped" else torch.float64
    layer, x = layer_and_input(backend, dtype, expert_layernorm=True)
    domain = torch.tensor([[0, 2, 2, 0, 1], [2, 2, 0, 0, 0]])
    mask = torch.tensor([[False] * 5, [False, False, False, True, True]])
    output = layer(x, mask, domain)
    other = copy.deepcopy(layer)
    y = x.detach().clone().requires_grad_()
    expected = by_hand(other, y, domain, mask)
    close = {"atol": 0.05, "rtol": 0.05} if dtype == torch.bfloat16 else {"atol": 1e-10, "rtol": 1e-10}
    torch.testing.assert_close(output.hidden, expected, **close)
    weights = torch.randn_like(expected)
    (output.hidden * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, **close)
    for (name, parameter), reference in zip(layer.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, msg=name, **close)
    assert output.stats.expert_load.tolist() == [3, 1, 4] and output.stats.num_subtokens == 8
    assert [float(output.balance_loss), float(output.z_loss), float(output.stats.entropy)] == [0, 0, 0]


def test_a_batch_of_one_domain_leaves_the_other_experts_without_gradient() -> None:
    layer, x = layer_and_input()
    output = layer(x, None, torch.full((2, 5), 1))
    (output.hidden.square().sum() + output.balance_loss + output.z_loss).backward()
    for name, parameter in layer.experts.named_parameters():
        assert parameter.grad[1].abs().sum() > 0, name
        assert not parameter.grad[[0, 2]].any(), name


def test_half_precision_keeps_the_weight_exactly_one() -> None:
    layer, x = layer_and_input(dtype=torch.float32)
    found = []
    layer.gate.register_forward_hook(lambda gate, args, result: found.append(result.gates_NK))
    with torch.autocast("cpu", torch.bfloat16):
        layer(x, None, torch.zeros(2, 5, dtype=torch.int64))
    layer.half()(x.half(), None, torch.ones(2, 5, dtype=torch.int64))
    assert all(torch.equal(gates, torch.ones_like(gates)) for gates in found) and len(found) == 2


def test_there_is_no_router_to_count_or_train() -> None:
    layer, _ = layer_and_input()
    config = layer.config
    assert not list(layer.router.parameters()) and config.num_router_params() == 0
    assert sum(parameter.numel() for parameter in layer.parameters()) == config.num_params()
    # What a dense network of the same width costs: every token uses one expert.
    assert config.flops_per_token() == 2 * 2 * 16 * 24 and config.num_active_params() == config.num_expert_params()


def test_a_filler_routes_nothing_although_it_names_domains() -> None:
    layer, x = layer_and_input()
    domain = torch.ones(2, 5, dtype=torch.int64)
    with taken_for_padding(layer):
        for output in (
            layer(x, None, domain),
            layer(x, None, domain=domain),
            layer(x, padding_mask=None, domain=domain),
        ):
            assert output.stats.num_subtokens == 0 and not output.stats.expert_load.any() and not output.hidden.any()


def test_domains_are_asked_for_where_they_are_needed_and_nowhere_else() -> None:
    layer, x = layer_and_input()
    with pytest.raises(ConfigError, match=r"domain \(None\) must be given"):
        layer(x)
    with pytest.raises(ValueError, match=r"domain has shape \(2,\); x has \(2, 5\)"):
        layer(x, None, torch.tensor([0, 1]))
    learnt, x = layer_and_input(router="linear")
    with pytest.raises(ConfigError, match="domain .* is given, but router is not 'domain'"):
        learnt(x, None, torch.zeros(2, 5, dtype=torch.int64))
    others = {"num_heads": 2, "top_k": 2, "routing": "capacity", "gate_score": "sigmoid", "gate_scale": 2.0}
    for field, value in others.items():
        with pytest.raises(ConfigError, match=rf"{field} \({value!r}\) must be .*: all of a token goes to its domain"):
            MHMoEConfig(**{**FIELDS, field: value})


def test_it_compiles_and_exports_with_domains_as_an_input() -> None:
    layer, x = layer_and_input(dtype=torch.float32)
    domain = torch.tensor([[0, 2, 2, 0, 1], [2, 2, 0, 0, 0]])
    expected = layer(x, None, domain).hidden
    program = torch.export.export(layer, (x, None, domain))
    torch.testing.assert_close(program.module()(x, None, domain).hidden, expected, atol=1e-6, rtol=1e-5)
    with torch.device("meta"):
        built = MHMoELayer(layer.config)
    built.to_empty(device="cpu").reset_parameters()
    assert all(parameter.isfinite().all() for parameter in built.parameters())
