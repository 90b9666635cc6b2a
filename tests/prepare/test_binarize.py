"""fairseq reads back what was written: text, counts, document boundaries."""

import numpy as np
import pytest
from fairseq.data import Dictionary, TokenBlockDataset, data_utils
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig

from mhmoe_fairseq.data.vocabularies import SentencePieceVocabulary, train_sentencepiece, write_dictionary
from mhmoe_fairseq.prepare.binarize import binarize


@pytest.fixture
def prepared(tmp_path, sentences):
    """Folder, lines of the text (an empty one between documents), counts and occurrences."""
    lines = sentences(120)
    train_sentencepiece(
        iter(lines), len(lines), tmp_path / "m.model", vocab_size=300, model="unigram", max_lines=1000, seed=1
    )
    lines = [*lines[:50], "", *lines[50:80], "", *lines[80:], "Ünïcode 漢 </s>"]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    vocabulary = SentencePieceVocabulary(tmp_path / "m.model")
    counts, occurrences = binarize(tmp_path / "train.txt", tmp_path / "train", vocabulary)
    write_dictionary(tmp_path / "dict.txt", vocabulary.symbols, occurrences)
    return tmp_path, lines, counts, occurrences


def load(folder):
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    return dictionary, data_utils.load_indexed_dataset(str(folder / "train"), dictionary, "mmap")


def test_tokens_are_the_text_and_equal_fairseqs_own_path(prepared):
    folder, lines, _, _ = prepared
    dictionary, dataset = load(folder)
    bpe = SentencepieceBPE(SentencepieceConfig(sentencepiece_model=str(folder / "m.model")))
    assert len(dataset) == len(lines)
    for item, line in zip(dataset, lines):
        expected = dictionary.encode_line(bpe.encode(line), add_if_not_exist=False)
        assert item.tolist() == expected.tolist()
        assert bpe.sp.decode(item[:-1].tolist()) == line


def test_counts_describe_text_and_tokens(prepared):
    folder, lines, counts, occurrences = prepared
    dictionary, dataset = load(folder)
    assert counts.tokens == sum(dataset.sizes) == occurrences.sum()
    assert (counts.lines, counts.documents) == (len(lines) - 2, 3)
    assert counts.bytes == (folder / "train.txt").stat().st_size
    assert counts.characters == sum(len(line) + 1 for line in lines)
    assert counts.words == sum(len(line.split()) for line in lines)
    assert counts.unknown_tokens == 0
    assert counts.as_dict()["bytes_per_token"] == round(counts.bytes / counts.tokens, 4)
    assert [dictionary.count[index] for index in range(4, 300)] == occurrences[4:].tolist()
    assert len(dictionary) == 304  # 300 pieces, padded to a multiple of 8
    assert dictionary.symbols[300:] == [f"madeupword{number:04d}" for number in range(4)]


def test_complete_doc_blocks_never_cross_a_document(prepared):
    folder, lines, counts, _ = prepared
    dictionary, dataset = load(folder)
    borders = np.flatnonzero(np.array(lines) == "")
    document_of = np.searchsorted(borders, np.arange(len(lines)))
    blocks = TokenBlockDataset(
        dataset, dataset.sizes, 64, dictionary.pad(), dictionary.eos(), break_mode="complete_doc"
    )
    starts_ends = blocks.block_to_dataset_index
    assert len(blocks) > 10
    assert all(document_of[start] == document_of[end] for start, _, end in starts_ends)
    assert sum(map(len, blocks)) == counts.tokens - len(borders)  # only the boundaries themselves are left out
    stream = TokenBlockDataset(dataset, dataset.sizes, 64, dictionary.pad(), dictionary.eos(), break_mode="none")
    assert sum(map(len, stream)) == counts.tokens  # every byte of the text is scored


def test_a_symbol_that_occurs_twice_is_a_bug_not_a_shifted_dictionary(tmp_path):
    with pytest.raises(RuntimeError, match="'b' occurs twice"):
        write_dictionary(tmp_path / "dict.txt", ["a", "b", "b"], np.zeros(7, dtype=np.int64))
