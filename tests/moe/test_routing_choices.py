"""Choices, gate weights and slots on cases with answers known by hand, and the random ones by their frequencies."""

import math

import pytest
import torch
from torch import Tensor

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe.gate import GATES, CapacityGate, Gate, expert_capacity, gumbel_noise, top_k_experts
from mhmoe_fairseq.moe.router import XMoERouter
from mhmoe_fairseq.moe.scores import SCORES

ROWS = 20_000


def config(**changes: object) -> MHMoEConfig:
    return MHMoEConfig(**{"embed_dim": 8, "num_experts": 4, "expert_ffn_dim": 8, "router": "linear", **changes})


def assert_frequencies(counts: Tensor, expected: Tensor) -> None:
    """Within five standard deviations."""
    frequencies = counts / counts.sum()
    assert ((frequencies - expected).abs() <= 5 * (expected * (1 - expected) / counts.sum()).sqrt()).all(), frequencies


def test_gumbel_noise_has_gumbels_moments() -> None:
    torch.manual_seed(0)
    noise = gumbel_noise(torch.empty(ROWS, dtype=torch.float64))
    assert abs(noise.mean() - 0.5772) < 5 * math.pi / math.sqrt(6 * ROWS)
    assert abs(noise.var() / (math.pi**2 / 6) - 1) < 0.1
    assert ((noise - noise.mean()) ** 3).mean() / noise.std() ** 3 > 0.8  # skewed to the right: 1.14


def test_the_second_expert_is_sampled_by_the_others_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([3.0, 0.0, 1.0, 2.0]).expand(ROWS, 4)
    drawn = Gate(config(second_expert_policy="sampling"))(logits)
    assert (drawn.experts_NK[:, 0] == 0).all()  # the first is no matter of chance
    assert_frequencies(torch.bincount(drawn.experts_NK[:, 1], minlength=4)[1:], logits[0, 1:].softmax(0))
    torch.testing.assert_close(drawn.gates_NK.sum(1), torch.ones(ROWS))


@pytest.mark.parametrize("routing", ["dropless", "capacity"])
def test_the_second_expert_is_used_with_twice_its_own_probability(routing: str) -> None:
    torch.manual_seed(0)
    probs = torch.tensor([0.4, 0.25, 0.2, 0.15]).expand(ROWS, 4)  # 0.25 / 0.65, renormalised, would give 0.77 for 0.5
    cfg = config(second_expert_policy="random", routing=routing, capacity_factor=10.0)
    gate = GATES[routing](cfg)
    drawn = gate(probs.log())
    used = drawn.experts_NK[:, 1] == 1
    assert_frequencies(torch.stack([used.sum(), (~used).sum()]), torch.tensor([0.5, 0.5]))
    assert (drawn.experts_NK[~used, 1] == 4).all()
    torch.testing.assert_close(drawn.gates_NK[used], torch.tensor([0.4, 0.25]).div(0.65).expand(int(used.sum()), 2))
    assert (drawn.gates_NK[~used] == torch.tensor([1.0, 0.0])).all()
    sure = gate(torch.tensor([0.5, 0.5, 0.0, 0.0]).log().expand(50, 4))
    assert (sure.experts_NK[:, 1] == 1).all()


def test_noise_moves_the_second_choice_only() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.8, 0.7]])
    noise = torch.tensor([[0.0, 0.0, 0.0, 5.0]])
    assert top_k_experts(logits, logits.softmax(1), 2, noise).tolist() == [[0, 3]]
    assert top_k_experts(logits, logits.softmax(1), 2).tolist() == [[0, 1]]


@pytest.mark.parametrize("score", SCORES)
def test_weights_of_nothing_are_zero(score: str) -> None:
    gates = SCORES[score].normalized(torch.tensor([[0.0, 0.0], [0.2, 0.6]]))
    torch.testing.assert_close(gates, torch.tensor([[0.0, 0.0], [0.25, 0.75]]))


def test_first_choices_have_their_slots_before_second_ones() -> None:
    cfg = config(num_experts=2, routing="capacity", capacity_factor=0.5)  # 4 rows: int(0.5 * 2 * 2) = 2 slots
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    drawn = CapacityGate(cfg)(logits)
    assert drawn.kept_NK.tolist() == [[True, False]] * 4
    assert drawn.dropped_NK.tolist() == [[False, True]] * 4
    assert drawn.choices_NK.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]


def test_padding_has_no_slots() -> None:
    cfg = config(num_experts=2, top_k=1, routing="capacity")  # 4 real rows: ceil(4 / 2) = 2 slots
    logits = torch.tensor([[1.0, 0.0]]).expand(12, 2)
    mask = torch.tensor([False, True, True] * 4)
    drawn = CapacityGate(cfg)(logits, mask)
    assert (~mask).sum() == 4 and drawn.kept_NK.flatten().nonzero().flatten().tolist() == [0, 3]
    assert drawn.dropped_NK.flatten().nonzero().flatten().tolist() == [6, 9]


@pytest.mark.parametrize("factor, top_k, tokens, slots", [
    (1.0, 2, 100, 26), (1.25, 2, 100, 32), (0.05, 1, 8, 1), (0.001, 2, 1000, 1), (1.0, 1, 1, 1), (0.6, 1, 12, 1),
])  # fmt: skip
def test_capacity_in_training_is_rounded_down_to_at_least_one(
    factor: float, top_k: int, tokens: int, slots: int
) -> None:
    cfg = config(num_experts=8, top_k=top_k, capacity_factor=factor, routing="capacity")
    assert int(expert_capacity(cfg, torch.tensor(tokens), training=True)) == slots
    by_training_rule = config(num_experts=8, top_k=top_k, capacity_factor=factor, eval_capacity_fraction=0.0)
    assert int(expert_capacity(by_training_rule, torch.tensor(tokens), training=False)) == slots


@pytest.mark.parametrize("tokens, slots", [(1, 1), (3, 1), (4, 1), (5, 2), (100, 25)])
def test_capacity_in_evaluation_is_rounded_up(tokens: int, slots: int) -> None:
    assert int(expert_capacity(config(), torch.tensor(tokens), training=False)) == slots


def test_a_capacity_far_below_one_still_takes_a_sub_token_of_each_expert() -> None:
    torch.manual_seed(0)
    layer = MHMoELayer(config(routing="capacity", capacity_factor=0.01))
    stats = layer(torch.randn(30, 8)).stats
    assert stats.dropped == 60 - int((stats.expert_load > 0).sum())


@pytest.mark.parametrize("value, divisor", [(0.3, 0.3), (0.02, 0.02), (0.01, 0.01), (0.001, 0.01), (-1.0, 0.01)])
@pytest.mark.parametrize("sides", ["expert", "both"])
def test_a_learnt_temperature_divides_the_logits_but_by_no_less_than_a_hundredth(
    sides: str, value: float, divisor: float
) -> None:
    torch.manual_seed(0)
    router = XMoERouter(config(router="xmoe", router_temperature=0.5, router_normalize=sides)).double()
    x = torch.randn(6, 8, dtype=torch.float64)
    reduced = x @ router.reduction.weight.T
    if sides == "both":
        reduced = reduced / reduced.norm(dim=1, keepdim=True)
    embedding = router.expert_embedding / router.expert_embedding.norm(dim=1, keepdim=True)
    with torch.no_grad():
        router.temperature.fill_(value)
    torch.testing.assert_close(router(x), reduced @ embedding.T / divisor, rtol=1e-6, atol=0)


def test_tiny_vectors_keep_finite_directions() -> None:
    """What is shorter than 1e-4 is divided by 1e-4, as in TorchScale."""
    router = XMoERouter(config(router="xmoe", router_normalize="both")).double()
    x = torch.full((1, 8), 1e-9, dtype=torch.float64)
    embedding = router.expert_embedding / router.expert_embedding.norm(dim=1, keepdim=True)
    torch.testing.assert_close(router(x), x @ router.reduction.weight.T / 1e-4 @ embedding.T, rtol=1e-6, atol=0)
