"""Transfers of rows: every type, uneven and empty, with gradients; no look at the data but for the counts."""

import pytest
import torch
import torch.distributed as dist
from fake_devices import HOST_READS, Recorder

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe.dispatch import plan_dispatch
from mhmoe_fairseq.moe.parallelism import plan_received
from mhmoe_fairseq.parallel import expert_parallelism, gather_rows

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# COUNTS[r][p]: rows from rank r to rank p
COUNTS = [[[2, 3], [1, 4]], [[0, 5], [0, 0]], [[0, 0], [3, 2]], [[0, 0], [0, 0]]]


def rows_of(rank, counts, dtype):
    return (torch.arange(sum(counts) * 3).view(-1, 3) + 100 * rank).to(dtype)


def transfers_on_rank():
    parallel, rank = expert_parallelism(2), dist.get_rank()
    results = []
    for dtype in DTYPES:
        for counts in COUNTS:
            rows = rows_of(rank, counts[rank], dtype).requires_grad_()
            # two experts on each rank, the second one without rows
            load = torch.tensor([[count, 0] for count in counts[rank]], dtype=torch.int32).flatten()
            sent, received, received_Pe = parallel.exchange_counts(load)
            arrived = parallel.transfer(rows, sent, received)
            returned = parallel.transfer(arrived * 2, received, sent)
            (returned * (rank + 1)).sum().backward()
            results.append((arrived.detach(), returned.detach(), rows.grad, received_Pe))
    return results


def test_rows_arrive_by_sender_and_come_back_in_place(workers2):
    by_rank = workers2.run(transfers_on_rank)
    cases = [(dtype, counts) for dtype in DTYPES for counts in COUNTS]
    for rank, results in enumerate(by_rank):
        for (dtype, counts), (arrived, returned, gradient, received) in zip(cases, results):
            sent = [rows_of(sender, counts[sender], dtype).split(counts[sender]) for sender in range(2)]
            assert torch.equal(arrived, torch.cat([pieces[rank] for pieces in sent])) and arrived.dtype == dtype
            assert torch.equal(returned, 2 * torch.cat(sent[rank]))
            assert torch.equal(gradient, torch.full_like(returned, 2 * (rank + 1)))
            assert received.tolist() == [[counts[sender][rank], 0] for sender in range(2)]


def second_derivatives_on_rank():
    """Of cubes behind each transfer, so that what comes back is 6 x and not a constant."""
    parallel, rank = expert_parallelism(2), dist.get_rank()
    x = rows_of(rank, COUNTS[0][rank], torch.float64).div(10).requires_grad_()
    load = torch.tensor([[count, 0] for count in COUNTS[0][rank]], dtype=torch.int32).flatten()
    sent, received, _ = parallel.exchange_counts(load)
    cubes = parallel.transfer(parallel.transfer(x, sent, received) ** 3, received, sent)
    found = []
    for transferred in (cubes, parallel.sum(x[:2]) ** 3, gather_rows(x)[0] ** 3):
        (first,) = torch.autograd.grad(transferred.sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.sum(), x)[0])
    return x.detach(), found


def test_transfers_have_second_derivatives(workers2):
    by_rank = workers2.run(second_derivatives_on_rank)
    total = sum(x[:2] for x, _ in by_rank)
    for x, (exchanged, summed, gathered) in by_rank:
        assert torch.allclose(exchanged, 6 * x)
        # Every rank's loss depends on every rank's rows, and so does every rank's gradient.
        assert torch.allclose(summed[:2], 2 * 2 * 6 * total) and not summed[2:].any()
        assert torch.allclose(gathered, 2 * 6 * x)


@pytest.mark.parametrize("seed", range(5))
def test_received_rows_are_planned_as_by_sorting(seed):
    generator = torch.Generator().manual_seed(seed)
    received = torch.randint(0, 4, (3, 5), generator=generator)
    experts = torch.repeat_interleave(torch.arange(5).repeat(3), received.flatten())
    plan, expected = plan_received(received, len(experts)), plan_dispatch(experts[:, None], 5, all_real=True)
    for name in ("order_R", "inverse_R", "offsets_E"):
        assert torch.equal(getattr(plan, name), getattr(expected, name)), name
    assert plan.offsets_E.dtype == torch.int32 and (plan.top_k, plan.all_real) == (1, True)


def operations_on_rank(flags):
    config = MHMoEConfig(embed_dim=32, num_heads=4, num_experts=4, expert_ffn_dim=16, **flags)
    layer = MHMoELayer(config, backend="blocked", parallel=expert_parallelism(2))
    x = torch.randn(2, 8, 32, requires_grad=True)
    mask = torch.arange(16).view(2, 8) > 11
    with Recorder() as recorder:
        output = layer(x, mask)
        (output.hidden.square().sum() + output.balance_loss).backward()
    return recorder.names


@pytest.mark.parametrize("flags", [{}, {"routing": "capacity", "balance_scope": "global"}])
def test_only_the_counts_are_read_on_the_host(workers2, flags):
    # ``tolist``, the one read of the counts, is none of the recorded operations.
    for names in workers2.run(operations_on_rank, flags):
        assert any("alltoall" in name for name in names)
        assert not names & HOST_READS


def operations_with_all_experts_here():
    counts = []
    for parallel in (None, expert_parallelism(1)):
        layer = MHMoELayer(MHMoEConfig(embed_dim=32, num_heads=4, num_experts=4, expert_ffn_dim=16), parallel=parallel)
        with Recorder() as recorder:
            output = layer(torch.randn(2, 8, 32))
            output.hidden.sum().backward()
        counts.append(recorder.names)
        assert output.traffic is None and all(not hasattr(p, "expert") for p in layer.parameters())
    return counts


def test_ranks_that_hold_all_experts_do_exactly_what_one_process_does(workers2):
    for alone, together in workers2.run(operations_with_all_experts_here):
        assert together == alone and not any("c10d" in name for name in together)


def sums_on_rank():
    parallel = expert_parallelism(1)
    values = torch.tensor([1.0, 10.0], dtype=torch.float64) * (dist.get_rank() + 1)
    values.requires_grad_()
    total = parallel.sum(values)
    (total * torch.tensor([1.0, 2.0]) * (dist.get_rank() + 1)).sum().backward()
    return total.detach(), values.detach(), values.grad


def test_the_gradient_of_a_sum_is_the_sum_of_the_ranks_gradients(workers2):
    for rank, (total, values, gradient) in enumerate(workers2.run(sums_on_rank)):
        assert total.tolist() == [3, 30] and values.tolist() == [rank + 1, 10 * (rank + 1)]
        assert gradient.tolist() == [3, 6]


def wrong_size_on_rank():
    with pytest.raises(ValueError, match=r"expert-parallel size \(3\) must divide the number of processes \(2\)"):
        expert_parallelism(3)
    with pytest.raises(ValueError, match=r"over 2 processes must divide num_experts \(5\)"):
        MHMoELayer(MHMoEConfig(embed_dim=8, num_experts=5, expert_ffn_dim=8), parallel=expert_parallelism(2))
    return True


def test_sizes_that_do_not_divide_are_refused(workers2):
    assert workers2.run(wrong_size_on_rank) == [True, True]
