"""The balanced router, for benchmarks: experts by turns, weights by the logits; no model takes it by its short name."""

import pytest
import torch
from language_models import small_model

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe.router import BalancedRouter

FIELDS = {"embed_dim": 12, "num_heads": 3, "num_experts": 4, "expert_ffn_dim": 8, "router": "balanced"}


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_experts_come_by_turns_and_weights_from_the_logits(top_k: int) -> None:
    torch.manual_seed(0)
    layer, seen = MHMoELayer(MHMoEConfig(**FIELDS, top_k=top_k, normalize_gates=True)).double(), []
    layer.gate.register_forward_hook(lambda gate, args, assignment: seen.append(assignment))
    layer.router.register_forward_hook(lambda router, args, logits: seen.append(args[0]))
    x = torch.randn(7, 12, dtype=torch.float64)
    output = layer(x)
    x_Nd, assignment = seen
    for n, (experts, weights) in enumerate(zip(assignment.experts_NK.tolist(), assignment.gates_NK)):
        assert set(experts) == {(n * top_k + turn) % 4 for turn in range(top_k)}
        expected = (layer.router.weight[experts] @ x_Nd[n]).softmax(0)
        torch.testing.assert_close(weights, expected)
    load = output.stats.expert_load
    assert load.max() - load.min() <= 1 and load.sum() == 21 * top_k
    assert output.z_loss < 10  # of the logits of experts whose turn it is
    gradient = torch.autograd.grad(output.hidden.sum(), layer.router.weight)[0]
    assert bool(gradient.abs().sum() > 0) == (top_k > 1)


def test_a_model_takes_it_by_its_long_name_only() -> None:
    with pytest.raises(UserError, match=r"--mhmoe-router \(balanced\) .* give balanced-for-benchmarks"):
        small_model(mhmoe_router="balanced")
    model = small_model(mhmoe_router="balanced-for-benchmarks")
    assert any(isinstance(module, BalancedRouter) for module in model.modules())
