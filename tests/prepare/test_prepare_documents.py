"""Cleaning, deduplication and the split by document."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.data.documents import Cleaner, Document, clean_line
from mhmoe_fairseq.prepare.base import CorpusSettings
from mhmoe_fairseq.prepare.binarize import iter_lines
from mhmoe_fairseq.prepare.english import read_sizes, write_corpus, write_splits
from mhmoe_fairseq.prepare.splits import DocumentSize, assign_splits, unlike_shares


def shares(valid, test):
    return CorpusSettings(valid_fraction=valid, test_fraction=test).shares


@pytest.mark.parametrize(
    "raw, clean",
    [
        ("  a \t b\u00a0c\u3000 ", "a b c"),
        ("\ufeffa\x00b\x1bc", "abc"),
        ("a\x1cb\x85c\u2028d", "a b c d"),
        ("gro\u0308\u00dfe", "gr\u00f6\u00dfe"),
        ("\u2581low\u2581", "_low_"),
        # A ligature, a superscript are other characters; the sign of a unit is the same one in NFC.
        ("\ufb01x\u00b2 \uff21\u2460 \u2122", "\ufb01x\u00b2 \uff21\u2460 \u2122"),
        ("\u212b", "\u00c5"),
        (" \r", ""),
    ],
)
def test_clean_line(raw, clean):
    assert clean_line(raw) == clean


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_clean_line_is_idempotent_and_leaves_only_plain_spaces(text):
    clean = clean_line(text)
    assert clean_line(clean) == clean
    assert clean == clean.strip() and "  " not in clean
    assert not any(character.isspace() and character != " " for character in clean)
    assert unicodedata.is_normalized("NFC", clean)


def test_dedup_keeps_the_first_of_equal_lines_in_the_whole_corpus():
    documents = [Document("a", ["x", "y ", "", "x"]), Document("b", ["y"]), Document("c", ["z", " y"])]
    cleaner = Cleaner("lines")
    cleaned = [(document.name, document.lines) for document in cleaner.clean(documents)]
    assert cleaned == [("a", ["x", "y"]), ("c", ["z"])]
    assert cleaner.counts == {
        "lines_read": 7, "empty_lines": 1, "duplicate_lines": 3, "empty_or_duplicate_documents": 1,
    }  # fmt: skip


def test_dedup_of_documents_and_none():
    documents = [Document("a", ["x", "x"]), Document("b", ["x", "x "]), Document("c", ["x"])]
    assert [document.name for document in Cleaner("documents").clean(documents)] == ["a", "c"]
    assert [document.lines for document in Cleaner("none").clean(documents)] == [["x", "x"], ["x", "x"], ["x"]]


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=3, max_size=60),
    valid=st.sampled_from([0.0, 0.05, 0.3]),
    test=st.sampled_from([0.0, 0.1, 0.4]),
    seed=st.integers(0, 5),
)
def test_every_wanted_part_gets_documents_and_held_out_parts_stay_near_their_share(sizes, valid, test, seed):
    documents = [DocumentSize(size) for size in sizes]
    assigned = assign_splits(documents, shares(valid, test), seed)
    assert assigned == assign_splits(documents, shares(valid, test), seed)
    assert assigned.count("train") >= 1
    for split, share in (("valid", valid), ("test", test)):
        inside = [size for size, name in zip(sizes, assigned) if name == split]
        assert bool(inside) == (share > 0)
        assert len(inside) <= 1 or sum(inside) <= 1.1 * share * sum(sizes)


def test_another_seed_holds_out_other_documents():
    documents = [DocumentSize(100)] * 200
    splits = [assign_splits(documents, shares(0.1, 0.1), seed) for seed in (1, 2)]
    assert splits[0] != splits[1]
    assert [splits[0].count(name) for name in ("train", "valid", "test")] == [160, 20, 20]


def test_shares_are_of_bytes_and_of_the_part_they_are_named_after():
    """Half of the documents are a hundred times as long as the others."""
    documents = [DocumentSize(10_000 if index % 2 else 100) for index in range(4000)]
    assigned = assign_splits(documents, shares(0.3, 0.05), 3)
    total = sum(size.num_bytes for size in documents)
    for split, share in (("valid", 0.3), ("test", 0.05)):
        inside = [size.num_bytes for size, name in zip(documents, assigned) if name == split]
        assert sum(inside) / total == pytest.approx(share, rel=0.02)
        assert 0.4 < sum(size == 100 for size in inside) / len(inside) < 0.6


def test_too_few_documents_and_no_documents():
    with pytest.raises(UserError, match="2 document\\(s\\) cannot be split by document into train, valid and test"):
        assign_splits([DocumentSize(10)] * 2, shares(0.1, 0.1), 1)
    with pytest.raises(UserError, match="--source: the corpus is empty after cleaning"):
        assign_splits([], shares(0.1, 0.1), 1)
    with pytest.raises(UserError, match="training part is empty"):
        assign_splits([DocumentSize(10, "valid")], shares(0.1, 0.1), 1)


def test_parts_far_from_their_shares_are_told_of():
    wanted = shares(0.05, 0.05)
    assert unlike_shares({"train": 900, "valid": 55, "test": 45}, wanted) is None
    assert unlike_shares({"train": 96, "valid": 0, "test": 4}, shares(0, 0.05)) is None
    told = unlike_shares({"train": 1, "valid": 1, "test": 60}, wanted)
    assert "train 1.6% for 90.0%, valid 1.6% for 5.0%, test 96.8% for 5.0%" in told and "--document-separator" in told
    assert "valid 0.1% for 5.0%" in unlike_shares({"train": 998, "valid": 1, "test": 1}, wanted)


def test_splits_of_the_source_are_kept():
    sizes = [DocumentSize(1, "valid"), DocumentSize(1, "train"), DocumentSize(1, "train")]
    assert assign_splits(sizes, shares(0.5, 0.4), 1) == ["valid", "train", "train"]
    domains = [size._replace(domain="given") for size in sizes] + [DocumentSize(1, domain="drawn")] * 10
    assigned = assign_splits(domains, shares(0.1, 0.2), 1)  # what one domain prescribes is its own
    assert assigned[:3] == ["valid", "train", "train"]
    assert [assigned[3:].count(split) for split in ("train", "valid", "test")] == [7, 1, 2]


@pytest.mark.parametrize("valid, test", [(0, 1.0), (0.5, 0.5), (-0.5, 0.1), (float("nan"), 0.1)])
def test_impossible_fractions(valid, test):
    with pytest.raises(UserError, match=f"--test-fraction {test:g}: their sum must be below 1"):
        shares(valid, test)


def test_split_files_have_an_empty_line_between_documents(tmp_path):
    documents = [Document("a", ["a1", "ä2"]), Document("b", ["b1"]), Document("c", ["c1"], "valid")]
    text, sizes = tmp_path / "corpus.txt", tmp_path / "corpus.sizes"
    assert write_corpus(documents, text, sizes) == (3, 13)
    recorded = read_sizes(sizes)
    assert recorded == [DocumentSize(7), DocumentSize(3), DocumentSize(3, "valid")]
    targets = {split: tmp_path / f"{split}.txt" for split in ("train", "valid")}
    write_splits(text, recorded, [["train"], ["train"], ["valid"]], targets, range(3))
    assert targets["train"].read_text() == "a1\nä2\n\nb1\n"
    assert targets["valid"].read_text() == "c1\n"
    assert list(iter_lines(targets["train"])) == ["a1", "ä2", "b1"]
