"""Models of branches as trainings: what they spend beside a whole one, and what is trained when."""

import json
import shutil
from pathlib import Path

import pytest
from command_stand_ins import Commands, after, reproduce
from test_experiment_plan import SCALES, counts, parse, trainings
from test_experiment_plan import commands as planned

from mhmoe_fairseq.commands.main import build_parser
from mhmoe_fairseq.commands.reproduce import plans_of
from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.data.domains import FILE, write_domains
from mhmoe_fairseq.experiments.branches import require_domains
from mhmoe_fairseq.experiments.calls import Calls
from mhmoe_fairseq.experiments.models import MODELS
from mhmoe_fairseq.prepare.sources.mix import DOMAINS


@pytest.mark.parametrize("scale", SCALES)
def test_branches_and_their_mix_spend_what_the_sparse_model_spends(scale: str) -> None:
    found = planned("family", "--scale", scale, "--models", "smoe", "btx", "--seeds", "3", "--lrs", "1e-3")
    *trained, mix, mixed = [
        words for words in found if "prepare" not in words and words[1] not in ("evaluate", "report")
    ]
    seed, *branches, sparse = map(parse, trained)
    domains = MODELS["btx"].branches
    assert len(domains) == 7 and set(domains) < set(DOMAINS)
    assert [(of.train_subset, of.valid_subset) for of in (seed, *branches, parse(mixed))] == [
        ("train", "valid"), *((f"train_{of}", f"valid_{of}") for of in domains), ("train", "valid")
    ]  # fmt: skip
    all_of_it = [seed, *branches, parse(mixed)]
    assert sum(of.max_update for of in all_of_it) == sparse.max_update == {"cpu": 1000, "paper": 250_000}[scale]
    alike = ("lr", "batch_size", "update_freq", "tokens_per_sample", "seed", "dropout", "weight_decay")
    assert {str([getattr(of, name) for name in alike]) for of in (*all_of_it, sparse)} == {
        str([getattr(sparse, name) for name in alike])
    }
    assert {of.arch for of in all_of_it[:-1]} == {sparse.arch.replace("smoe", "dense")}
    best = [f"{of.save_dir}/checkpoint_best.pt" for of in all_of_it]
    assert seed.finetune_from_model is None and {of.finetune_from_model for of in branches} == {best[0]}
    assert [word for word in mix if word.endswith("best.pt")] == best[:-1] and "--include-seed" in mix
    assert mix[mix.index("--output") + 1] == parse(mixed).finetune_from_model
    assert mix[mix.index("--router-seed") + 1] == "3"
    of_mixed, of_sparse = counts(mixed), counts(trained[-1])
    assert of_mixed == of_sparse and of_sparse.moe.num_experts == len(domains) + 1
    assert Path(parse(mixed).save_dir).parts[-2:] == ("btx", "seed-3")


def test_only_language_models_have_branches() -> None:
    with pytest.raises(UserError, match=r"--models \(btx\): must be another"):
        planned("table1-multimodal", "--models", "btx")
    assert trainings("classification", "--models", "btx").keys() >= {"classification/btx"}  # of a model that was mixed
    (plan,) = plans_of(build_parser("reproduce").parse_args(["reproduce", "classification", "--models", "btx"]))
    require_domains(plan.runs())  # and whose data tell no domains


def test_as_many_experts_as_branches_and_seed() -> None:
    with pytest.raises(UserError, match=r"--moe-expert-count \(16\) must be 8 for btx"):
        planned("family", "--models", "btx", "--", "--moe-expert-count", "16")


@pytest.mark.parametrize("model", ["btx", "demix"])
def test_data_without_the_domains_are_refused_before_any_training(
    model: str, commands: Commands, tmp_path: Path, capsys
) -> None:
    (tmp_path / "data" / FILE).unlink()
    assert reproduce(tmp_path, "family", "--models", "smoe", model) == 2 and not commands.called
    assert "domains.json, which tells the domain of every document, is missing" in capsys.readouterr().err
    write_domains(tmp_path / "data" / FILE, {"train": ["brown", "linux"]})
    assert reproduce(tmp_path, "family", "--models", "smoe", model) == (2 if model == "btx" else 0)
    if model == "btx":
        assert not commands.called and "has no text of bible, foldoc, gcide, python, wordnet" in capsys.readouterr().err


def test_seed_and_branches_are_trained_first_and_go_on_where_they_were(
    commands: Commands, tmp_path: Path, capsys
) -> None:
    words, out = ["family", "--models", "btx", "--jobs", "2"], tmp_path / "out"
    parts = [f"parts/btx/{of}/seed-1" for of in ("seed", *MODELS["btx"].branches)]
    commands.broken = "valid_python"
    assert reproduce(tmp_path, *words) == 2 and not (out / "btx").exists()
    told = capsys.readouterr()
    assert "training of parts/btx/python/seed-1 failed" in told.err and "already finished" not in told.out
    done = [path.parent for path in out.rglob("checkpoint_best.pt")]
    before = commands.trained()
    assert before[0] == parts[0] and {out / of for of in before} - {*done} == {out / parts[5]}
    commands.broken = None
    assert reproduce(tmp_path, *words) == 0
    called = [words[0] if words[0] == "fairseq-train" else words[1] for words, _ in commands.called]
    assert called[-4:] == ["checkpoint", "fairseq-train", "evaluate", "report"]
    *rest, mixed = commands.trained()
    assert {*before, *rest} == {*parts} and len(before) + len(rest) == len(parts) + 1 and mixed == "btx/seed-1"
    assert json.loads((out / mixed / "before.json").read_text()) == {
        "seed": 350,
        **dict.fromkeys(MODELS["btx"].branches, 50),
    }
    told = (out / mixed / "command.sh").read_text().splitlines()[1:]
    assert [line.split()[0] for line in told] == ["fairseq-train"] * 8 + ["mhmoe", "fairseq-train"]
    assert not list((out / "parts").rglob("record-*"))

    assert reproduce(tmp_path, *words) == 0 and commands.trained() == []
    assert reproduce(tmp_path, *words, "--lrs", "8e-3") == 0  # all of it, at another rate
    assert sorted(commands.trained()) == sorted([*parts, mixed])
    shutil.rmtree(out / "parts")  # nobody needs them any more
    assert reproduce(tmp_path, *words, "--lrs", "8e-3") == 0 and commands.trained() == []

    searched = ["family", "--models", "btx", "--lrs", "4e-3", "5e-3"]
    assert reproduce(tmp_path, *searched) == 0
    assert len(commands.trained()) == 2 * 9 + 9 and not list((out / "search").rglob("*.pt"))
    assert not list((out / "parts" / "search").rglob("*.pt"))
    assert reproduce(tmp_path, *searched) == 0 and commands.trained() == []
    state = out / "search" / "btx" / "lr-4e-3" / "run.json"  # of another command, and what it was mixed of is gone
    state.write_text(json.dumps({**json.loads(state.read_text()), "command": []}))
    assert reproduce(tmp_path, *searched) == 0
    assert [Path(of).name for of in commands.trained()] == ["lr-4e-3"] * 9


def test_a_rate_with_which_a_part_diverges_loses_the_search(commands: Commands, tmp_path: Path, monkeypatch) -> None:
    def call(calls, words, *more) -> None:
        commands(words, *more)
        if words[0] == "fairseq-train" and after("--lr", words) == "1":
            (Path(after("--save-dir", words)) / "checkpoint_best.pt").unlink()
            raise UserError("FloatingPointError: gradients are Nan/Inf")

    monkeypatch.setattr(Calls, "run", call)
    words = ["family", "--models", "btx", "--lrs", "4e-3", "1"]
    assert reproduce(tmp_path, *words) == 0
    trained = commands.trained()
    assert len([name for name in trained if "lr-1/" in f"{name}/"]) == 1 and len(trained) == 9 + 1 + 9  # the seed alone
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    assert found["best_lr"] == {"btx": "4e-3"} and found["valid_loss_bits"]["btx"]["1"] is None
    assert reproduce(tmp_path, *words) == 0 and not commands.trained()


@pytest.mark.parametrize("updates", [999, 150, 37])
def test_all_updates_are_spent(updates: int) -> None:
    words = ["reproduce", "family", "--models", "btx", "--updates", str(updates), "--lrs", "1e-3", "--seeds", "1"]
    (plan,) = plans_of(build_parser("reproduce").parse_args(words))
    (run,) = plan.runs()
    assert sum(of.updates for of in (run, *run.parts)) == updates
