"""Processes that fairseq did not connect do not train."""

from __future__ import annotations

import pytest

from mhmoe_fairseq.training.failures import require_process_group


@pytest.fixture(autouse=True)
def nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
@pytest.mark.parametrize("value", ["", "1", "many"])
def test_one_process_may_train_alone(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    assert require_process_group() is None


def test_torchruns_processes_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"WORLD_SIZE \(4\).*init_method=env://.*unset WORLD_SIZE"):
        require_process_group()


def test_slurms_tasks_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ValueError, match="--distributed-world-size 2 --distributed-port PORT"):
        require_process_group()


def pass_with_a_group(variable: str) -> None:
    import os

    os.environ[variable] = "2"
    require_process_group()


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_connected_processes_train(workers2, variable: str) -> None:
    assert workers2.run(pass_with_a_group, variable) == [None, None]
