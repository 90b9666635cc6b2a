"""Searches of the learning rate, with stand-ins for the commands: what is tried, chosen and kept."""

import json
import math
import re
from pathlib import Path

import pytest
from command_stand_ins import Commands, after, reproduce

from mhmoe_fairseq.commands.main import main as mhmoe
from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.evaluation.records import read_record
from mhmoe_fairseq.experiments import EXPERIMENTS
from mhmoe_fairseq.experiments.calls import Calls
from mhmoe_fairseq.experiments.plan import chosen_lr, read_search

RESULTS = Path(__file__).parents[2] / "results"


def test_a_search_takes_the_best_learning_rate_and_leaves_no_checkpoints(
    commands: Commands, tmp_path: Path, capsys
) -> None:
    words = ["study", "--models", "dense", "--seeds", "1", "2", "--lrs", "8e-3", "5e-3", "1e-3"]
    assert reproduce(tmp_path, *words) == 0
    lrs = [after("--lr", words) for words, _ in commands.called if words[0] == "fairseq-train"]
    assert lrs == ["8e-3", "5e-3", "1e-3", "5e-3", "5e-3"]
    kinds = ["search" if any("/search/" in word for word in words) else words[1] for words, _ in commands.called]
    assert kinds[:3] == ["search"] * 3 and kinds.count("evaluate") == 2  # tests come last, once for each run
    (searched,) = json.loads((tmp_path / "out" / "search.json").read_text())["date"].values()
    for seed in (1, 2):
        tested = read_record(tmp_path / "out" / "dense" / f"seed-{seed}" / "record-test.json")
        assert tested.provenance["date"] >= searched
    assert json.loads((tmp_path / "out" / "search.json").read_text())["best_lr"] == {"dense": "5e-3"}
    assert not list((tmp_path / "out" / "search").rglob("*.pt"))
    commands.trained()
    search = tmp_path / "out" / "search.json"
    search.write_text(search.read_text().replace(searched, "2001-01-01T00:00:00+00:00"))
    assert reproduce(tmp_path, *words) == 0 and commands.trained() == []
    assert json.loads(search.read_text())["date"] == {"dense": "2001-01-01T00:00:00+00:00"}
    assert reproduce(tmp_path, *words, "--status") == 0  # knows what the search found
    told = capsys.readouterr().out.split("| run ")[1]
    assert told.count(" finished |") == 5 and re.search(r"search/dense/lr-5e-3 +\| finished \| +200 of 200", told)
    others = [*words[:-3], "2e-3", "1e-3"]
    assert reproduce(tmp_path, *others, "--status") == 0 and capsys.readouterr().out.count(" changed |") == 2
    assert reproduce(tmp_path, "table1", "--models", "xmoe", *words[-4:]) == 0  # the search of another model is added
    assert json.loads((tmp_path / "out" / "search.json").read_text())["best_lr"] == {"dense": "5e-3", "xmoe": "5e-3"}


def train_around(optimum: float, commands: Commands, monkeypatch) -> None:
    """Trainings whose loss is the octaves between their rate and an optimum; below 0 it falls until they diverge."""

    def call(calls, words, *more) -> None:
        commands(words, *more)
        if words[0] == "fairseq-train":
            lr, log = float(after("--lr", words)), Path(after("--save-dir", words)) / "train.log"
            loss = abs(math.log2(lr / optimum)) if optimum > 0 else 1 / lr if lr < 3e-2 else math.nan
            log.write_text(re.sub(r'"valid_loss": "[^"]*"', f'"valid_loss": "{loss}"', log.read_text()))

    monkeypatch.setattr(Calls, "run", call)


@pytest.mark.parametrize(
    ("optimum", "further", "best"),
    [
        (8e-3, [], "8e-3"),
        (4.1e-3, ["2e-3"], "4e-3"),
        (1.9e-3, ["2e-3", "1e-3"], "2e-3"),
        (3e-2, ["3.2e-2", "6.4e-2"], "3.2e-2"),
        (1, ["3.2e-2", "6.4e-2"], "6.4e-2"),  # no more
        (-1, ["3.2e-2"], "1.6e-2"),  # where it diverges
    ],
)
def test_a_search_goes_on_where_the_best_is_at_the_edge(
    optimum: float, further: list[str], best: str, commands: Commands, tmp_path: Path, monkeypatch, capsys
) -> None:
    train_around(optimum, commands, monkeypatch)
    out, own = tmp_path / "out", ["4e-3", "8e-3", "1.6e-2"]
    words = [
        "reproduce",
        "study",
        "--models",
        "dense",
        "--seeds",
        "2",
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(out),
    ]
    assert mhmoe(words) == 0
    assert commands.trained() == [f"search/dense/lr-{lr}" for lr in own + further] + ["dense/seed-2"]
    found = json.loads((out / "search.json").read_text())
    assert found["best_lr"] == {"dense": best} and [*found["valid_loss_bits"]["dense"]] == own + further
    assert mhmoe([*words, "--keep", "--results", str(tmp_path / "results")]) == 0  # knows the rate that was found
    capsys.readouterr()
    assert mhmoe([*words, "--status"]) == 0
    assert capsys.readouterr().out.count(" finished |") == len(own + further) + 1
    assert mhmoe(words) == 0 and not commands.trained()
    early = {"dense": "2001-01-01T00:00:00+00:00"}
    (out / "search.json").write_text(json.dumps({**found, "date": early}))
    assert mhmoe([*words, "--lrs", *own]) == 0  # those alone
    again = json.loads((out / "search.json").read_text())
    assert [*again["valid_loss_bits"]["dense"]] == own
    assert commands.trained() == ([] if best in own else ["dense/seed-2"])
    assert (again["date"] == early) == (best in own)  # when it was chosen: the same rate was before the tests
    assert mhmoe([*words, "--lrs", *own, "5e-4", "1e-4", "2"]) == 0  # are no rates of the plan's search
    capsys.readouterr()
    assert mhmoe([*words, "--status"]) == 0
    chosen = json.loads((out / "search.json").read_text())["best_lr"]["dense"]
    assert (" changed |" in capsys.readouterr().out) == (chosen not in own + further)


@pytest.mark.parametrize(
    ("octaves", "name", "best"),
    [
        (0.51, "study-wide", "8e-3"),  # 0.49 bits with 1.6e-2, 0.51 with 8e-3: within 0.03
        (0.51, "study", "1.6e-2"),
        (0.52, "study-wide", "1.6e-2"),
        (-0.49, "study-wide", "4e-3"),
    ],
)
def test_of_rates_that_a_search_does_not_tell_apart_a_longer_training_has_the_smallest(
    octaves: float, name: str, best: str, commands: Commands, tmp_path: Path, monkeypatch, capsys
) -> None:
    train_around(8e-3 * 2**octaves, commands, monkeypatch)
    words = ["reproduce", name, "--models", "xmoe", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert mhmoe(words) == 0
    found = json.loads((tmp_path / "out" / "search.json").read_text())["best_lr"]
    assert [*found.values()] == [best]
    capsys.readouterr()
    assert mhmoe(["reproduce", name, "--list"]) == 0
    assert ("of rates within 0.03 bits the smallest" in capsys.readouterr().out) == (name == "study-wide")


def test_a_rate_that_diverged_is_not_the_best(commands: Commands, tmp_path: Path, monkeypatch, capsys) -> None:
    def call(calls, words, *more) -> None:
        commands(words, *more)
        if words[0] == "fairseq-train" and float(after("--lr", words)) > 0.1:
            log = Path(after("--save-dir", words)) / "train.log"
            log.write_text(re.sub(r'"valid_loss": "[^"]*"', '"valid_loss": "nan"', log.read_text()))

    monkeypatch.setattr(Calls, "run", call)
    words = ("table1", "--models", "dense", "--lrs")
    for rates in (("1", "4e-3"), ("4e-3", "1")):
        assert reproduce(tmp_path, *words, *rates) == 0
        found = json.loads((tmp_path / "out" / "search.json").read_text(), parse_constant=pytest.fail)
        assert found["best_lr"] == {"dense": "4e-3"} and found["valid_loss_bits"]["dense"]["1"] is None
    assert reproduce(tmp_path, *words, "1", "2") == 2
    assert "--lrs (1 2): with none of them dense has a finite validation loss" in capsys.readouterr().err


def test_a_search_outlives_a_rate_whose_gradients_are_no_numbers(
    commands: Commands, tmp_path: Path, monkeypatch, capsys
) -> None:
    def call(calls, words, *more) -> None:
        commands(words, *more)
        if words[0] == "fairseq-train" and float(after("--lr", words)) > 0.1:
            raise UserError(f"{error}: gradients are Nan/Inf")

    monkeypatch.setattr(Calls, "run", call)
    words, error = ("table1", "--models", "dense", "--lrs"), "FloatingPointError"
    assert reproduce(tmp_path, *words, "1", "4e-3") == 0
    assert commands.trained() == ["search/dense/lr-1", "search/dense/lr-4e-3", "dense/seed-1"]
    assert "search/dense/lr-1: diverged (FloatingPointError: gradients are Nan/Inf)" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "search.json").read_text(), parse_constant=pytest.fail)
    assert found["best_lr"] == {"dense": "4e-3"} and found["valid_loss_bits"]["dense"]["1"] is None
    assert reproduce(tmp_path, *words, "1", "4e-3") == 0 and not commands.trained()  # nor is it tried again
    assert reproduce(tmp_path, *words, "1") == 2  # a training itself must not diverge
    error = "RuntimeError"
    assert reproduce(tmp_path, *words, "2", "4e-3") == 2


@pytest.mark.parametrize("name", [name for name, experiment in EXPERIMENTS.items() if experiment.stages])
def test_each_kept_rate_is_what_its_search_chose(name: str) -> None:
    experiment = EXPERIMENTS[name]
    search = read_search(RESULTS / experiment.folder)
    for recipe in [stage.recipe for stage in experiment.stages]:
        for model in experiment.models:
            if losses := search.get("valid_loss_bits", {}).get(recipe.name_of(model)):
                chosen = chosen_lr(losses, recipe.scales["cpu"].search_margin)
                assert search["best_lr"][recipe.name_of(model)] == chosen, model
