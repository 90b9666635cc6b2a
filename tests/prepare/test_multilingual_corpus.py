"""Cleaning, holding out, capping and aligning the passages of several languages."""

import json
from collections import Counter

import pytest

from mhmoe_fairseq.data.languages import get_language
from mhmoe_fairseq.prepare.multilingual.cleaning import (
    LanguageCorpus,
    MultilingualSettings,
    english_lines,
    steps_within,
)
from mhmoe_fairseq.prepare.multilingual.pipeline import language_shares, sample_lines, write_aligned
from mhmoe_fairseq.prepare.sources.base import Passage, read_passages, write_passages
from mhmoe_fairseq.prepare.splits import position, split_of


def settings(valid=0.2, test=0.2, filter_lines=True, **others):
    return MultilingualSettings(
        languages=("de",), valid_fraction=valid, test_fraction=test, filter_lines=filter_lines, **others
    )


def split_by_key(unit):
    return split_of(unit, 1, settings().shares)


def passages(word, count=200):
    """Messages by key, ten in a document, one line each."""
    for number in range(count):
        yield "ui", Passage(f"file{number // 10}", f"m{number}", [f"{word} Nummer {number}"], f"m{number}")


def make(folder, code, pairs, english=None, **changes):
    return LanguageCorpus(get_language(code), folder, settings(**changes)).make(pairs, english or {})


def text(folder, code, split):
    return (folder / "text" / code / f"{split}.txt").read_text(encoding="utf-8")


def lines(folder, code, split):
    return [line for line in text(folder, code, split).splitlines() if line]


def test_hashes_are_uniform_and_fixed():
    positions = [position(1, "split", f"unit {number}") for number in range(4000)]
    assert 0 <= min(positions) and max(positions) < 1 and abs(sum(positions) / 4000 - 0.5) < 0.02
    assert position(1, "split", "a") == pytest.approx(0.5975018, abs=1e-7)  # the same in every session and version
    assert len({position(1, "split", "a"), position(2, "split", "a"), position(1, "cap", "a")}) == 3


def test_shares_of_the_parts():
    splits = Counter(split_by_key(f"unit {number}") for number in range(4000))
    assert splits["train"] / 4000 == pytest.approx(0.6, abs=0.03)
    assert splits["valid"] / 4000 == pytest.approx(0.2, abs=0.03)
    assert settings(0.0, 0.5).splits == ["train", "test"]


def test_the_same_keys_are_held_out_in_every_language(tmp_path):
    make(tmp_path, "de", passages("Eintrag"))
    make(tmp_path, "ru", list(passages("Запись номер"))[::2])
    for split in ("train", "valid", "test"):
        german = {line.rsplit(" ", 1)[1] for line in lines(tmp_path, "de", split)}
        russian = {line.rsplit(" ", 1)[1] for line in lines(tmp_path, "ru", split)}
        assert russian == {number for number in german if int(number) % 2 == 0} and russian


def test_documents_are_apart_and_in_order(tmp_path):
    make(tmp_path, "de", passages("Eintrag"))
    documents = [document.splitlines() for document in text(tmp_path, "de", "train").split("\n\n")]
    numbers = [[int(line.rsplit(" ", 1)[1]) for line in document] for document in documents]
    assert [{number // 10 for number in document} for document in numbers] == [{number} for number in range(20)]
    assert sum(numbers, []) == sorted(sum(numbers, []))


def test_a_repeated_line_stays_in_the_held_out_part(tmp_path):
    unit_of = {split_by_key(f"ui:u{number}"): f"u{number}" for number in range(50)}
    units = [unit_of[split] for split in ("train", "valid", "test")]
    repeated = "Dieselbe Zeile überall."
    pairs = [("ui", Passage("d", unit, [repeated, f"Zeile von {unit} allein"], unit)) for unit in units]
    record = make(tmp_path, "de", pairs)
    assert [len(lines(tmp_path, "de", split)) for split in ("train", "valid", "test")] == [1, 1, 2]
    assert record["lines"]["duplicate_lines"] == 2
    assert [len(list(read_passages(tmp_path / f"held-out/de/{split}.jsonl"))) for split in ("valid", "test")] == [0, 1]


def test_untranslated_lines_are_told_by_the_english_of_the_same_family(tmp_path):
    english = english_lines([("ui", Passage("d", "a", ["LibreOffice  Impress", "Save now"], None))])
    pairs = [
        ("ui", Passage("d", "a", ["LibreOffice Impress"], "a")),
        ("help", Passage("d", "a", ["LibreOffice Impress"], "a")),
        ("ui", Passage("d", "b", ["Jetzt speichern", "OK"], "b")),
    ]
    record = make(tmp_path, "de", pairs, english, valid=0, test=0)
    assert lines(tmp_path, "de", "train") == ["LibreOffice Impress", "Jetzt speichern"]
    assert record["lines"]["english_lines"] == record["lines"]["short_lines"] == 1
    assert record["bytes_by_family"] == {"help": 20, "ui": 16}
    make(tmp_path, "de", pairs, english, valid=0, test=0, filter_lines=False)
    assert lines(tmp_path, "de", "train") == ["LibreOffice Impress", "Jetzt speichern", "OK"]


def test_a_passage_that_lost_a_line_is_not_aligned(tmp_path):
    texts = {"a": ["Erste Zeile", "OK"], "b": ["Ganze Zeile"]}
    pairs = [("ui", Passage("d", unit, text, unit)) for unit, text in texts.items()]
    make(tmp_path, "de", pairs, valid=1 - 1e-9, test=0)
    assert [passage.key for passage in read_passages(tmp_path / "held-out/de/valid.jsonl")] == ["ui:b"]


def test_the_cap_leaves_out_the_same_units(tmp_path):
    full = make(tmp_path / "full", "de", passages("Eintrag"))["bytes_by_family"]["ui"]
    for limit in (0.25, 0.5):
        capped = make(tmp_path / str(limit), "de", passages("Eintrag"), max_mb_per_language=limit * full / 1e6)
        assert 0.8 * limit * full < capped["bytes_by_family"]["ui"] <= limit * full
        assert capped["lines"]["lines_beyond_the_cap"] > 0
    kept = [set(lines(tmp_path / name, "de", "train")) for name in ("0.25", "0.5", "full")]
    assert kept[0] < kept[1] < kept[2]
    held_out = [(tmp_path / name / "held-out/de/test.jsonl").read_bytes() for name in ("0.25", "full")]
    assert held_out[0] == held_out[1]


def test_a_cap_below_everything_keeps_something():
    assert [steps_within([10**6, 5, 0, 5], most) for most in (10, 10**6, 10**6 + 5, 10**6 + 10)] == [1, 1, 3, 4]
    assert steps_within([0, 0, 10**6, 5], 10) == 3 and steps_within([0, 0], 10) == 2


def test_aligned_needs_two_languages(tmp_path):
    for code, keys in (("de", "abc"), ("fr", "bc"), ("ru", "d")):
        found = [Passage("d", key, [f"{code} {key}", "zwei"], key) for key in keys]
        write_passages(found, tmp_path / f"{code}.jsonl")
    files = {code: tmp_path / f"{code}.jsonl" for code in ("de", "fr", "ru")}
    counts = write_aligned(files, tmp_path / "test.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert rows == [{"key": key, "text": {"de": f"de {key} zwei", "fr": f"fr {key} zwei"}} for key in "bc"]
    assert counts == {"keys": 2, "de": 2, "fr": 2}


def test_shares_follow_the_temperature():
    sizes = {"de": 900, "sw": 100}
    assert language_shares(sizes, 1.0) == pytest.approx({"de": 0.9, "sw": 0.1})
    assert language_shares(sizes, 0.5) == pytest.approx({"de": 0.75, "sw": 0.25})
    assert language_shares(sizes, 0.0) == pytest.approx({"de": 0.5, "sw": 0.5})


def test_lines_are_drawn_at_their_rate(tmp_path):
    for code in ("de", "sw"):
        (tmp_path / code).write_text("".join(f"{code} {number}\n\n" for number in range(1000)))
    texts = {code: tmp_path / code for code in ("de", "sw")}
    drawn = Counter(sample_lines(texts, {"de": 0.3, "sw": 2.5}, seed=1))
    assert sum(count for line, count in drawn.items() if line.startswith("de")) == pytest.approx(300, abs=50)
    swahili = Counter(count for line, count in drawn.items() if line.startswith("sw"))
    assert set(swahili) == {2, 3} and swahili[3] == pytest.approx(500, abs=60)
    assert drawn == Counter(sample_lines(texts, {"de": 0.3, "sw": 2.5}, seed=1))
