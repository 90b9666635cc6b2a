"""What all kinds of ``mhmoe prepare`` have in common: bad flags, sources by name, settings that tell folders apart."""

from dataclasses import fields, replace

import pytest
from image_text_data import shape_settings

from mhmoe_fairseq.common.files import read_json
from mhmoe_fairseq.data.documents import Document
from mhmoe_fairseq.prepare.classification import ClassificationSettings
from mhmoe_fairseq.prepare.english import EnglishSettings
from mhmoe_fairseq.prepare.image_text.derived import DerivedSettings
from mhmoe_fairseq.prepare.multilingual.cleaning import MultilingualSettings
from mhmoe_fairseq.prepare.sources.base import ENGLISH_SOURCES, Source, SourceKind
from mhmoe_fairseq.prepare.visual_tokenizers.settings import KMeansSettings


@pytest.mark.parametrize(
    "kind, arguments, message",
    [
        ("english", "--source bible", "--source bible: must be one of brown, web-bible, "),
        ("english", "--source text", "--source text: needs at least one file after it, got none"),
        ("english", "--source brown x.txt", "--source brown: takes nothing after it, got x.txt"),
        ("english", "--source text missing.txt", "--source text: no such file: missing.txt"),
        ("english", "--source torchscale-shards missing", "-shards: no such file: missing/json/valid.json"),
        ("english", "--vocab-size 12", "--vocab-size 12: must be at least 261"),
        ("english", "--valid-fraction 2", "--valid-fraction (2) must be in [0, 1)"),
        ("english", "--tokenizer-lines 0", "--tokenizer-lines (0) must be at least 1"),
        ("english", "--tokenizer tiktoken", "--tokenizer tiktoken: needs --tiktoken-ranks FILE"),
        ("english", f"--tiktoken-ranks {__file__}", "--tiktoken-ranks: has no meaning without --tokenizer tiktoken"),
        ("english", "--tokenizer tiktoken --tiktoken-ranks r", "--tiktoken-ranks (r) does not exist"),
        ("english", "--source docstrings --docstring-packages none", "--docstring-packages: none is not installed"),
        ("multilingual", "--langs de,xx", "--langs xx: no such language; known are ar, bg"),
        ("multilingual", "--langs de,de", "--langs de: given twice"),
        ("multilingual", "--source wiki", "--source wiki: must be one of debian-docs, text, jsonl"),
        ("multilingual", "--source text", "--source text: needs one folder after it, got none"),
        ("multilingual", "--source text a b", "--source text: needs one folder after it, got a b"),
        ("multilingual", "--source debian-docs a", "--source debian-docs: takes nothing after it, got a"),
        ("multilingual", "--source text missing", "--source text missing: no such folder"),
        ("multilingual", "--debian-families kde", "--debian-families kde: must be one of mediawiki, "),
        ("multilingual", "--max-mb-per-language -1", "--max-mb-per-language (-1) must be at least 0"),
        ("multilingual", "--vocab-sampling-alpha 2", "--vocab-sampling-alpha (2) must be in [0, 1]"),
        ("multilingual", "--tokenizer tiktoken", "--tokenizer tiktoken: needs --tiktoken-ranks FILE"),
        ("multilingual", "--valid-fraction 0.6 --test-fraction 0.5", "their sum must be below 1"),
        ("image-text", "--source coco", "--source coco: must be one of folder, beit3-index, emoji, tuxpaint"),
        ("image-text", "--source folder", "--source folder: needs one folder after it, got none"),
        ("image-text", "--source emoji x", "--source emoji: takes nothing after it, got x"),
        ("image-text", "--valid-fraction 0", "--valid-fraction (0) must be in (0, 1)"),
        ("image-text", "--test-fraction 1", "--test-fraction (1) must be in (0, 1)"),
        ("image-text", "--vocab-size 100", "--vocab-size 100: must be at least 261"),
        ("image-text", "--visual-vocab-size 1", "--visual-vocab-size (1) must be at least 2"),
        ("image-text", "--image-size 60", "--image-size 60: must be a multiple of --patch-size 16"),
        ("image-text", "--langs ,", "--langs ',': must name at least one language"),
        ("image-text", "--statements 0", "--statements (0) must be at least 1"),
        ("image-text", "--min-answer-count 0", "--min-answer-count (0) must be at least 1"),
        ("image-text", "--text-data nowhere", "--text-data (nowhere) does not exist"),
        ("image-text", "--source folder nowhere", "--source folder nowhere: no such folder"),
    ],
)
def test_bad_flags_are_one_line_before_any_work(mhmoe_prepare, tmp_path, monkeypatch, kind, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = mhmoe_prepare(kind, "--dest", tmp_path / "d", *arguments.split())
    assert status == 2 and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_new_source_is_one_entry(mhmoe_prepare, tmp_path, monkeypatch, sentences):
    class Spoken(Source):
        name, licence, unit, held_out = "spoken", "none needed", "line = sentence", 0.2

        def __init__(self, count):
            self.count = count

        def identity(self):
            return {"count": self.count}

        def open(self, cache_dir, say):
            return {}, (Document(line, [line]) for line in sentences(self.count))

    count = {"type": int, "default": 50, "help": "for spoken"}
    kind = SourceKind(lambda args: Spoken(args.spoken_count), flags={"--spoken-count": count})
    monkeypatch.setitem(ENGLISH_SOURCES, "spoken", kind)
    arguments = ("english", "--source", "spoken", "--dest", tmp_path / "d", "--vocab-size", 300, "--spoken-count")
    status, out, err = mhmoe_prepare(*arguments, 60)
    assert (status, err) == (0, "") and "clean: 60 documents" in out
    assert "another --source count (60, now 61)" in mhmoe_prepare(*arguments, 61)[2]
    kept = read_json(tmp_path / "d" / "manifest.json")["settings"]
    assert (kept["valid_fraction"], kept["test_fraction"]) == (0.2, 0.2)  # as the source says, unless the user does
    assert "another --valid-fraction (0.2, now 0.1)" in mhmoe_prepare(*arguments, 60, "--valid-fraction", 0.1)[2]


OTHERS = {
    str: "other", int: 7, float: 0.125, bool: True, tuple: ("ru",), list: ["other"], DerivedSettings: None,
    KMeansSettings: None, type(None): ("a", "b"),
}  # fmt: skip
SETTINGS = (
    EnglishSettings(),
    MultilingualSettings(languages=("de",), filter_lines=False),
    shape_settings(),
    ClassificationSettings(["text"], "label", "language"),
)


@pytest.mark.parametrize(
    "settings, name",
    [(settings, field.name) for settings in SETTINGS for field in fields(settings)],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_every_setting_tells_preparations_apart(tmp_path, settings, name):
    other = OTHERS[type(getattr(settings, name))]
    if name in ("tiktoken_ranks", "text_data"):
        for file in ("train", "valid", "test"):
            (tmp_path / f"{file}.txt").write_text(file)
        other = tmp_path / "train.txt" if name == "tiktoken_ranks" else tmp_path
    assert replace(settings).identity() == settings.identity() != replace(settings, **{name: other}).identity()
