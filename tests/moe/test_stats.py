"""Figures derived from the routing counts, on loads whose answers are known."""

import math

import pytest
import torch

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer, RoutingStats, stats


def test_shares_of_known_loads():
    uniform, single = torch.tensor([5.0, 5, 5, 5]), torch.tensor([20.0, 0, 0, 0])
    assert stats.active_share(uniform) == 1 and stats.active_share(single) == 0.25
    torch.testing.assert_close(stats.effective_share(uniform), torch.tensor(1.0))
    torch.testing.assert_close(stats.effective_share(single), torch.tensor(0.25))
    assert stats.load_max_over_mean(uniform) == 1 and stats.load_max_over_mean(single) == 4


def test_active_share_threshold_is_a_part_of_the_uniform_load():
    load = torch.tensor([[1000.0, 2, 998, 0], [500, 500, 500, 500]])  # uniform load 500; 1 % of it is 5
    assert stats.active_share(load).tolist() == [0.5, 1.0]
    assert stats.active_share(load, threshold=0.001).tolist() == [0.75, 1.0]


def test_an_expert_is_active_from_one_percent_of_the_uniform_load_on():
    load = torch.tensor([10_000.0, 10_000, 4.9, 5.0, 50])  # uniform load 4,012; 1 % of it is 40
    assert stats.active_share(load) == torch.tensor(3 / 5)
    assert stats.active_share(torch.tensor([99.0, 1, 0, 0])) == 0.5  # uniform load 25
    exactly = torch.tensor([101.0, 99, 199, 1])  # uniform load 100
    assert stats.active_share(exactly) == 1
    assert stats.active_share(torch.tensor([0.5, 1000, 1000])) == torch.tensor(2 / 3)


def test_overflow_is_the_share_of_dropped_assignments():
    counted = RoutingStats(torch.tensor([6.0, 2.0]), torch.tensor(2.0), torch.tensor(0.0), torch.tensor(4.0))
    assert stats.overflow(counted) == 0.25
    pools = RoutingStats(torch.tensor([[6.0, 2.0], [1.0, 1.0]]), torch.tensor([2.0, 1.0]), *counted[2:])
    assert stats.overflow(pools).tolist() == [0.25, 0.5]


def test_empty_load_is_harmless():
    zero = torch.zeros(3)
    assert stats.active_share(zero) == 0 and stats.load_max_over_mean(zero) == 0
    assert stats.overflow(RoutingStats(zero, torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.0))) == 0


def test_layer_counts_real_subtokens_and_entropy():
    layer = MHMoELayer(MHMoEConfig(embed_dim=8, num_heads=2, num_experts=4, expert_ffn_dim=4, router="linear"))
    torch.nn.init.zeros_(layer.router.weight)  # uniform router
    mask = torch.tensor([False, False, True])
    counted = layer(torch.randn(3, 8), mask).stats
    assert counted.num_subtokens == 4 and counted.expert_load.sum() == 8
    torch.testing.assert_close(counted.entropy / counted.num_subtokens, torch.tensor(math.log(4)))
    assert not any(value.requires_grad for value in counted)


@pytest.mark.parametrize("routing", ["dropless", "capacity"])
def test_head_loads_count_each_choice_of_each_head(routing):
    torch.manual_seed(0)
    config = MHMoEConfig(embed_dim=12, num_heads=3, num_experts=4, expert_ffn_dim=4, routing=routing)
    layer, seen = MHMoELayer(config), []
    layer.gate.register_forward_hook(lambda gate, args, assignment: seen.append(assignment))
    mask = torch.arange(20) % 5 == 0
    load = layer(torch.randn(20, 12), mask).stats.expert_load
    expected = torch.zeros(3, 4)
    for subtoken, experts in enumerate(seen[0].choices_NK.tolist()):
        for expert in experts if not mask[subtoken // 3] else ():
            expected[subtoken % 3, expert] += 1
    counted = stats.head_loads(seen[0], 3, 4)
    assert torch.equal(counted.float(), expected) and torch.equal(counted.sum(0).float(), load)
    assert (seen[0].dropped_NK is not None and seen[0].dropped_NK.any()) == (routing == "capacity")
