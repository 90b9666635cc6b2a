"""Dictionaries become prose; a mix divides each domain, shuffles what it trains on and names what is missing."""

import gzip
import sys
import zipfile
from dataclasses import replace

import pytest

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.common.files import read_json
from mhmoe_fairseq.data.documents import Document
from mhmoe_fairseq.prepare.archives import Archive
from mhmoe_fairseq.prepare.english import EnglishPreparation, EnglishSettings
from mhmoe_fairseq.prepare.sources.base import PackagedSource
from mhmoe_fairseq.prepare.sources.dictionaries import (
    FOLDOC,
    dictionary_documents,
    foldoc_lines,
    gcide_lines,
    wordnet_lines,
)
from mhmoe_fairseq.prepare.sources.documentation import wheel_documents
from mhmoe_fairseq.prepare.sources.mix import DOMAINS, PYTHON, MixSource

GCIDE = """00-database-info
   This file was converted from the original database by a program, as it says.

Lapidate \\Lap"i*date\\, v. t. [L. lapidatus, p. p. of lapidare,
   fr. lapis stone.]
   To stone to death, as a crowd did in the old stories. [Obs.]
   [1913 Webster]

Lapis \\La"pis\\, n.; pl. {Lapides}. [L.]
   1. A stone, or what the Romans called one in their c[ae]sura. --Bp.
      Hall.
      [1913 Webster] Lapis lazuli

   2. (Min.) Too short.

Larch \\Larch\\, n.
   1. A tree of the cold north, as Webster wrote of it.
      [1913 Webster]

   2. what WordNet knows of larches, in two paragraphs;

   Syn: tree of the larch family, or so.
        [WordNet 1.5 +PJC]

   3. Webster's words, which WordNet's were put among.
      [1913 Webster + WordNet 1.5]

   5. A sense of which nobody says whence they have it, or from whom.

Broken pronunci"a*tion\\ A line that its brackets and strokes do not end as they should.
"""
WORDNET = """'hood
    n 1: (slang) a neighborhood where one lives
Kovna
    n 1: a city in central Lithuania; "Kovna lies there" [syn:
         {Kaunas}, {Kovno}]
    v 1: too short
Kovno
    n 1: a city in central Lithuania; "Kovna lies there" [syn: {Kaunas}]
    2: a second sense of this very word [ant: {none}]
"""
FOLDOC_TEXT = """lenient evaluation%%%leniency

   <reduction> An {evaluation strategy}, described in [Traub,
   FPCA 89], under which all {redex}es are evaluated in parallel.

   (2004-01-22)

   Lenient evaluation is an example of an {eager} evaluation
   strategy, as a second paragraph says.
"""


def test_gcide_keeps_definitions_without_pronunciation_etymology_and_origin():
    assert list(gcide_lines(GCIDE)) == [
        ["Lapidate, v. t. To stone to death, as a crowd did in the old stories."],
        ["Lapis, n.; pl. Lapides. 1. A stone, or what the Romans called one in their cæsura. --Bp. Hall."],
        [
            "Larch, n. 1. A tree of the cold north, as Webster wrote of it.",
            "A sense of which nobody says whence they have it, or from whom.",
        ],
        [],
    ]


def test_wordnet_gives_every_gloss_once_with_the_first_word_that_has_it():
    assert list(wordnet_lines(WORDNET)) == [
        ["'hood: (slang) a neighborhood where one lives"],
        ['Kovna: a city in central Lithuania; "Kovna lies there"'],
        ["Kovno: a second sense of this very word"],
    ]


def test_foldoc_paragraphs_without_labels_references_and_dates():
    first = (
        "lenient evaluation: An evaluation strategy, described in, under which all redexes are evaluated in parallel."
    )
    assert list(foldoc_lines(FOLDOC_TEXT)) == [
        [first, "Lenient evaluation is an example of an eager evaluation strategy, as a second paragraph says."],
    ]


def test_neighbouring_entries_are_one_document_and_no_entry_is_divided(make_deb):
    senses = "\n".join(f"    n {sense}: meaning {sense} of word {{0}} as such" for sense in (1, 2, 3))
    text = "\n".join(f"word{number}\n{senses.format(number)}" for number in range(80))
    path = make_deb("dict-wn", {"usr/share/dictd/wn.dict.dz": gzip.compress(text.encode())})
    documents = list(dictionary_documents(wordnet_lines, path))
    assert [len(document.lines) for document in documents] == [102, 102, 36]
    with pytest.raises(UserError, match="has 0 dictionaries"):
        list(FOLDOC.read(make_deb("dict-foldoc", {"usr/share/doc/a": b"nothing"})))


def part(name, sentences, client="pip", package=None):
    """A domain's package of 40 documents of its own words."""
    archive = Archive(client, package or name, None, f"{package or name}_*.deb")
    lines = [f"{name} {number} says {line}" for number, line in enumerate(sentences(120))]
    documents = [Document(f"{name} {at}", lines[at : at + 3]) for at in range(0, 120, 3)]
    return PackagedSource(name, f"licence of {name}", "document = three lines", archive, lambda path: iter(documents))


@pytest.fixture
def mix(tmp_path, sentences):
    """How to prepare a mix of two domains, whose third has a package that nobody has; what was said, too."""
    domains = {
        "first": (part("first", sentences),),
        "second": (part("second", sentences),),
        "third": (part("third", sentences, client="no-such-client"),),
    }
    cache, said = tmp_path / "cache", []
    cache.mkdir()
    for name in ("first", "second"):
        (cache / f"{name}_1.deb").write_text(name)
    settings = EnglishSettings(vocab_size=300, valid_fraction=0.1, test_fraction=0.2)
    return EnglishPreparation(MixSource(domains), settings, cache, said.append), said


@pytest.fixture
def prepared(mix, tmp_path):
    """The mix, prepared, and what was said."""
    preparation, said = mix
    preparation.run(tmp_path / "data")
    return tmp_path / "data", said


def test_a_mix_that_lacked_what_can_be_had_now_is_not_taken_for_done(mix, prepared, tmp_path):
    (preparation, said), (data, _) = mix, prepared
    preparation.run(data)
    assert said[-1].endswith("nothing to do")
    package = tmp_path / "cache" / "third_1.deb"
    package.write_text("third")
    with pytest.raises(UserError, match=r"was prepared without third \(third\), which can be fetched now"):
        preparation.run(data)
    manifest = preparation.run(data, overwrite=True)
    assert manifest["source"]["missing"] == [] and "valid_third" in manifest["splits"]
    package.unlink()  # what was prepared with everything stays good where less can be had
    preparation.run(data)
    assert said[-1].endswith("nothing to do")


def test_each_domain_is_divided_for_itself_and_its_held_out_parts_stand_alone_too(prepared):
    data, said = prepared
    manifest = read_json(data / "manifest.json")
    counts = {name: split["documents"] for name, split in manifest["splits"].items()}
    assert counts == {
        "train": 56, "valid": 8, "valid_first": 4, "valid_second": 4, "test": 16, "test_first": 8, "test_second": 8,
    }  # fmt: skip
    text = {name: (data / "text" / f"{name}.txt").read_text() for name in counts if name != "train"}
    for split in ("valid", "test"):
        assert text[split] == f"{text[f'{split}_first']}\n{text[f'{split}_second']}"
    domains = manifest["source"]["domains"]
    assert [package["licence"] for entry in domains.values() for package in entry["packages"]] == [
        "licence of first", "licence of second",
    ]  # fmt: skip
    assert manifest["source"]["missing"] == ["third (third)"]
    assert any(line.startswith("missing: third (third): this mix is another one") for line in said)


def test_training_documents_of_the_domains_are_mixed(prepared):
    data, _ = prepared
    documents = (data / "text" / "train.txt").read_text().strip().split("\n\n")
    names = [document.split()[0] for document in documents]
    changes = sum(before != after for before, after in zip(names, names[1:]))
    assert len(names) == 56 and changes > 15  # sorted by domain there would be 1, at random 27.5 on average


def test_one_domain_alone_is_no_mix(tmp_path, sentences):
    source = MixSource({"third": (part("third", sentences, client="no-such-client"),)})
    with pytest.raises(UserError, match="--source mix: needs two domains, only none can be fetched"):
        source.open(tmp_path, lambda line: None)


def test_what_is_read_tells_two_mixes_apart():
    whole = MixSource().identity()
    assert whole == MixSource().identity() and len(DOMAINS) >= 8
    fewer = {name: parts for name, parts in DOMAINS.items() if name != "gcide"}
    newer = {
        **DOMAINS,
        "python": tuple(replace(each, archive=replace(each.archive, version="9")) for each in DOMAINS["python"]),
    }
    assert len({repr(MixSource(domains).identity()) for domains in (DOMAINS, fewer, newer)}) == 3


def test_docstrings_of_a_wheels_modules_without_tests(tmp_path):
    path, prose = tmp_path / "a.whl", '"""The docstring of module {} is one sentence of prose."""'
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a/z.py", "a/b/c.py", "a/tests/test_z.py", "a/data.txt", "other/d.py"):
            archive.writestr(name, prose.format(name[:-3]))
        archive.writestr("a/broken.py", "def (")
    assert [(document.name, document.lines) for document in wheel_documents("a", path)] == [
        (f"{name}.py", [f"The docstring of module {name} is one sentence of prose."]) for name in ("a/b/c", "a/z")
    ]


def test_pages_of_pythons_documentation_without_its_indexes(make_deb):
    page = "<html><body><h1>Lists¶</h1><p>Lists hold items of any kind, and they keep their order.¶</p></body></html>"
    pages = ("library/list.html", "genindex.html", "_static/a.html", "library/index.html", "list.txt")
    path = make_deb("python3.11-doc", {f"doc/python3.11/html/{name}": page for name in pages})
    assert [(document.name, document.lines) for document in PYTHON.read(path)] == [
        ("library/list.html", ["Lists hold items of any kind, and they keep their order."])
    ]


def test_manual_pages_have_no_spaces_where_print_has_none(make_deb):
    text = "It works like\n.BR read (2)\n, like\n.BR write (2)\nor\n.I others\n, and as\n.B write\n(3p) does; "
    text += "see those which do ( as ) such ."
    path = make_deb("manpages", {"man/man2/a.2": f".TH A 2\n.PP\n{text}\n", "man/de/man2/a.2": f".TH A 2\n{text}\n"})
    assert [(document.name, document.lines) for document in DOMAINS["manuals"][0].read(path)] == [
        (
            "man2/a.2",
            ["It works like read(2), like write(2) or others, and as write(3p) does; see those which do ( as ) such."],
        )
    ]


@pytest.mark.parametrize(
    "client, programs, registry, expected",
    [
        ("pip", {}, "", True),
        ("npm", {}, "", False),
        ("npm", {"npm": 0}, "", True),
        ("npm", {}, "https://example.org/npm", True),
        ("apt-get", {}, "", False),
        ("apt-get", {"apt-get": 0, "apt-cache": 0}, "", True),
        ("apt-get", {"apt-get": 0, "apt-cache": 100}, "", False),
    ],
)
def test_what_can_be_had_here(tmp_path, monkeypatch, client, programs, registry, expected):
    for name, status in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho Package: $3\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    for name, value in {
        "PATH": tmp_path,
        "HOME": tmp_path,
        "npm_config_registry": "",
        "NPM_CONFIG_REGISTRY": registry,
    }.items():
        monkeypatch.setenv(name, str(value))
    archive = Archive(client, "some", "1", "some_*.deb")
    assert archive.can_be_had(tmp_path) == expected
    (tmp_path / "some_1.deb").write_text("in the cache")
    assert archive.can_be_had(tmp_path)


def test_without_pip_what_it_would_fetch_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pip", None)
    assert not Archive("pip", "some", "1", "some-1.whl").can_be_had(tmp_path)
