"""The recipes for several languages at toy size: prepare, train, evaluate by language, report, zero-shot XNLI."""

from __future__ import annotations

import itertools
import json
import re
from importlib.util import find_spec
from pathlib import Path

from labelled import prepare, write_jsonl
from multilingual_data import LANGUAGES, documents_of
from own_scripts import Scripts

RECIPES = "examples/multilingual_lm"
NAME = "mhmoe-params"


def test_from_text_in_four_languages_to_a_report(tmp_path: Path) -> None:
    text, data, out = tmp_path / "text", tmp_path / "data", tmp_path / "runs"
    text.mkdir()
    for language in LANGUAGES:
        numbers = itertools.count(1)  # so that no line is there twice
        documents = [
            "\n".join(f"{next(numbers)}. {line}" for line in document) for document in documents_of(language, 300, 1)
        ]
        (text / f"{language}.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    scripts = Scripts(tmp_path, DATA=str(data), OUT=str(out), UPDATES="2", EXPERTS="4")
    flags = ["--source", "text", str(text), "--langs", ",".join(LANGUAGES), "--vocab-size", "600"]
    scripts.run(f"{RECIPES}/prepare.sh", str(data), *flags, "--valid-fraction", "0.2", "--test-fraction", "0.2")

    trained = scripts.run(f"{RECIPES}/mhmoe.sh")
    assert f"{NAME}: training, 2 updates" in trained and "update 2: validation perplexity" in trained
    scripts.run(f"{RECIPES}/eval.sh", NAME)
    figures = json.loads((out / NAME / "eval-test.json").read_text(encoding="utf-8"))
    assert sorted(figures["languages"]) == LANGUAGES
    assert figures["total"]["tokens"] == sum(language["tokens"] for language in figures["languages"].values())
    report = (out / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| ([a-z]{2}) +\|", report, re.MULTILINE) == LANGUAGES
    assert "7.19" in report  # the paper's X-MoE with 8 experts, in several languages

    fine_tune(scripts, tmp_path, data)
    table = (out / "finetuned" / NAME / "accuracy.txt").read_text(encoding="utf-8")
    assert "test_de" in table and "test_en" in table

    if find_spec("lm_eval") is None:  # an extra, which zero-shot XNLI alone needs
        return
    xnli = tmp_path / "xnli"
    xnli.mkdir()
    for language in ("de", "en"):
        premise, hypothesis = (documents_of(language, 1, seed)[0][0] for seed in (8, 9))
        lines = [json.dumps({"premise": premise, "hypothesis": hypothesis, "label": label}) for label in (0, 1, 2)]
        (xnli / f"{language}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    scripts.run(f"{RECIPES}/xnli.sh", NAME, XNLI=str(xnli))
    assert (out / "xnli" / "results.json").is_file()


def fine_tune(scripts: Scripts, folder: Path, language_model_data: Path) -> None:
    """Prepare labelled sentences in two languages, and run the recipe on them."""
    files = {}
    for split, language, seed in (("train", "en", 3), ("valid", "en", 4), ("test", "de", 5), ("test", "en", 6)):
        lines = ["1", "22", *(document[0] for document in documents_of(language, 12, seed))]
        rows = [{"text": line, "label": ("even", "odd")[len(line) % 2]} for line in lines]
        file = write_jsonl(folder / f"labelled-{split}-{language}.jsonl", rows)
        files.setdefault(f"--{split}", []).append(f"{language}={file}")
    words = [word for flag, given in files.items() for word in (flag, *given)]
    flags = ["--text-fields", "text", "--data", language_model_data, "--dest", folder / "labelled"]
    assert prepare(*words, *flags) == 0
    scripts.run(f"{RECIPES}/finetune.sh", NAME, CLASSIFICATION=str(folder / "labelled"))
