"""The runner with stand-ins for the commands: what is kept, resumed, started afresh, said and reported."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from command_stand_ins import Commands, after, reproduce
from zero_shot_questions import write_tasks_folder

from mhmoe_fairseq.common.locks import LOCK, exclusive_lock
from mhmoe_fairseq.experiments import EXPERIMENTS, calls, runner
from mhmoe_fairseq.experiments.calls import Calls
from mhmoe_fairseq.experiments.run import Choice
from mhmoe_fairseq.experiments.runner import find_gpus

RUN = Calls.run  # which stand-ins replace


def test_finished_runs_are_kept_and_changed_ones_start_afresh(commands: Commands, tmp_path: Path, capsys) -> None:
    models = ["--models", "dense", "xmoe"]
    assert reproduce(tmp_path, "table1", *models) == 0
    evaluated = [(Path(words[2]).parts[-3:], words[4:-1]) for words, _ in commands.called if "evaluate" in words]
    assert evaluated == [
        ((model, "seed-1", "checkpoint_best.pt"), [str(tmp_path / "data"), "--split", "valid", "--split", "test"])
        for model in ("dense", "xmoe")
    ]
    assert commands.trained() == ["dense/seed-1", "xmoe/seed-1"]
    said = capsys.readouterr().out
    assert "dense/seed-1: training, 1000 updates" in said and "update 500: loss 5.000 bits, 100 tokens/s" in said
    assert "xmoe/seed-1, update 1000: validation perplexity 32.00" in said
    run = tmp_path / "out" / "dense" / "seed-1"
    assert (run / "command.sh").read_text().splitlines()[1].startswith("fairseq-train ")
    report = (tmp_path / "out" / "table1.md").read_text()
    assert report.startswith(f"mhmoe report {run} ") and "--paper table1 --reference xmoe" in report

    assert reproduce(tmp_path, "table1", *models) == 0
    assert commands.trained() == [] and capsys.readouterr().out.count("already finished") == 2
    assert reproduce(tmp_path, "table5", "--models", "xmoe") == 0  # shares its runs
    assert commands.trained() == []

    # Cut off: the training goes on where it was. One that lacks a record, or has half of one, is evaluated alone.
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**state, "finished": False}))
    half = tmp_path / "out" / "xmoe" / "seed-1" / "record-test.json"
    half.write_bytes(half.read_bytes()[:-20])
    assert reproduce(tmp_path, "table1", *models) == 0
    assert [words[4:-1] for words, _ in commands.called if "xmoe" in words[2] and "evaluate" in words] == [
        [str(tmp_path / "data"), "--split", "test"]
    ]
    assert len(commands.called) == 3 and commands.trained() == ["dense/seed-1"]
    assert (run / "record-test.json").is_file() and "afresh" not in capsys.readouterr().out

    (run / "left").touch()
    assert reproduce(tmp_path, "table1", "--models", "dense", "--nproc", "2") == 0  # the same update, shared
    assert commands.trained() == []
    assert reproduce(tmp_path, "table1", *models, "--", "--lr", "1e-3") == 0
    assert commands.trained() == ["dense/seed-1", "xmoe/seed-1"] and not (run / "left").exists()
    assert (
        "dense/seed-1: command, data or start have changed, or its checkpoint is gone: starting afresh"
        in capsys.readouterr().out
    )
    (tmp_path / "data" / "manifest.json").write_text("{ }")
    assert reproduce(tmp_path, "table1", "--models", "dense", "--", "--lr", "1e-3") == 0
    assert commands.trained() == ["dense/seed-1"]


def test_experts_of_domains_are_tested_without_being_told_the_domain_too(commands: Commands, tmp_path: Path) -> None:
    words, run = ("family", "--models", "demix"), tmp_path / "out" / "demix" / "seed-1"
    assert reproduce(tmp_path, *words) == 0
    told, mixed = [words[5:] for words, _ in commands.called if "evaluate" in words]
    assert told == ["--split", "valid", "--split", "test", "--cpu"]
    assert mixed == ["--split", "test", "--domain-mixture", "exact", "--cpu"]
    assert {path.name for path in run.glob("record-*")} == {
        f"record-{of}.json" for of in ("valid", "test", "test-exact")
    }
    commands.trained()
    (run / "record-test-exact.json").unlink()
    assert reproduce(tmp_path, *words) == 0  # what is missing alone
    assert [words for words, _ in commands.called if "evaluate" in words] == [
        ["mhmoe", "evaluate", str(run / "checkpoint_best.pt"), "--data", str(tmp_path / "data"), *mixed]
    ]


def test_what_fine_tuning_starts_from_is_trained_first_and_then_taken_as_it_is(
    commands: Commands, tmp_path: Path
) -> None:
    assert reproduce(tmp_path, "nlvr2", "--models", "dense", "--updates", "4", "--lrs", "1e-5") == 0
    assert [after("--lr", words) for words, _ in commands.called if "fairseq-train" in words] == [
        "2e-3",
        "1.5e-4",
        "1e-5",
    ]
    assert commands.trained() == ["dense/seed-1", "vqa/dense/seed-1", "nlvr2/dense/seed-1"]
    assert not list((tmp_path / "out" / "vqa").rglob("record-*"))  # nobody asked for its scores
    assert reproduce(tmp_path, "nlvr2", "--models", "dense", "--updates", "6") == 0
    assert commands.trained() == ["nlvr2/dense/seed-1"]
    (tmp_path / "out" / "vqa" / "dense" / "seed-1" / "checkpoint_best.pt").write_text("another")
    assert reproduce(tmp_path, "nlvr2", "--models", "dense", "--updates", "6") == 0
    assert commands.trained() == ["nlvr2/dense/seed-1"]


def test_jobs_share_the_gpus_by_turns(commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    begun = threading.Barrier(3)  # all jobs are there before one goes on

    def together(calls, words, *more):
        if words[0] == "fairseq-train":
            begun.wait(60)
        commands(words, *more)

    monkeypatch.setattr(Calls, "run", together)
    words = ("table1", "--models", "dense", "xmoe", "mhmoe-params", "--device", "cuda", "--lrs", "1e-3", "--seeds", "1")
    assert reproduce(tmp_path, *words, "--jobs", "3") == 0
    given = [
        variables.get("CUDA_VISIBLE_DEVICES") for words, variables in commands.called if words[0] == "fairseq-train"
    ]
    assert sorted(given) == ["0", "0", "1"]
    assert {variables.get("CUDA_VISIBLE_DEVICES") for words, variables in commands.called if words[1] == "report"} == {
        None
    }
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert find_gpus(Choice(device="cuda")) == ["5", "7"]


def test_the_longest_runs_start_first(commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Barrier(2)

    def together(calls, words, *more):  # two by two, so that the order is known
        if words[0] == "fairseq-train":
            begun.wait(60)
        commands(words, *more)

    monkeypatch.setattr(Calls, "run", together)
    commands.slow = "dense_lm_tiny"
    words = ("table1", "--models", "dense", "xmoe", "--seeds", "1", "2", "--lrs", "4e-3", "8e-3", "--jobs", "2")
    assert reproduce(tmp_path, *words) == 0
    *searched, a, b, c, d = commands.trained()
    assert {*searched} == {f"search/{model}/lr-{lr}" for model in ("dense", "xmoe") for lr in ("4e-3", "8e-3")}
    assert ({a, b}, {c, d}) == ({"dense/seed-1", "dense/seed-2"}, {"xmoe/seed-1", "xmoe/seed-2"})
    assert {*searched[:2]} == {"search/xmoe/lr-4e-3", "search/xmoe/lr-8e-3"}  # nothing known: the last of a table


def test_runs_at_the_same_time_have_one_thread_each_and_a_failure_is_named(
    commands: Commands, tmp_path: Path, capsys
) -> None:
    commands.broken = "xmoe_lm_tiny"
    assert reproduce(tmp_path, "table1", "--models", "dense", "xmoe", "--jobs", "2") == 2
    error = capsys.readouterr().err
    assert error.startswith("mhmoe reproduce: error: training of xmoe/seed-1 failed: RuntimeError: broken (see ")
    assert all(variables == {"OMP_NUM_THREADS": "1"} for _, variables in commands.called)
    commands.broken = None
    assert reproduce(tmp_path, "table1", "--jobs", "2") == 0
    capsys.readouterr()
    assert reproduce(tmp_path, "table1", "--status") == 0
    assert capsys.readouterr().out.count("finished |") == len(EXPERIMENTS["table1"].models)


def test_folders_of_others_are_refused_and_missing_data_is_prepared(commands: Commands, tmp_path: Path, capsys) -> None:
    run = tmp_path / "out" / "dense" / "seed-1"
    run.mkdir(parents=True)
    (run / "checkpoint_last.pt").touch()
    assert reproduce(tmp_path, "table1") == 2
    assert "holds checkpoints, but no run.json of mhmoe reproduce" in capsys.readouterr().err
    (run / "checkpoint_last.pt").unlink()
    (tmp_path / "data" / "manifest.json").unlink()
    assert reproduce(tmp_path, "table1", "--scale", "paper") == 2
    assert "--scale paper needs a CUDA GPU, and PyTorch finds none here" in capsys.readouterr().err
    assert reproduce(tmp_path, "table1", "--scale", "paper", "--device", "cpu") == 2
    assert "holds no prepared data for table1: make them with mhmoe prepare english --dest" in capsys.readouterr().err
    assert reproduce(tmp_path, "table1", "--models", "dense") == 0
    assert commands.called[0][0][:3] == ["mhmoe", "prepare", "english"]
    (run / "run.json").write_text('{"finished": true}')
    with exclusive_lock(run / LOCK, "--save-dir"):
        assert reproduce(tmp_path, "table1", "--models", "dense") == 2
    assert "another run is writing there" in capsys.readouterr().err and (run / "checkpoint_best.pt").exists()
    with exclusive_lock(tmp_path / "out" / LOCK, "--out"):  # two runners do not mix
        assert reproduce(tmp_path, "table5", "--models", "xmoe") == 2
    assert f"--out {tmp_path / 'out'}: another run is writing there" in capsys.readouterr().err
    assert "xmoe/seed-1" not in commands.trained()


def test_what_the_later_commands_need_is_asked_for_before_the_trainings(
    commands: Commands, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reproduce(tmp_path, "table3") == 2 and "--xnli must be the folder" in capsys.readouterr().err
    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    assert reproduce(tmp_path, "table7") == 2
    assert "table7 needs lm-eval: pip install" in capsys.readouterr().err and commands.called == []
    assert reproduce(tmp_path, "table7", "--dry-run") == 0
    monkeypatch.setattr(runner, "find_spec", lambda name: name)
    (write_tasks_folder(tmp_path / "data" / "zero-shot") / "piqa.jsonl").unlink()
    assert reproduce(tmp_path, "table7") == 2 and commands.trained() == []
    assert "piqa.jsonl: is missing; mhmoe prepare zero-shot" in capsys.readouterr().err
    assert reproduce(tmp_path, "figure5", "--xnli", str(tmp_path)) == 2 and commands.trained() == []
    assert "no XNLI validation file in it" in capsys.readouterr().err


def test_the_other_machines_only_train(commands: Commands, tmp_path: Path, capsys) -> None:
    machine = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "node0"]
    assert reproduce(tmp_path, "table1", "--models", "dense", *machine) == 0
    assert [words[0] for words, _ in commands.called] == ["torchrun"]
    assert not list((tmp_path / "out").rglob("run.json"))
    assert reproduce(tmp_path, "table1", "--models", "dense", *machine, "--lrs", "1e-3", "2e-3") == 2
    assert "--lrs (1e-3, 2e-3) must be one when --nnodes is 2" in capsys.readouterr().err


@pytest.mark.parametrize("when", ["in a training", "behind it"])
def test_interrupted_it_ends_what_it_started_and_begins_nothing_more(
    when: str, commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, went_on, times = signal.getsignal(signal.SIGTERM), list[str](), iter([1])

    def interrupt(*_: object) -> None:
        if next(times, None):
            os.kill(os.getpid(), signal.SIGTERM)  # as a cluster ends a job
            time.sleep(0.3)

    def call(calls, words, variables, on_line, output=None) -> None:
        commands(words, variables, on_line, output)
        if words[0] == "fairseq-train" and when == "behind it":
            interrupt()
        else:
            RUN(
                calls,
                ["mhmoe", "-n", "1", "-r", "1", "print('begun', flush=True); __import__('time').sleep(20)"],
                {},
                interrupt,
            )
            went_on.append(words[1])

    monkeypatch.setitem(calls._MODULES, "mhmoe", "timeit")
    monkeypatch.setattr(Calls, "run", call)
    assert reproduce(tmp_path, "table1", "--models", "dense", "xmoe") == 130
    assert not went_on and signal.getsignal(signal.SIGTERM) == handler
    assert commands.trained() == ["dense/seed-1"]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_after_a_failure_nothing_more_begins(jobs: str, commands: Commands, tmp_path: Path) -> None:
    commands.broken = "dense_lm_tiny"
    words = ("table1", "--models", "dense", "--seeds", "1", "2", "3", "4", "--jobs", jobs)
    assert reproduce(tmp_path, *words) == 2 and len(commands.trained()) <= int(jobs)


def test_what_is_not_a_users_error_keeps_its_kind(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "parse_record", lambda line: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        reproduce(tmp_path, "table1", "--models", "dense")


def test_a_start_that_is_gone_costs_no_results(commands: Commands, tmp_path: Path, capsys) -> None:
    words = ("nlvr2", "--models", "dense", "--updates", "4", "--lrs", "1e-5")
    assert reproduce(tmp_path, *words) == 0 and len(commands.trained()) == 3
    start = tmp_path / "out" / "vqa" / "dense" / "seed-1" / "checkpoint_best.pt"
    start.unlink()
    assert reproduce(tmp_path, *words) == 0 and not commands.trained()  # all is done
    run = tmp_path / "out" / "nlvr2" / "dense" / "seed-1"
    before = {path: path.read_bytes() for path in run.iterdir()}
    capsys.readouterr()
    for _ in range(2):
        assert reproduce(tmp_path, *words[:-1], "2e-5") == 2 and not commands.called[1:]
        assert f"{start} is gone, and others start from it: put it back" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    shutil.rmtree(start.parent)
    assert reproduce(tmp_path, *words[:-1], "2e-5") == 0
    assert commands.trained() == ["vqa/dense/seed-1", "nlvr2/dense/seed-1"]


def test_a_run_that_was_half_emptied_is_emptied_again(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, words = tmp_path / "out" / "dense" / "seed-1", ("table1", "--models", "dense", "--lrs")
    assert reproduce(tmp_path, *words, "4e-3") == 0
    for killed_at in range(1, len([*run.iterdir()])):
        unlink, left = Path.unlink, [killed_at]

        def kill(path: Path, missing_ok: bool = False, unlink=unlink, left=left) -> None:
            if path.parent == run:
                left[0] -= 1
                if not left[0]:
                    raise MemoryError("killed")
            unlink(path, missing_ok)

        with monkeypatch.context() as patched, pytest.raises(MemoryError):
            patched.setattr(Path, "unlink", kill)
            reproduce(tmp_path, *words, "8e-3")
        commands.trained()
        assert reproduce(tmp_path, *words, "4e-3") == 0 and commands.trained() == ["dense/seed-1"]


def test_what_is_named_twice_is_trained_once(commands: Commands, tmp_path: Path) -> None:
    words = ("table1", "--models", "dense", "--seeds", "2", "2", "--lrs", "4e-3", "4e-3", "--jobs", "2")
    assert reproduce(tmp_path, *words) == 0 and commands.trained() == ["dense/seed-2"]


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"best_lr": null}'])
@pytest.mark.parametrize("file", ["dense/seed-1/run.json", "search.json"])
def test_files_of_something_else_are_named(content: str, file: str, commands: Commands, tmp_path: Path, capsys) -> None:
    if (file, content) == ("search.json", "{}"):
        return  # no model has been searched for yet
    path = tmp_path / "out" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    assert reproduce(tmp_path, "table1", "--models", "dense", "--lrs", "4e-3", "8e-3") == 2
    assert f"{path} is not of mhmoe reproduce" in capsys.readouterr().err and not commands.trained()
