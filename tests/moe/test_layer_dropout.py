"""Every place of the layer that drops: the rate, the rescaling, one mask for forward and backward, none in evaluation.

What leaves a place is divided by what enters: the quotient is the mask, 0 or ``1 / (1 - rate)``. No two rows and no two
features of it may be alike, over experts, pieces of an expert and calls: a mask that is used twice shows there.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe.cpu import loop as _expert_loop
from mhmoe_fairseq.moe.dispatch import plan_dispatch
from mhmoe_fairseq.moe.experts import ExpertFFN

RATE, EXPERTS, WIDTH, ROWS = 0.3, 3, 64, 240
BACKENDS = ("loop", "grouped", "blocked")


def assert_drops(mask: Tensor, rate: float) -> None:
    """``mask`` ``(rows, features)`` is 0 or ``1 / (1 - rate)``, at that rate, and independent everywhere."""
    kept = mask > 0
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - rate)), rtol=1e-4, atol=0)
    assert abs(kept.double().mean() - (1 - rate)) < 5 * (rate * (1 - rate) / kept.numel()) ** 0.5
    centred = kept.double() - (1 - rate)
    for rows in (centred, centred.T):
        rows = rows / rows.norm(dim=1, keepdim=True)
        likeness = (rows @ rows.T).fill_diagonal_(0)
        worst = divmod(int(likeness.argmax()), len(rows))
        assert likeness.max() < 7 / rows.size(1) ** 0.5, worst


class Experts:
    """Experts whose second map is the identity, each with a row in turn; all inner activations are positive."""

    def __init__(self, backend: str, activation: str, layernorm: bool) -> None:
        torch.manual_seed(0)
        config = MHMoEConfig(
            embed_dim=WIDTH, num_experts=EXPERTS, expert_ffn_dim=WIDTH, top_k=1, activation=activation,
            expert_layernorm=layernorm, activation_dropout=RATE,
        )  # fmt: skip
        dtype = torch.float32 if backend == "grouped" else torch.float64  # grouped_mm has no float64 kernel
        self.module = ExpertFFN(config, backend=backend).to(dtype).train()
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.abs_()
            self.module.fc2_weight.copy_(torch.eye(WIDTH).expand(EXPERTS, -1, -1))
            self.module.fc2_bias.zero_()
        self.x = torch.rand(ROWS, WIDTH, dtype=dtype, requires_grad=True)
        self.experts = torch.arange(ROWS) % EXPERTS
        self.plan = plan_dispatch(self.experts[:, None], EXPERTS, all_real=True)

    def __call__(self) -> Tensor:
        return self.module(self.x, self.x.new_ones(ROWS, 1), self.plan)[0]

    def plain(self, mask: Tensor) -> Tensor:
        """The same by a formula, row by row, with ``mask`` on the inner activation."""
        weights = {name: parameter[self.experts] for name, parameter in self.module.named_parameters()}

        def linear(name: str, x: Tensor) -> Tensor:
            return torch.einsum("nfd,nd->nf", weights[f"{name}_weight"], x) + weights[f"{name}_bias"]

        inner = linear("fc1", self.x)
        activation = self.module.config.activation
        if activation == "swiglu":
            inner = inner * inner.sigmoid() * linear("gate", self.x)
        else:
            inner = inner.relu() if activation == "relu" else 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
        inner = inner * mask
        if self.module.config.expert_layernorm:
            inner = F.layer_norm(inner, (WIDTH,)) * weights["layernorm_weight"] + weights["layernorm_bias"]
        return linear("fc2", inner)

    def mask(self, out: Tensor) -> Tensor:
        """What the inner activation was multiplied by."""
        out = out.detach()
        if self.module.config.expert_layernorm:  # what was dropped is the smallest of its row
            return (out > out.amin(1, keepdim=True) + 1e-5).to(out.dtype) / (1 - RATE)
        return out / self.plain(torch.ones_like(out)).detach()


@pytest.fixture(autouse=True)
def several_pieces_of_each_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_expert_loop, "_PIECE_ROWS", 32)


@pytest.mark.parametrize("layernorm", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_dropout(backend: str, activation: str, layernorm: bool) -> None:
    experts = Experts(backend, activation, layernorm)
    outputs = [experts() for _ in range(2)]
    masks = [experts.mask(out) for out in outputs]
    assert_drops(torch.cat(masks), RATE)

    tolerance = {"rtol": 1e-3, "atol": 1e-3} if backend == "grouped" else {"rtol": 1e-8, "atol": 1e-8}
    inputs = [experts.x, *experts.module.parameters()]
    plain = experts.plain(masks[0])
    torch.testing.assert_close(outputs[0], plain, **tolerance)
    weights = torch.randn_like(plain)
    expected = torch.autograd.grad((plain * weights).sum(), inputs)
    for again in (True, False):  # also in a gradient that is to be differentiated again
        actual = torch.autograd.grad((outputs[0] * weights).sum(), inputs, create_graph=again, retain_graph=True)
        for got, want in zip(actual, expected):
            torch.testing.assert_close(got, want, **tolerance)

    experts.module.eval()
    torch.testing.assert_close(experts(), experts.plain(torch.ones_like(plain)), **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sub_tokens_experts_drop_independently(backend: str) -> None:
    experts = Experts(backend, "relu", False)
    rows = torch.arange(EXPERTS).expand(ROWS, EXPERTS)  # every sub-token to every expert
    plan, masks = plan_dispatch(rows, EXPERTS, all_real=True), []
    for expert in range(EXPERTS):
        torch.manual_seed(1)  # the same masks for each of the three views on them
        gates = F.one_hot(torch.tensor(expert), EXPERTS).to(experts.x.dtype).expand(ROWS, -1)
        experts.experts = rows[:, expert]
        masks.append(experts.mask(experts.module(experts.x, gates, plan)[0]))
    assert_drops(torch.cat(masks), RATE)


LAYERS = {
    "one head": {"num_heads": 1},
    "heads": {"num_heads": 4},
    "no merge projection": {"num_heads": 4, "merge_projection": False, "subtoken_residual": True},
    "shared expert": {"num_heads": 4, "shared_expert_dim": 8},
    "capacity": {"num_heads": 1, "routing": "capacity", "capacity_factor": 4.0, "eval_capacity_fraction": 0.0},
}


@pytest.mark.parametrize("kind", LAYERS)
def test_output_dropout(kind: str) -> None:
    torch.manual_seed(0)
    config = MHMoEConfig(embed_dim=WIDTH, num_experts=4, expert_ffn_dim=8, dropout=RATE, **LAYERS[kind])
    layer = MHMoELayer(config).double()
    x = torch.randn(2, ROWS // 2, WIDTH, dtype=torch.float64, requires_grad=True)
    before = layer.eval()(x).hidden
    assert torch.equal(before, layer(x).hidden)
    layer.train()
    outputs = [layer(x).hidden for _ in range(2)]
    masks = [(out / before).detach() for out in outputs]
    assert_drops(torch.cat(masks).flatten(0, 1), RATE)
    weights, inputs = torch.randn_like(before), [x, layer.experts.fc1_weight]
    expected = torch.autograd.grad((before * masks[0] * weights).sum(), inputs)
    for got, want in zip(torch.autograd.grad((outputs[0] * weights).sum(), inputs), expected):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_the_shared_expert_and_the_router_drop_nothing() -> None:
    torch.manual_seed(0)
    config = MHMoEConfig(embed_dim=WIDTH, num_experts=2, expert_ffn_dim=8, shared_expert_dim=8, activation_dropout=RATE)
    layer, x = MHMoELayer(config), torch.randn(5, WIDTH)
    assert torch.equal(layer.train().shared_expert(x), layer.eval().shared_expert(x))
    assert torch.equal(layer.train()(x).balance_loss, layer.eval()(x).balance_loss)
