"""Reading a user's copy of XNLI in its various layouts, and what is said about a broken one."""

import json
from pathlib import Path

import pytest

from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.commands.zero_shot import name_models
from mhmoe_fairseq.data.xnli import read_xnli

ROWS = {
    "en": [
        ("The river waits.", "A river.", "entailment"),
        ("A man.", "A dog.", "contradiction"),
        ("x", "y", "neutral"),
    ],
    "de": [("Der Fluss wartet.", "Ein Fluss.", "entailment"), ("Ein Mann.", "Ein Hund.", "contradiction")],
}
IDS = {"entailment": 0, "neutral": 1, "contradiction": 2}


def write_lines(path: Path, rows: list[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def official_tsv(path: Path) -> None:
    """With more columns than are read, as the official files have."""
    header = "language\tgold_label\tsentence1_binary_parse\tsentence1\tsentence2\tpromptID"
    rows = [f"{code}\t{label}\t\t{one}\t{two}\t7" for code in ROWS for one, two, label in ROWS[code]]
    write_lines(path, [header, *rows])


def official_jsonl(path: Path) -> None:
    write_lines(path, [
        {"language": code, "gold_label": label, "sentence1": one, "sentence2": two, "match": "True"}
        for code in ROWS for one, two, label in ROWS[code]
    ])  # fmt: skip


def per_language(pattern: str):
    """JSON lines as lm-eval's data set has them: labels are 0, 1, 2."""

    def write(folder: Path) -> None:
        for code, rows in ROWS.items():
            lines = [{"premise": one, "hypothesis": two, "label": IDS[label]} for one, two, label in rows]
            write_lines(folder / pattern.format(code), lines)

    return write


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: official_tsv(folder / "xnli.dev.tsv"),
        lambda folder: official_jsonl(folder / "xnli.dev.jsonl"),
        lambda folder: official_jsonl(folder / "dev.jsonl"),
        per_language("{}/validation.jsonl"),
        per_language("xnli_{}.jsonl"),
        per_language("{}.jsonl"),
    ],
)
def test_every_layout_gives_the_same_examples(tmp_path, write):
    write(tmp_path)
    sets = read_xnli(tmp_path, "validation")
    assert [one.code for one in sets] == ["de", "en"]
    for one in sets:
        expected = [{"premise": a, "hypothesis": b, "label": IDS[label]} for a, b, label in ROWS[one.code]]
        assert list(one.examples) == expected and len(one.sha256) == 64


def test_splits_and_languages_are_chosen(tmp_path):
    official_tsv(tmp_path / "xnli.test.tsv")
    assert [one.code for one in read_xnli(tmp_path, "test", ["de"])] == ["de"]
    with pytest.raises(
        ValueError, match=r"no XNLI validation file in it; looked for xnli.dev.tsv, xnli.dev.jsonl, de/"
    ):
        read_xnli(tmp_path, "validation")
    with pytest.raises(ValueError, match=r"xnli.test.tsv: no example of fr"):
        read_xnli(tmp_path, "test", ["fr"])


def test_a_file_without_examples_hides_no_other_and_is_named(tmp_path):
    per_language("{}.jsonl")(tmp_path)
    (tmp_path / "de.jsonl").write_text("\n")
    (tmp_path / "de.tsv").write_text("premise\thypothesis\tlabel\na\tb\t1\n")
    official_jsonl(tmp_path / "xnli.dev.jsonl")
    de, en = read_xnli(tmp_path, "validation")
    assert (de.path.name, de.examples) == ("de.tsv", ({"premise": "a", "hypothesis": "b", "label": 1},))
    assert {Path(name).name: why for name, why in de.left_out.items()} == {
        "de.jsonl": "no example of de in it", "xnli.dev.jsonl": f"{tmp_path / 'de.tsv'} is read",
    }  # fmt: skip
    assert en.path.name == "en.jsonl" and list(en.left_out) == [str(tmp_path / "xnli.dev.jsonl")]


@pytest.mark.parametrize("tag", ["zh", "zh-Hans", "zh_CN", "ZH"])
def test_chinese_is_chinese_however_it_is_written(tmp_path, tag):
    row = {"language": tag, "gold_label": "neutral", "sentence1": "a", "sentence2": "b"}
    write_lines(tmp_path / "xnli.dev.jsonl", [row, {**row, "language": "en", "sentence1": "c"}])
    assert [one.code for one in read_xnli(tmp_path, "validation")] == ["en", "zh"]


GOOD = {"premise": "a b", "hypothesis": "c d", "label": 1}


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("de.jsonl", [GOOD, {"premise": "a", "label": 1}], "de.jsonl:2: no field 'hypothesis'; it has premise, label"),
        ("de.jsonl", [{"text": "a"}], "de.jsonl:1: no field 'premise'; it has text"),
        (
            "de.jsonl",
            [GOOD, {**GOOD, "label": 3}],
            "de.jsonl:2: field 'label' is '3', must be one of entailment, neutral,",
        ),
        ("de.jsonl", [{**GOOD, "label": "maybe"}], "de.jsonl:1: field 'label' is 'maybe'"),
        ("de.jsonl", [{**GOOD, "label": None}], "de.jsonl:1: field 'label' is null"),
        ("de.jsonl", [{**GOOD, "premise": ""}], "de.jsonl:1: field 'premise' has no text"),
        ("de.jsonl", [GOOD, '{"premise": '], "de.jsonl:2: not valid JSON"),
        ("de.jsonl", ["[1, 2]"], "de.jsonl:1: needs a JSON object"),
        ("de.jsonl", ["oops"], "de.jsonl:1: not valid JSON"),
        ("de.jsonl", [], "de.jsonl: no example of de"),
        ("de.tsv", ["premise\thypothesis\tlabel", "a\tb"], "de.tsv:2: 2 fields, but the first line names 3"),
        ("de.tsv", ["premise\tlabel", "a\t1"], "de.tsv:1: no field 'hypothesis'; the first line names premise, label"),
        (
            "xnli.dev.tsv",
            ["gold_label\tsentence1\tsentence2", "neutral\ta\tb"],
            "xnli.dev.tsv:1: no field 'language'; the first line names gold_label, sentence1, sentence2",
        ),
    ],
)
def test_broken_files_are_one_clear_line(tmp_path, name, rows, message, capsys):
    """Through the command, with a folder without a checkpoint: the files come first."""
    pytest.importorskip("lm_eval", reason="lm-eval is an optional package")
    write_lines(tmp_path / name, rows)
    arguments = ["--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["zero-shot", "xnli", "--xnli-dir", str(tmp_path), "--langs", "de", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mhmoe zero-shot: error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_two_languages_with_the_same_examples(tmp_path):
    for code in ("de", "fr"):
        write_lines(tmp_path / f"{code}.jsonl", [GOOD])
    with pytest.raises(ValueError, match=r"de.jsonl and .*fr.jsonl: the same examples for de and fr"):
        read_xnli(tmp_path, "validation")


def test_models_are_named_by_what_tells_them_apart():
    def names(*paths):
        return name_models([Path(path) for path in paths])

    assert names("/runs/dense/checkpoint_best.pt", "/runs/mhmoe") == ["dense", "mhmoe"]
    assert names("/runs/dense/seed-1/a.pt", "/runs/mhmoe/seed-1/a.pt") == ["dense/seed-1", "mhmoe/seed-1"]
    assert names("/runs/dense/a.pt", "/runs/dense/b.pt") == ["a.pt", "b.pt"]
    with pytest.raises(ValueError, match="--checkpoint: one is given twice in /runs/x /runs/y/../x"):
        names("/runs/x", "/runs/y/../x")


def test_bad_flags(tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is an optional package")
    write_lines(tmp_path / "de.jsonl", [GOOD])
    for words, message in (
        (["--langs", "de,xx"], "--langs xx: no such language"),
        (["--langs", "de,fr"], "--langs fr: no XNLI validation file for it in"),
        (["--limit", "0"], "--limit (0) must be at least 1"),
        (["--xnli-dir", str(tmp_path / "none")], "none) does not exist"),
        (["--checkpoint", str(tmp_path), str(tmp_path)], f"--checkpoint: one is given twice in {tmp_path} {tmp_path}"),
        (["--out", str(tmp_path / "out")], f"no model.pt or checkpoint_best.pt or checkpoint_last.pt in {tmp_path}"),
    ):
        assert main(["zero-shot", "xnli", "--checkpoint", str(tmp_path), "--xnli-dir", str(tmp_path), *words]) == 2
        assert message in capsys.readouterr().err
