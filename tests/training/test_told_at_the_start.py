"""What a training is told at its start: a forgotten criterion, a loss that depends on the batch, a backend for GPUs."""

from pathlib import Path

import pytest
from console import evaluate
from parallel_runs import DENSE, train_logs, write_even_corpus
from workers import WorkerError

UNBALANCED = "leaves out the MoE layers' balance loss"
BY_BATCH = "which tokens an expert refuses depends on the other rows of the batch"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_even_corpus(tmp_path_factory.mktemp("corpus"), batches=4)


def test_a_criterion_without_the_balance_loss_and_routing_by_capacity(data: Path, tmp_path: Path) -> None:
    capacity = ("--mhmoe-routing", "capacity", "--criterion", "cross_entropy")
    (log,) = train_logs(1, data, tmp_path / "run", *capacity, updates=1)
    assert log.count(f"--criterion (CrossEntropyCriterion) {UNBALANCED}") == 1 and log.count(BY_BATCH) == 1
    log = evaluate(data, tmp_path / "run/checkpoint_last.pt", "--tokens-per-sample", 16)
    assert log.count(BY_BATCH) == 1 and UNBALANCED not in log and "Perplexity" in log


def test_nobody_else_is_told(data: Path, tmp_path: Path) -> None:
    (log,) = train_logs(1, data, tmp_path / "experts", updates=1)
    (dense,) = train_logs(1, data, tmp_path / "dense", "--criterion", "cross_entropy", updates=1, model=DENSE)
    for text in (log, dense):
        assert UNBALANCED not in text and BY_BATCH not in text


def test_the_default_backend_needs_gpus(data: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"--ddp-backend \(pytorch_ddp\) needs a GPU .*: on CPUs give .* legacy_ddp"):
        train_logs(2, data, tmp_path / "run", "--ddp-backend", "pytorch_ddp", updates=1, model=DENSE)
