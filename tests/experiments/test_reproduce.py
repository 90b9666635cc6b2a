"""``mhmoe reproduce`` on toy data, for real: from prepared data to the report, in each of the three domains."""

import itertools
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from image_text_data import IMG_SIZE, PATCH_SIZE, prepare_shapes
from labelled import prepare, write_jsonl
from multilingual_data import LANGUAGES, documents_of

from mhmoe_fairseq.commands.main import main as mhmoe
from mhmoe_fairseq.evaluation.records import read_record
from mhmoe_fairseq.models.precision import resolve

TOY = ("--updates", "2", "--validations", "1")


def reproduce(name: str, data: Path, out: Path, *words: str) -> None:
    assert mhmoe(["reproduce", name, "--data", str(data), "--out", str(out), *TOY, *words]) == 0


def test_from_text_to_a_report_which_ends_with_the_papers_table(trained_model, tmp_path: Path, capsys) -> None:
    reproduce("demo", trained_model.data, tmp_path, "--models", "mhmoe-flops", "xmoe", "--jobs", "2")
    said = capsys.readouterr().out
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    for model in ("xmoe", "mhmoe-flops"):
        assert f"{model}/seed-1, update 2: validation perplexity" in said and f"| {model} " in report
        record = read_record(tmp_path / model / "seed-1" / "record-test.json")
        assert record.provenance["precision"] == resolve("auto", "cpu")
        assert record.experts is not None and f"{record.main.value:.2f}" in report
    assert "14.82" in report.split("## ")[-1]
    assert f"- trained in: all models {resolve('auto', 'cpu')}, as --mhmoe-precision auto chose" in report
    reproduce("demo", trained_model.data, tmp_path, "--models", "xmoe")
    assert "xmoe/seed-1: already finished" in capsys.readouterr().out


@pytest.mark.slow
def test_from_images_to_tables_1_and_4_and_figure_8(tmp_path: Path) -> None:
    data, out = prepare_shapes(tmp_path / "data"), tmp_path / "out"
    flags = ["--", "--img-size", str(IMG_SIZE), "--patch-size", str(PATCH_SIZE)]
    words = ["--models", "dense", "mhmoe-flops", "--jobs", "2", "--validations", "2"]  # two checkpoints for the figure
    reproduce("multimodal", data, out, *words, *flags)
    assert "14.73" in (out / "table1-multimodal.md").read_text(encoding="utf-8")
    table = (out / "table4.md").read_text(encoding="utf-8")
    assert all(name in table for name in ("dense", "mhmoe-flops", "CIDEr", "neither VQAv2 nor NLVR2"))
    assert (
        list((out / "figure8").glob("*.png")) and (out / "vqa" / "dense" / "seed-1" / "predictions-test.txt").exists()
    )


@pytest.mark.slow
def test_from_text_in_four_languages_to_classification_and_xnli(tmp_path: Path) -> None:
    text, data, out = tmp_path / "text", tmp_path / "data", tmp_path / "out"
    text.mkdir()
    for language in LANGUAGES:
        numbers = itertools.count(1)  # so that no line is there twice
        documents = ["\n".join(f"{next(numbers)}. {line}" for line in of) for of in documents_of(language, 300, 1)]
        (text / f"{language}.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    words = ["--source", "text", str(text), "--dest", str(data), "--langs", ",".join(LANGUAGES), "--vocab-size", "600"]
    assert mhmoe(["prepare", "multilingual", *words, "--valid-fraction", "0.2", "--test-fraction", "0.2"]) == 0
    reproduce("table1-multilingual", data, out, "--models", "mhmoe-params")
    report = (out / "table1-multilingual.md").read_text(encoding="utf-8")
    assert "7.19" in report and set(LANGUAGES) <= set(re.findall(r"\b[a-z]{2}\b", report))

    files: dict[str, list[str]] = {}
    for split, language, seed in (("train", "en", 3), ("valid", "en", 4), ("test", "de", 5), ("test", "en", 6)):
        lines = ["1", "22", *(document[0] for document in documents_of(language, 12, seed))]
        rows = [{"text": line, "label": ("even", "odd")[len(line) % 2]} for line in lines]
        file = write_jsonl(tmp_path / f"labelled-{split}-{language}.jsonl", rows)
        files.setdefault(f"--{split}", []).append(f"{language}={file}")
    given = [word for flag, of in files.items() for word in (flag, *of)]
    assert prepare(*given, "--text-fields", "text", "--data", data, "--dest", tmp_path / "labelled") == 0
    reproduce("classification", tmp_path / "labelled", out, "--models", "mhmoe-params")
    record = read_record(out / "classification" / "mhmoe-params" / "seed-1" / "record-test.json")
    assert set(record.parts) == {"de", "en"}

    if find_spec("lm_eval") is None:  # an extra, which zero-shot XNLI alone needs
        return
    (tmp_path / "xnli").mkdir()
    for language in ("de", "en"):
        premise, hypothesis = (documents_of(language, 1, seed)[0][0] for seed in (8, 9))
        lines = [json.dumps({"premise": premise, "hypothesis": hypothesis, "label": label}) for label in (0, 1, 2)]
        (tmp_path / "xnli" / f"{language}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    reproduce("table3", data, out, "--models", "mhmoe-params", "--xnli", str(tmp_path / "xnli"))
    assert "40.1" in (out / "table3.md").read_text(encoding="utf-8")  # the paper's MH-MoE, English
