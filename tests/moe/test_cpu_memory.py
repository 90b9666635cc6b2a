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
    assert not pool._free  # a view keeps the memory
    assert _cpu_memory.empty(MILLION, like).data_ptr() != address
    del view
    assert any(_cpu_memory.empty(MILLION, like).data_ptr() == address for _ in range(2))


def test_live_tensors_never_share_memory(pool):
    torch.manual_seed(0)
    live = {}
    for step in range(200):
        if live and torch.rand(()) < 0.5:
            key = next(iter(live))
            tensor = live.pop(key)
            assert (tensor == key).all()
            del tensor
        live[step] = _cpu_memory.empty((600 + step % 7, 1024), torch.empty(0)).fill_(step)
    assert all((tensor == key).all() for key, tensor in live.items())


def test_free_buffers_and_those_in_use_never_exceed_the_peak(pool):
    like = torch.empty(0)
    torch.manual_seed(1)
    live, peak = [], 0
    for _ in range(200):
        if live and torch.rand(()) < 0.5:
            live.pop(int(torch.randint(len(live), ())))
        live.append(_cpu_memory.empty((1024 * int(torch.randint(1, 6, ())), 512), like))
        peak = max(peak, pool._in_use)
        assert pool._in_use >= sum(tensor.numel() * 4 for tensor in live)
        assert pool._in_use + sum(map(len, pool._free)) <= peak


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
