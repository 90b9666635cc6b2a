"""The tests' own worker processes: results by rank, errors from afar, and an end to everything."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from console import write_corpus
from workers import TRAIN_FLAGS, WorkerError, Workers, here


def total(number):
    tensor = torch.tensor(number + dist.get_rank())
    dist.all_reduce(tensor)
    return dist.get_rank(), tensor


def place_without_group():
    assert not dist.is_initialized()
    return here().rank


def fail_on_rank_1():
    if dist.get_rank() == 1:
        raise ValueError("rank 1 does not like this")
    dist.all_reduce(torch.ones(()))


def sleep_on_rank_1():
    if dist.get_rank() == 1:
        time.sleep(100)


def vanish_on_rank_0():
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def test_results_come_by_rank_again_and_again(workers2):
    for number in (5, 7):
        assert workers2.run(total, number) == [(0, torch.tensor(2 * number + 1)), (1, torch.tensor(2 * number + 1))]
    assert workers2.run(place_without_group, group=False) == [0, 1]


def test_an_error_comes_back_with_its_traceback(workers2):
    with pytest.raises(WorkerError, match="ValueError: rank 1 does not like this"):
        workers2.run(fail_on_rank_1)


def test_a_rank_that_ends_early_is_an_error():
    with pytest.raises(WorkerError, match="rank 0 of 2: ended with status 7"):
        Workers(2).run(vanish_on_rank_0)


def test_time_is_limited_and_the_place_is_shown():
    started = time.monotonic()
    with pytest.raises(WorkerError, match="sleep_on_rank_1"):
        Workers(2).run(sleep_on_rank_1, timeout=4)
    assert time.monotonic() - started < 30


def test_fairseq_trains_on_all_ranks_twice(workers2, tmp_path):
    data = write_corpus(tmp_path)
    words = ["fairseq-train", data, *TRAIN_FLAGS, "--arch", "dense_lm_tiny", "--decoder-layers", 1, "--max-update", 2]
    words += ["--optimizer", "adam", "--tokens-per-sample", 32, "--batch-size", 4, "--save-dir", tmp_path / "saved"]
    first, second = (workers2.fairseq(*words) for _ in range(2))
    assert '"num_updates": "2"' in first[0] and "Loaded checkpoint" in second[0]
    assert "num_updates" not in first[1]  # only rank 0 logs
