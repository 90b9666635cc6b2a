"""``mhmoe prepare multilingual`` from the command line to a folder that fairseq loads."""

import functools
import gzip
import json
import random
import re
import stat

import pytest
from preparing import hashes, prepare_interrupted, visible

from mhmoe_fairseq.common.files import read_json
from mhmoe_fairseq.data.languages import XNLI_LANGUAGES, language_symbol
from mhmoe_fairseq.prepare.multilingual.cleaning import MultilingualSettings
from mhmoe_fairseq.prepare.multilingual.pipeline import MultilingualPreparation
from mhmoe_fairseq.prepare.sources.debian_docs import DebianDocs
from mhmoe_fairseq.prepare.sources.own_text import jsonl_folder, text_folder

WORDS = {
    "de": "der die Katze Hund Haus läuft schläft unter über neben großen kleinen Baum Fluss Straße".split(),
    "en": "the a cat dog house runs sleeps under over beside large small tree river street".split(),
    "ru": "кот пёс дом бежит спит под над возле большим малым деревом рекой улица сад поле".split(),
    "th": "แมว สุนัข บ้าน วิ่ง นอน ใต้ เหนือ ข้าง ใหญ่ เล็ก ต้นไม้ แม่น้ำ ถนน สวน ทุ่ง".split(),
}
SMALL = ["--vocab-size", 380, "--valid-fraction", 0.1, "--test-fraction", 0.1]


def sentence(code, number):
    """The same words by index in every language, two made one, so that equal numbers are translations."""
    rng = random.Random(number)
    words = rng.choices(WORDS[code], k=10)
    return " ".join(first + second for first, second in zip(words[::2], words[1::2])) + f" {number}"


@pytest.fixture
def jsonl(tmp_path):
    """``DIR/CODE.jsonl``: 120 keyed documents of two lines in three languages, 60 of them in the fourth."""
    folder = tmp_path / "jsonl"
    folder.mkdir()
    for code in WORDS:
        rows = [
            {"key": f"doc{number}", "text": f"{sentence(code, number)}\n{sentence(code, number + 1000)}"}
            for number in range(60 if code == "th" else 120)
        ]
        (folder / f"{code}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder


@pytest.fixture
def run(mhmoe_prepare):
    """``mhmoe prepare multilingual``, see ``mhmoe_prepare``."""
    return functools.partial(mhmoe_prepare, "multilingual")


@pytest.mark.parametrize("name", ["text", "jsonl"])
def test_all_files_of_a_language_are_read_and_the_others_named(tmp_path, name):
    (tmp_path / "de" / "more").mkdir(parents=True)
    suffix, other = {"text": ("txt", "jsonl"), "jsonl": ("jsonl", "txt")}[name]
    texts = {f"de.{suffix}": "eins", f"de/a.{suffix}": "zwei", f"de/a.{suffix}.gz": "drei"}
    for path, text in texts.items():
        content = (text if name == "text" else json.dumps({"text": text})).encode()
        (tmp_path / path).write_bytes(gzip.compress(content) if path.endswith(".gz") else content)
    for path in (f"de.{other}", "de/notes.md", f"de/more/b.{suffix}"):
        (tmp_path / path).write_text("vier")
    folder = text_folder(tmp_path, "blank-line") if name == "text" else jsonl_folder(tmp_path, "text", "key")
    said = []
    corpus = folder.open(["de"], tmp_path / "made", lambda *_: None, tmp_path, said.append)
    assert [passage.lines for _, passage in corpus.passages("de")] == [["eins"], ["zwei"], ["drei"]]
    assert len(folder.identity(["de"])["inputs"]["de"]) == 3
    [(reason, names)] = corpus.provenance["left_out"].items()
    assert names == [f"de.{other}", f"de/more/b.{suffix}", "de/notes.md"] and f"de/*.{suffix}.gz" in reason
    assert said == [f"left out: {name}: {', '.join(names)}: {reason}"]


def test_json_lines_to_data_that_fairseq_loads(run, tmp_path, jsonl):
    from fairseq.data import Dictionary, data_utils

    from mhmoe_fairseq.data.vocabularies import SentencePieceVocabulary

    dest = tmp_path / "data"
    arguments = ["--source", "jsonl", jsonl, "--langs", "de,en,ru,th", "--dest", dest, *SMALL]
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    names = "aligned de dict.txt en manifest.json ru sentencepiece.model spot_check.json text th"
    assert visible(dest) == names.split()
    dictionary = Dictionary.load(str(dest / "dict.txt"))
    symbols = [language_symbol(code) for code in XNLI_LANGUAGES]
    assert dictionary.symbols[380:395] == symbols and len(dictionary) == 400
    assert {dictionary.count[dictionary.index(symbol)] for symbol in symbols} == {0}
    vocabulary = SentencePieceVocabulary(dest / "sentencepiece.model")
    manifest = read_json(dest / "manifest.json")
    for code in WORDS:
        dataset = data_utils.load_indexed_dataset(str(dest / code / "valid"), dictionary, "mmap")
        text = (dest / "text" / code / "valid.txt").read_text(encoding="utf-8").splitlines()
        assert [dataset[index].tolist()[:-1] for index in range(len(dataset))] == vocabulary.encode_lines(text)
        counts = manifest["languages"][code]["splits"]["valid"]
        assert counts["tokens"] == dataset.sizes.sum() and counts["unknown_tokens"] == 0
        assert counts["chars"] == sum(len(line) + 1 for line in text)
        assert counts["documents"] == text.count("") + 1 and counts["lines"] == len(text) - text.count("")
        assert manifest["languages"][code]["sources"] == [f"{code}.jsonl"]
    assert sum(dictionary.count[4:380]) == sum(
        one["splits"]["train"]["tokens"] - one["splits"]["train"]["lines"] - one["splits"]["train"]["documents"] + 1
        for one in manifest["languages"].values()
    )
    before = hashes(dest)
    assert "nothing to do" in run(*arguments)[1] and hashes(dest) == before


def test_tiktoken_ranks_serve_all_languages(run, tmp_path, jsonl, byte_ranks):
    pytest.importorskip("tiktoken", reason="tiktoken is an extra")
    from fairseq.data import Dictionary, data_utils

    from mhmoe_fairseq.data.vocabularies import TiktokenVocabulary

    dest = tmp_path / "data"
    arguments = ["--source", "jsonl", jsonl, "--langs", "de,th", "--dest", dest]
    tokenizer = ["--tokenizer", "tiktoken", "--tiktoken-ranks", byte_ranks]
    status, out, err = run(*arguments, *tokenizer)
    assert (status, err) == (0, "") and "vocabulary:" not in out
    assert visible(dest) == "aligned de dict.txt manifest.json ranks.tiktoken spot_check.json text th".split()
    dictionary = Dictionary.load(str(dest / "dict.txt"))
    assert dictionary.symbols[4 + 258 :][:15] == [language_symbol(code) for code in XNLI_LANGUAGES]
    for code in ("de", "th"):
        dataset = data_utils.load_indexed_dataset(str(dest / code / "valid"), dictionary, "mmap")
        text = (dest / "text" / code / "valid.txt").read_text(encoding="utf-8").splitlines()
        assert TiktokenVocabulary(byte_ranks).decode(map(int, dictionary.string(dataset[0]).split())) == text[0]
    assert "nothing to do" in run(*arguments, *tokenizer)[1]
    assert "tiktoken_ranks" in run(*arguments, *SMALL)[2]


def test_aligned_text_is_held_out_and_the_same_in_all_languages(run, tmp_path, jsonl):
    dest = tmp_path / "data"
    assert run("--source", "jsonl", jsonl, "--langs", "de,en,ru,th", "--dest", dest, *SMALL)[0] == 0
    for split in ("valid", "test"):
        rows = [json.loads(line) for line in (dest / "aligned" / f"{split}.jsonl").read_text().splitlines()]
        assert rows and {len(row["text"]) for row in rows} == {3, 4}
        for row in rows:
            number = int(row["key"].removeprefix("jsonl:doc"))
            for code, text in row["text"].items():
                assert text == f"{sentence(code, number)} {sentence(code, number + 1000)}"
                assert sentence(code, number) in (dest / "text" / code / f"{split}.txt").read_text().splitlines()
                assert sentence(code, number) not in (dest / "text" / code / "train.txt").read_text().splitlines()
        recorded = read_json(dest / "manifest.json")["aligned"][split]
        assert recorded["keys"] == len(rows) == recorded["de"] > recorded["th"] > 0


def test_a_language_is_the_same_whichever_others_are_prepared(run, tmp_path, jsonl):
    for name, langs in (("all", "de,en,ru,th"), ("two", "th,de")):
        arguments = ["--source", "jsonl", jsonl, "--langs", langs, "--dest", tmp_path / name, *SMALL]
        assert run(*arguments)[0] == 0
    for split in ("train", "valid", "test"):
        name = f"text/de/{split}.txt"
        assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_plain_text_is_split_by_document_and_not_aligned(run, tmp_path):
    source, dest = tmp_path / "text", tmp_path / "data"
    (source / "ru").mkdir(parents=True)
    for name, start in (("a.txt", 0), ("b.txt", 60)):
        documents = [f"{sentence('ru', number)}\nOK" for number in range(start, start + 60)]
        (source / "ru" / name).write_text("\n\n".join(documents), encoding="utf-8")
    (source / "de.txt").write_text("\n\n".join(sentence("de", number) for number in range(120)), encoding="utf-8")
    arguments = ["--source", "text", source, "--langs", "ru,de", "--dest", dest, *SMALL]
    assert run(*arguments, "--max-mb-per-language", 0.006)[0] == 0
    manifest = read_json(dest / "manifest.json")
    assert "aligned" not in visible(dest) and manifest["aligned"].startswith("none: no text has a key")
    assert manifest["languages"]["ru"]["sources"] == ["a.txt", "b.txt"]
    empty_lines = 100  # at most, between documents: the cap is on the text
    assert sum(split["bytes"] for split in manifest["languages"]["ru"]["splits"].values()) < 6000 + empty_lines
    assert manifest["languages"]["ru"]["cleaning"]["lines"].keys() == {
        "lines_read", "empty_lines", "duplicate_lines", "lines_beyond_the_cap",
    }  # fmt: skip
    status, _, _ = run(*arguments, "--line-filter", "on", "--overwrite")
    assert status == 0
    assert read_json(dest / "manifest.json")["languages"]["ru"]["cleaning"]["lines"]["short_lines"] == 120


def write_debian_packages(make_deb, make_catalogue):
    """MediaWiki in four languages, an emoji name in German, LibreOffice's German catalogue; the folder they are in."""
    messages = {code: {f"message-{number}": sentence(code, number) for number in range(80)} for code in WORDS}
    messages["de"]["message-7"] = messages["en"]["message-7"]
    messages["ru"]["message-8"] = "Latin words only are not Russian"
    files = {f"mediawiki/languages/i18n/{code}.json": json.dumps(texts) for code, texts in messages.items()}
    make_deb("mediawiki", files)
    name = '<annotation cp="🐤" type="tts">Katze Hund</annotation>'
    make_deb("unicode-cldr-core", {"x/common/annotations/de.xml": name})
    pairs = {f"d{number}|x\x04{sentence('en', 2000 + number)}": sentence("de", 2000 + number) for number in range(80)}
    catalogue = make_catalogue(pairs)
    return make_deb("libreoffice-l10n-de", {"x/resource/de/LC_MESSAGES/sw.mo": catalogue}).parent


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """Programs called apt-cache and apt-get that know no package; the folder they are in."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("apt-cache", "apt-get"):
        program = folder / name
        program.write_text("#!/bin/sh\necho 'E: No packages found' >&2\nexit 100\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_debian_packages_and_what_is_missing(run, tmp_path, apt, make_deb, make_catalogue):
    cache, dest = write_debian_packages(make_deb, make_catalogue), tmp_path / "data"
    arguments = ["--langs", "de,ru", "--cache-dir", cache, "--dest", dest, *SMALL]
    families = ["--debian-families", "mediawiki", "emoji", "lo-ui", "manpages", "d-i-guide"]
    status, out, err = run(*arguments, *families)
    assert (status, err) == (0, "")
    assert "missing: ru has no lo-ui: not in this suite: libreoffice-l10n-ru" in out
    assert "missing: de has no manpages: not in this suite: manpages-de" in out
    manifest = read_json(dest / "manifest.json")
    assert manifest["languages"]["de"]["sources"] == ["mediawiki", "emoji", "lo-ui"]
    assert manifest["languages"]["ru"]["missing"].keys() == {"emoji", "lo-ui", "manpages", "d-i-guide"}
    families = manifest["source"]["families"]
    assert families["mediawiki"]["licence"] == "GPL-2+" and families["manpages"]["packages"] == []
    assert families["mediawiki"]["packages"][0]["version"] == "1.0-1"
    assert len(families["mediawiki"]["packages"][0]["archive_sha256"]) == 64
    german = "".join((dest / "text" / "de" / f"{split}.txt").read_text() for split in ("train", "valid", "test"))
    assert sentence("en", 7) not in german and sentence("de", 9) in german and "Katze Hund" in german
    assert sentence("de", 2003) in german
    russian = "".join((dest / "text" / "ru" / f"{split}.txt").read_text() for split in ("train", "valid", "test"))
    assert "Latin words" not in russian and sentence("ru", 8) not in russian and sentence("ru", 9) in russian
    for code in ("de", "ru"):
        checked = read_json(dest / "spot_check.json")[code]
        assert (checked["foreign_script_lines"], checked["misfit_lines"]) == (0, 0)
        assert checked == manifest["languages"][code]["spot_check"]
    assert sum(manifest["aligned"]["test"].values()) > 0


def test_an_interrupted_extraction_continues(tmp_path, apt, make_deb, make_catalogue):
    cache = write_debian_packages(make_deb, make_catalogue)
    settings = MultilingualSettings(
        languages=("de", "ru"), filter_lines=True, vocab_size=380, valid_fraction=0.1, test_fraction=0.1
    )
    preparation = MultilingualPreparation(DebianDocs(("mediawiki", "emoji", "lo-ui")), settings, cache, print)
    said = prepare_interrupted(preparation, tmp_path / "d", "extract: emoji")
    assert [line.split()[1] for line in said if line.startswith("extract:")] == ["emoji", "lo-ui"]


def test_no_package_at_all(run, tmp_path, apt):
    status, _, err = run("--cache-dir", tmp_path / "none", "--dest", tmp_path / "d", "--langs", "de")
    assert status == 2 and err.count("\n") == 1
    assert "--source debian-docs: apt knows none of the packages; run apt-get update first" in err


def test_a_cap_that_empties_a_part_is_named(run, tmp_path):
    (tmp_path / "in" / "de").mkdir(parents=True)
    for book in range(40):
        lines = [sentence("de", 40 * book + line) for line in range(40)]
        (tmp_path / "in" / "de" / f"{book}.txt").write_text("\n".join(lines))
    words = ("--source", "text", tmp_path / "in", "--langs", "de", "--dest", tmp_path / "d", *SMALL)
    status, _, err = run(*words, "--document-separator", "file", "--max-mb-per-language", "0.001")
    assert status == 2
    assert re.search(r"--max-mb-per-language \(0.001\) leaves nothing of de for \w+: it leaves out \d+ lines", err)


def test_packages_that_came_later_are_found(run, tmp_path, apt, make_deb, make_catalogue):
    words = ("--dest", tmp_path / "d", "--langs", "de,ru", "--debian-families", "mediawiki", "emoji", "lo-ui", *SMALL)
    assert run("--cache-dir", tmp_path / "none", *words)[0] == 2
    status, _, err = run("--cache-dir", write_debian_packages(make_deb, make_catalogue), *words)
    assert (status, err) == (0, "") and (tmp_path / "d" / "manifest.json").exists()


def test_data_without_what_can_be_had_now_are_not_up_to_date(run, tmp_path, apt, make_deb, make_catalogue):
    cache = write_debian_packages(make_deb, make_catalogue)
    later = cache / "unicode-cldr-core_1_all.deb"
    (held,) = cache.glob("unicode-cldr-core_*.deb")
    held.rename(tmp_path / "later.deb")
    words = ("--cache-dir", cache, "--dest", tmp_path / "d", "--langs", "de,ru", *SMALL)
    words += ("--debian-families", "mediawiki", "emoji")
    assert run(*words)[0] == 0
    assert "nothing to do" in run(*words)[1]
    (tmp_path / "later.deb").rename(later)
    status, _, err = run(*words)
    assert status == 2 and "was prepared without unicode-cldr-core, which can be fetched now" in err
    assert run(*words, "--overwrite")[0] == 0


def test_a_known_package_that_cannot_be_fetched_is_an_error(run, tmp_path, apt):
    (apt / "apt-cache").write_text("#!/bin/sh\necho Package: $4\n")
    status, _, err = run("--cache-dir", tmp_path / "none", "--dest", tmp_path / "d", "--langs", "de")
    assert status == 2 and err.count("\n") == 1
    assert "apt-get could not fetch mediawiki" in err and "choose other families (--debian-families)" in err


@pytest.mark.parametrize(
    "files, message",
    [
        ({"de.txt": b"eins\n"}, "--source text: no data for the language ru: none of "),
        ({"de.txt": b"eins\n", "ru.txt": b"eins\n"}, "ru.txt (ru) are the same text; every language needs its own"),
        ({"de.txt": b"eins\n", "ru.txt": b"\xd0\xb4\xd0\n"}, "ru.txt: invalid UTF-8 at byte 2"),
    ],
)
def test_bad_folders_are_one_line_before_any_work(run, tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    status, _, err = run("--source", "text", tmp_path, "--langs", "de,ru", "--dest", tmp_path / "d", *SMALL)
    assert status == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "d").exists()


def test_bad_json_lines(run, tmp_path):
    (tmp_path / "de.jsonl").write_text('{"text": "a", "key": [1]}\n')
    err = run("--source", "jsonl", tmp_path, "--langs", "de", "--dest", tmp_path / "d", *SMALL)[2]
    assert "de.jsonl:1: the key in 'key' must be text or a number (--jsonl-key-field)" in err


@pytest.mark.parametrize(
    "content, message",
    [
        ("eins\n\nzwei\n\ndrei", "--valid-fraction 0.001: no document of de is held out for valid; give more"),
        ("", "--langs de: its training part is empty after cleaning; documents are never divided"),
    ],
)
def test_empty_parts_are_named_before_the_vocabulary(run, tmp_path, content, message):
    (tmp_path / "de.txt").write_text(content)
    flags = ["--valid-fraction", 0.001 if content else 0, "--test-fraction", 0, "--vocab-size", 300]
    status, out, err = run("--source", "text", tmp_path, "--langs", "de", "--dest", tmp_path / "d", *flags)
    assert status == 2 and message in err and err.count("\n") == 1 and "vocabulary:" not in out


def test_other_settings_are_refused_until_overwrite(run, tmp_path, jsonl):
    base = ["--source", "jsonl", jsonl, "--dest", tmp_path / "d", *SMALL]
    assert run(*base, "--langs", "de,en,ru")[0] == 0
    before = hashes(tmp_path / "d")
    status, _, err = run(*base, "--langs", "de,en")
    assert status == 2 and "holds data made with another --source inputs" in err and err.count("\n") == 1
    status, _, err = run(*base, "--langs", "de,en,ru", "--vocab-sampling-alpha", 1)
    assert status == 2 and "another --vocab-sampling-alpha (0.5, now 1.0)" in err
    assert hashes(tmp_path / "d") == before
    assert run(*base, "--langs", "de,en", "--overwrite")[0] == 0
    assert "ru/train.bin" not in hashes(tmp_path / "d") and not (tmp_path / "d" / "ru" / "train.idx").exists()


@pytest.mark.parametrize("stop_at", ["clean: en", "spot check:", "aligned:", "vocabulary:", "binarise: en"])
def test_an_interrupted_preparation_continues_and_ends_the_same(tmp_path, jsonl, stop_at):
    settings = MultilingualSettings(
        languages=("de", "en"), filter_lines=False, vocab_size=360, valid_fraction=0.1, test_fraction=0.1
    )

    preparation = MultilingualPreparation(jsonl_folder(jsonl, "text", "key"), settings, tmp_path, print)
    assert "clean: de" not in " ".join(prepare_interrupted(preparation, tmp_path / "d", stop_at))


def test_one_huge_document_is_told_of_and_a_held_out_one_explained(run, tmp_path):
    huge = "\n".join(sentence("de", number) for number in range(300))
    (tmp_path / "de.txt").write_text("\n\n".join([huge, *(sentence("de", number) for number in range(300, 330))]))
    arguments = ["--source", "text", tmp_path, "--langs", "de", "--dest", tmp_path / "d", "--vocab-size", 300]
    arguments += ["--valid-fraction", 0]
    status, out, err = run(*arguments, "--test-fraction", 0.3)
    assert (status, err) == (0, "") and "warning: de: the parts are far from their shares of the bytes (train " in out
    (tmp_path / "de.txt").write_text(huge)
    status, _, err = run(*arguments, "--test-fraction", 0.999, "--overwrite")
    assert status == 2 and "empty after cleaning, all of its text is held out (test); documents are never" in err
    assert "--document-separator" in err and err.count("\n") == 1
