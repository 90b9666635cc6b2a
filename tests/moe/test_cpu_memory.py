"""The pool of large buffers: reused when free, never while a tensor lives on them, never hoarded."""

import os

import pytest
import torch

from mhmoe_fairseq.moe.cpu import memory as _cpu_memory

MILLION = (1024, 1024)


@pytest.fixture
def pool(monkeypatch):
    fresh = _cpu_memory._Pool()
    monkeypatch.setattr(_cpu_memory, "_pool", fresh)
    return fresh


def test_a_freed_buffer_is_used_again(pool):
    like = torch.empty(0)
    first = _cpu_memory.empty(MILLION, like)
    address = first.data_ptr()
    view = first[3:].t()
    del first
    assert not pool.returned  # a view keeps the memory
    assert _cpu_memory.empty(MILLION, like).data_ptr() != address
    del view
    assert any(_cpu_memory.empty(MILLION, like).data_ptr() == address for _ in range(2))


def test_parts_of_a_freed_buffer_are_used_and_join_again(pool):
    like = torch.empty(0)
    whole = _cpu_memory.empty((6, *MILLION), like)
    address = whole.data_ptr()
    del whole
    parts = [_cpu_memory.empty((2, *MILLION), like) for _ in range(3)]
    assert [part.data_ptr() - address for part in parts] == [0, 8 * 2**20, 16 * 2**20]
    assert not pool._free
    for order in ((1, 0, 2), (2, 0, 1)):
        for key in order:
            parts[key] = None
        assert _cpu_memory.empty((6, *MILLION), like).data_ptr() == address
        parts = [_cpu_memory.empty((2, *MILLION), like) for _ in range(3)]


def test_a_dropped_part_leaves_the_rest_as_it_is(pool):
    like = torch.empty(0)
    whole = _cpu_memory.empty((4, *MILLION), like)
    del whole
    kept = _cpu_memory.empty((3, *MILLION), like).fill_(1)
    larger = _cpu_memory.empty((2, *MILLION), like).fill_(2)  # for which the free part is too small, and given up
    assert not pool._free
    assert (kept == 1).all() and (larger == 2).all()


def test_live_tensors_never_share_memory(pool):
    torch.manual_seed(0)
    live = {}
    for step in range(200):
        if live and torch.rand(()) < 0.5:
            key = next(iter(live))
            tensor = live.pop(key)
            assert (tensor == key).all()
            del tensor
        live[step] = _cpu_memory.empty((600 * (1 + step % 4), 1024), torch.empty(0)).fill_(step)
    assert all((tensor == key).all() for key, tensor in live.items())


def test_free_buffers_and_those_in_use_hardly_exceed_the_peak(pool):
    like = torch.empty(0)
    torch.manual_seed(1)
    live, peak = [], 0
    for _ in range(200):
        if live and torch.rand(()) < 0.5:
            live.pop(int(torch.randint(len(live), ())))
        live.append(_cpu_memory.empty((1024 * int(torch.randint(1, 6, ())), 512), like))
        peak = max(peak, pool._in_use)
        assert pool._in_use >= sum(tensor.numel() * 4 for tensor in live)
        assert pool._in_use + sum(span.size for span in pool._free) <= _cpu_memory._LIMIT * peak


def test_small_tensors_and_dtypes(pool):
    assert _cpu_memory.empty((3, 4), torch.empty(0, dtype=torch.float64)).dtype == torch.float64
    assert _cpu_memory.empty((0, 4), torch.empty(0)).shape == (0, 4)
    large = _cpu_memory.empty((2048, 1024), torch.empty(0, dtype=torch.bfloat16))
    assert large.dtype == torch.bfloat16 and large.is_contiguous()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_processes_do_not_write_into_ours(pool):
    tensor = _cpu_memory.empty(MILLION, torch.empty(0)).zero_()
    child = os.fork()
    if child == 0:
        tensor[0, 0] = 1
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert tensor[0, 0] == 0
