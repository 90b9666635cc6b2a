"""``mhmoe analyze`` and ``mhmoe report`` on runs of several languages."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from console import train
from multilingual_data import LANGUAGES, write_languages

from mhmoe_fairseq.analysis.routing.language_statistics import accuracy, language_guesses, mean_overlap, overlap
from mhmoe_fairseq.commands.main import main

PNG = b"\x89PNG"
MHMOE = ("--moe-expert-count", 4, "--moe-ffn-dim", 16, "--mhmoe-heads-number", 2, "--moe-top-k", 2)


@dataclass(frozen=True)
class LanguageRuns:
    """The data folder and two runs with evaluations of the test split."""

    data: Path
    dense: Path
    mhmoe: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> LanguageRuns:
    root = tmp_path_factory.mktemp("language-runs")
    data = write_languages(root / "data")
    for name, moe in (("dense", ()), ("mhmoe", MHMOE)):
        run = root / name
        run.mkdir()
        flags = [
            "--task", "mhmoe_multilingual_language_modeling", "--multilang-sampling-alpha", 0.5, "--disable-validation",
            "--log-format", "json", "--log-interval", 2, "--log-file", run / "train.log", "--decoder-embed-dim", 32,
            "--decoder-attention-heads", 2, "--batch-size", 32, "--tokens-per-sample", 24,
        ]  # fmt: skip
        train(data, run, f"{name}_lm_tiny", *moe, *flags, max_update=6)
        evaluated = ["--data", data, "--split", "test", "--json", run / "eval-test.json"]
        assert main(["evaluate", str(run / "checkpoint_last.pt"), *map(str, evaluated)]) == 0
        shutil.copy(data / "manifest.json", run)
    return LanguageRuns(data, root / "dense", root / "mhmoe")


def scores_of(run: Path) -> dict:
    return json.loads((run / "eval-test.json").read_text())


# ---------------------------------------------------------------------- the figures, by hand


def test_what_two_languages_share() -> None:
    load_GLE = torch.tensor([[[4.0, 4, 0, 0]], [[0, 10, 10, 0]], [[0, 0, 0, 1]]])
    shared = overlap(load_GLE)
    assert shared.tolist() == [[[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]]
    assert mean_overlap(shared[0]) == pytest.approx(0.5 / 3)
    assert mean_overlap(torch.ones(1, 1)) == 1.0


def test_languages_are_told_apart_by_the_experts_they_use() -> None:
    apart = [torch.tensor([[[9.0, 1, 0]]] * 6), torch.tensor([[[0.0, 1, 9]]] * 4)]
    guesses = language_guesses(apart)
    assert guesses.tolist() == [[[3, 0], [0, 2]]] * 2  # one layer, and all of them together
    assert accuracy(guesses[0]) == 1.0
    alike = [torch.tensor([[[5.0, 5, 5]]] * 8)] * 4
    assert accuracy(language_guesses(alike)[0]) == 0.25  # chance: all are taken for the first


def test_layers_together_tell_what_one_alone_does_not() -> None:
    def pieces(first: list[float], second: list[float]) -> torch.Tensor:
        return torch.tensor([[first, second]] * 6)

    one, other = [8.0, 2.0], [2.0, 8.0]
    loads = [pieces(one, one), pieces(one, other), pieces(other, one), pieces(other, other)]
    first, second, together = map(accuracy, language_guesses(loads))
    assert (first, second, together) == (0.5, 0.5, 1.0)


# ---------------------------------------------------------------------- mhmoe analyze


def test_analysis_by_language(runs: LanguageRuns, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["analyze", runs.mhmoe / "checkpoint_last.pt", "--data", runs.data, "--split", "test", "--out", tmp_path]
    assert main([*map(str, words)]) == 0
    output = capsys.readouterr().out
    found = json.loads((tmp_path / "languages-test.json").read_text())
    whole = json.loads((tmp_path / "activation-test.json").read_text())
    assert found["languages"] == LANGUAGES and found["layers"] == whole["layers"] == [1]
    load = torch.tensor(found["load"])
    assert load.sum(0).tolist() == whole["load"]
    expected = scores_of(runs.mhmoe)
    heads, top_k = 2, 2
    for place, language in enumerate(LANGUAGES):
        score = expected["languages"][language]
        assert found["tokens"][place] == score["tokens"]
        assert found["loss"][place] == pytest.approx(score["loss"], abs=1e-4)
        assert load[place].sum() == score["tokens"] * heads * top_k
        assert re.search(rf"\| {language} +\| +{score['tokens']:,} \|", output)
    assert whole["loss"] == pytest.approx(expected["total"]["loss"], abs=1e-4)
    derived = found["derived"]
    assert len(derived["accuracy"]) == 2 and all(0 <= share <= 1 for share in derived["accuracy"])
    assert torch.tensor(derived["overlap"]).diagonal(dim1=1, dim2=2) == pytest.approx(torch.ones(1, 4))
    assert [sum(row) for row in found["guesses"][0]] == [
        pieces // 2 for pieces in (torch.tensor(found["tokens"]) / 24).ceil().long().clamp(max=100).tolist()
    ]
    for name in ("activation-test.png", "languages-test-load.png", "languages-test-overlap.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    assert main([*map(str, words)]) == 0
    assert "measuring" in output and "measuring" not in capsys.readouterr().out


def test_analysis_of_one_language(runs: LanguageRuns, tmp_path: Path) -> None:
    words = ["--data", runs.data, "--split", "test_zh", "--out", tmp_path]
    assert main(["analyze", str(runs.mhmoe / "checkpoint_last.pt"), *map(str, words)]) == 0
    found = json.loads((tmp_path / "languages-test_zh.json").read_text())
    assert found["languages"] == ["zh"] and found["derived"]["accuracy"][-1] == 1.0


# ---------------------------------------------------------------------- mhmoe report


def report(out: Path, *words: object) -> str:
    assert main(["report", *map(str, words), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def language_row(text: str, language: str) -> dict[str, str]:
    tables = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    (header,) = [row for row in tables if row[0] == "language"]
    (row,) = [row for row in tables if row[0] == language]
    return dict(zip(header, row))


def test_the_report_has_every_language_of_every_model(
    runs: LanguageRuns, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text = report(tmp_path / "report.md", runs.dense, runs.mhmoe, "--data", runs.data, "--activation-split", "test")
    for language in LANGUAGES:
        row = language_row(text, language)
        for model, run in (("dense", runs.dense), ("mhmoe", runs.mhmoe)):
            score = scores_of(run)["languages"][language]
            assert row[f"{model}, ppl"] == f"{score['perplexity']:,.2f}"
            assert row[f"{model}, bits/char"] == f"{score['bits_per_character']:.4f}"
    total = scores_of(runs.dense)["total"]
    row = language_row(text, "all, by tokens")
    assert (row["dense, ppl"], row["dense, bits/char"]) == (
        f"{total['perplexity']:,.2f}", f"{total['bits_per_character']:.4f}",
    )  # fmt: skip
    assert "| paper, multilingual |" in text and "8.56" in text
    assert re.search(r"\| mhmoe \| +[\d.]+ % \| +[\d.]+ % \|", text[text.index("## Languages in routing") :])
    figures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert {Path(figure).name for figure in figures} >= {
        "languages-perplexity.png", "languages-bits-per-character.png", "languages-load-mhmoe.png",
        "languages-overlap-mhmoe.png", "expert-activation.png",
    }  # fmt: skip
    assert all((tmp_path / figure).read_bytes().startswith(PNG) for figure in figures)
    assert "## Languages\n" in capsys.readouterr().out


def test_seeds_give_mean_and_standard_deviation_of_every_language(runs: LanguageRuns, tmp_path: Path) -> None:
    for model in ("dense", "mhmoe"):
        for seed, bits in ((1, 3.0), (2, 3.1), (3, 3.2)):
            run = Path(shutil.copytree(getattr(runs, model), tmp_path / "runs" / model / f"seed-{seed}"))
            kept = scores_of(run)
            german = kept["languages"]["de"]
            german.update(loss=bits, characters=german["tokens"] / 2)
            (run / "eval-test.json").write_text(json.dumps(kept))
    flags = ["--data", runs.data, "--aggregate", "--activation-split", "none"]
    row = language_row(report(tmp_path / "report.md", tmp_path / "runs", *flags), "de")
    assert row["mhmoe, ppl"] == row["dense, ppl"] == "8.59 ± 0.59"
    assert row["mhmoe, bits/char"] == "6.2000 ± 0.2000"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda kept: kept.update(data_digest="0" * 64), "eval-test.json was evaluated on other data than"),
        (lambda kept: kept.pop("languages"), "eval-test.json is no output of mhmoe evaluate: KeyError('languages')"),
    ],
)
def test_figures_of_other_data_or_of_another_kind_are_refused(
    runs: LanguageRuns, tmp_path: Path, capsys: pytest.CaptureFixture, damage, message: str
) -> None:
    run = Path(shutil.copytree(runs.dense, tmp_path / "dense"))
    kept = scores_of(run)
    damage(kept)
    (run / "eval-test.json").write_text(json.dumps(kept))
    assert main(["report", str(run), "--data", str(runs.data), "--out", str(tmp_path / "report.md")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
