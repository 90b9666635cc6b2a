"""The recipes for several languages at toy size: prepare, train, evaluate by language, report, zero-shot XNLI."""

from __future__ import annotations

import itertools
import json
import re
from importlib.util import find_spec
from pathlib import Path

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
