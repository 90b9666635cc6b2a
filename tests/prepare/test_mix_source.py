"""Dictionaries become prose; a mix divides each domain, shuffles what it trains on and names what is missing."""

import gzip
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
from mhmoe_fairseq.prepare.sources.mix import DOMAINS, MixSource

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
        "Lapidate, v. t. To stone to death, as a crowd did in the old stories.",
        "Lapis, n.; pl. Lapides. 1. A stone, or what the Romans called one in their cæsura. --Bp. Hall.",
    ]


def test_wordnet_gives_every_gloss_once_with_the_first_word_that_has_it():
    assert list(wordnet_lines(WORDNET)) == [
        "'hood: (slang) a neighborhood where one lives",
        'Kovna: a city in central Lithuania; "Kovna lies there"',
        "Kovno: a second sense of this very word",
    ]


def test_foldoc_paragraphs_without_labels_references_and_dates():
    assert list(foldoc_lines(FOLDOC_TEXT)) == [
        "lenient evaluation: An evaluation strategy, described in, under which all redexes are evaluated in parallel.",
        "Lenient evaluation is an example of an eager evaluation strategy, as a second paragraph says.",
    ]


def test_neighbouring_entries_are_one_document(make_deb):
    text = "\n".join(f"word{number}\n    n 1: the meaning of number {number} as such" for number in range(250))
    path = make_deb("dict-wn", {"usr/share/dictd/wn.dict.dz": gzip.compress(text.encode())})
    documents = list(dictionary_documents(wordnet_lines, path))
    assert [len(document.lines) for document in documents] == [100, 100, 50]
    with pytest.raises(UserError, match="has 0 dictionaries"):
        list(FOLDOC.read(make_deb("dict-foldoc", {"usr/share/doc/a": b"nothing"})))


def part(name, sentences, client="pip", package=None):
    """A domain's package of 40 documents of its own words."""
    archive = Archive(client, package or name, None, f"{package or name}_*.deb")
    lines = [f"{name} {number} says {line}" for number, line in enumerate(sentences(120))]
    documents = [Document(f"{name} {at}", lines[at : at + 3]) for at in range(0, 120, 3)]
    return PackagedSource(name, f"licence of {name}", "document = three lines", archive, lambda path: iter(documents))


@pytest.fixture
def prepared(tmp_path, sentences):
    """A mix of two domains, prepared, whose third has a package that nobody has; what was said, too."""
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
    EnglishPreparation(MixSource(domains), settings, cache, said.append).run(tmp_path / "data")
    return tmp_path / "data", said


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
