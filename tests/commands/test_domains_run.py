"""Models of domains from end to end: branches that are mixed and trained on, and experts that are domains."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from console import USER_DIR, evaluate, evaluated, evaluation_record, logged, run_console, train
from mixed_corpora import DOMAINS, prepare_mix

from mhmoe_fairseq.commands.main import main as mhmoe
from mhmoe_fairseq.evaluation.records import read_record

FLAGS = "--sample-break-mode none --tokens-per-sample 48 --batch-size 8 --decoder-embed-dim 32 --lr 0.01".split()
EXPERTS = "--moe-freq 1 --moe-expert-count 2 --moe-top-k".split()
RESETS = [f"--reset-{part}" for part in ("optimizer", "dataloader", "meters", "lr-scheduler")]
DEMIX = [*FLAGS, *EXPERTS, 1, "--mhmoe-routing", "domain"]


class Trained(NamedTuple):
    """Folders of the data, of a dense seed with its branches, and of a model whose experts are domains."""

    data: Path
    runs: Path

    def checkpoint(self, name: str) -> Path:
        return self.runs / name / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("domains")
    found = Trained(prepare_mix(root), root)
    train(found.data, root / "seed", "dense_lm_tiny", *FLAGS, max_update=20)
    for name in DOMAINS:
        parts = ["--train-subset", f"train_{name}", "--valid-subset", f"valid_{name}"]
        start = ["--finetune-from-model", found.checkpoint("seed")]
        train(found.data, root / name, "dense_lm_tiny", *FLAGS, *parts, *start, max_update=40)
    train(found.data, root / "demix", "smoe_lm_tiny", *DEMIX, max_update=60)
    return found


def perplexities(folder: Path, checkpoint: Path, *words: object) -> dict[str, float]:
    """Of the test split and of each domain of it."""
    record = evaluation_record(folder, checkpoint, *words)
    return {"all": record.main.value, **record.values("perplexity")}


def test_a_branch_knows_its_own_domain_best(trained: Trained, tmp_path: Path) -> None:
    found = {name: perplexities(tmp_path, trained.checkpoint(name)) for name in DOMAINS}
    for name, other in (DOMAINS, DOMAINS[::-1]):
        assert found[name][name] < 0.98 * found[other][name]


def test_branches_are_mixed_and_trained_on(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mixed = tmp_path / "mixed.pt"
    branches = [word for name in DOMAINS for word in ("--branch", str(trained.checkpoint(name)))]
    words = ["checkpoint", "mix", "--seed", str(trained.checkpoint("seed")), *branches, "--output", str(mixed)]
    assert mhmoe(words) == 0
    said = capsys.readouterr().out
    assert "smoe_lm_tiny, 2 experts in 2 of 2 layers; new routers" in said
    assert "--moe-freq 1 --moe-expert-count 2 --moe-top-k 2 --restore-file" in said
    assert mhmoe(["checkpoint", "inspect", str(mixed)]) == 0
    assert "2 in each of 2 MoE layers" in capsys.readouterr().out
    before = perplexities(tmp_path, mixed)["all"]
    assert before < 1.3 * perplexities(tmp_path, trained.checkpoint("seed"))["all"]
    start = ["--restore-file", mixed, *RESETS]
    log = train(trained.data, tmp_path / "run", "smoe_lm_tiny", *FLAGS, *EXPERTS, 2, *start, max_update=20)
    assert logged(log, "train")["num_updates"] == 20
    assert perplexities(tmp_path, tmp_path / "run" / "checkpoint_last.pt")["all"] < before


def test_the_same_branch_several_times_is_sparse_upcycling(trained: Trained, tmp_path: Path) -> None:
    seed = trained.checkpoint("seed")
    words = ["--seed", seed, *["--branch", seed] * 3, "--moe-freq", 2, "--output", tmp_path / "upcycled.safetensors"]
    assert mhmoe(["checkpoint", "mix", *map(str, words)]) == 0
    assert mhmoe(["checkpoint", "convert", str(tmp_path / "upcycled.safetensors"), str(tmp_path / "upcycled.pt")]) == 0
    found = perplexities(tmp_path, tmp_path / "upcycled.pt")
    assert found == pytest.approx(perplexities(tmp_path, seed), rel=1e-5)


def test_experts_of_domains_are_told_or_mixed(trained: Trained, tmp_path: Path) -> None:
    checkpoint = trained.checkpoint("demix")
    told = perplexities(tmp_path, checkpoint)
    # fairseq's own command is told, too.
    log = evaluate(trained.data, checkpoint, *FLAGS[:2], "--tokens-per-sample", 48, "--gen-subset", "test_beta")
    assert evaluated(log).perplexity == pytest.approx(told["beta"], abs=0.006)
    one = {name: perplexities(tmp_path, checkpoint, "--domain-mixture", name) for name in DOMAINS}
    exact = perplexities(tmp_path, checkpoint, "--domain-mixture", "exact")
    for name, other in (DOMAINS, DOMAINS[::-1]):
        assert one[name][name] == pytest.approx(told[name], rel=1e-5)
        assert told[name] < 0.98 * one[other][name]
        # No more than a bit is lost for each document, or block: here of 48 tokens.
        assert exact[name] < 2 ** (1 / 30) * told[name]


def test_each_domain_goes_to_its_expert_alone(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--data", str(trained.data), "--split", "test", "--out", str(tmp_path), "--no-plots"]
    assert mhmoe(["analyze", str(trained.checkpoint("demix")), *words]) == 0
    record = read_record(tmp_path / "routing-test.json")
    assert record.metrics["load in common"].value == 0 and record.metrics["part guessed right"].value == 100
    for name in DOMAINS:
        assert all(sum(load > 0 for load in row.loads) == 1 for row in record.experts.of(name).layers)


def test_the_record_of_a_mixture_says_what_it_is_and_what_it_took(
    trained: Trained, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = trained.checkpoint("demix")
    assert mhmoe(["evaluate", str(checkpoint), "--split", "test_alpha", "--domain-mixture", "exact"]) == 0
    said = capsys.readouterr().out
    assert "passes over the text: 2" in said and "domain prior: uniform" in said
    record = read_record(checkpoint.parent / "record-test_alpha-exact.json")
    assert (record.what, record.settings["domain mixture"]) == ("domain mixture", "exact")
    assert record.experts is None  # every expert read everything
    words = ["--split", "test_alpha", "--domain-mixture", "demix-code", "--domain-prior", "train"]
    assert mhmoe(["evaluate", str(checkpoint), *words]) == 0
    assert "domain prior: train" in capsys.readouterr().out
    by_share = read_record(checkpoint.parent / "record-test_alpha-demix-code-train.json")
    assert by_share.settings["domain prior"] == "train" and by_share.what == "one-token mixture by share"


def test_who_cannot_tell_the_domain_refuses_the_model_by_one_line(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = str(trained.checkpoint("demix"))
    for words, line in (
        (["generate", checkpoint, "--prompt", "alpha 3"], "domain (None) must be given: the expert of every token"),
        (
            ["checkpoint", "export", "--format", "hf", checkpoint, str(tmp_path / "hf")],
            "--mhmoe-routing domain cannot be",
        ),
        (
            ["evaluate", str(trained.checkpoint("seed")), "--domain-mixture", "exact"],
            "--domain-mixture (exact): the model",
        ),
        (["evaluate", checkpoint, "--domain-prior", "train"], "--domain-prior (train): needs --domain-mixture"),
    ):
        assert mhmoe(words) == 2
        assert line in capsys.readouterr().err, words
    log = run_console(
        "fairseq-train", trained.data, "--user-dir", USER_DIR, "--task", "mhmoe_language_modeling",
        "--arch", "smoe_lm_tiny", "--mhmoe-routing", "domain", "--cpu", "--optimizer", "adam", "--max-update", 1,
        "--batch-size", 1, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert "--moe-expert-count (8) must be 2 with --mhmoe-routing domain" in log.splitlines()[-1]


def test_a_training_by_domains_resumes_as_if_it_had_not_stopped(trained: Trained, tmp_path: Path) -> None:
    figures = []
    for stop in (None, 10):
        folder = tmp_path / str(stop)
        for end in filter(None, (stop, 20)):
            log = train(trained.data, folder, "smoe_lm_tiny", *DEMIX, "--dropout", 0, max_update=end)
        figures.append({name: logged(log, "valid")[name] for name in ("loss", "num_updates")})
        state = torch.load(folder / "checkpoint_last.pt")
        assert state["task_state"]["domains"] == list(DOMAINS)
        assert not [name for name in state["model"] if "router" in name]
    assert figures[0] == figures[1]
