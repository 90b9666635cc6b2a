"""Experts of polysemous words and a control, against slow loops over a router whose choices are known."""

import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from fairseq.data import Dictionary
from language_models import small_dictionary

from mhmoe_fairseq.analysis.routing.polysemy import Word, compare_pairs, count_words, pair_words
from mhmoe_fairseq.analysis.routing.words import Occurrence, find_words, symbol_texts
from mhmoe_fairseq.checkpoints.open import open_model
from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.data.vocabularies import SentencePieceVocabulary


@pytest.mark.parametrize(
    "tokens, expected",
    [
        ("\n| time| flies| now", [(1, 2), (2, 3)]),
        ("\n| ti|me| flies|. |x", [(1, 3), (3, 4)]),
        ("\n|ti|me|,|\n| ", [(1, 3)]),  # as tiktoken writes a line's first word
        ("\n| Time| TIME| sometime| times| ti|mes| x", []),
        ("\n|(|time|)| “|time|”|\n| x", [(2, 3), (5, 6)]),
        ("\n|(time|)| x", []),  # not the word's token alone
        ("\n| time|'|s| time|’|s| time|-|out| time|/|out| run|.|time|\n", []),
        ("\n| time|-|-| flies|.|\n| x", [(1, 2), (4, 5)]),  # a dash of two
        ("time| flies| x", [(1, 2)]),  # may have begun in the block before
        (" time| x", [(0, 1)]),
        ("\n| time|ly", []),
        ("\n| time|,", [(1, 2)]),
        ("\n| time|.", []),  # perhaps of a name in a program
        ("\n| time", []),  # the last is not routed
        ("\n| ti|me |", [(1, 3)]),
        ("\n| ti|me ", []),
        ("\n| time|'", []),  # who knows what follows
        ("\n| time|\n", [(1, 2)]),
        ("\n| \\xc3|\\xa9|time| \\xe2|\\x80|\\x94| |time| x", [(8, 9)]),  # an accented letter, a dash
        ("\\xa9|time| x", []),  # half a letter
        ("\n|_|time| _| time| x", [(4, 5)]),  # what is not known
    ],
)
def test_whole_words_are_found_with_their_tokens(tokens: str, expected: list[tuple[int, int]]) -> None:
    texts = [token.encode().decode("unicode_escape").encode("latin-1") if "\\" in token else token.encode()
             for token in tokens.split("|")]  # fmt: skip
    assert [(start, stop) for _, start, stop in find_words(texts, {"time", "flies"})] == expected


def test_what_symbols_stand_for(trained_model, tmp_path: Path) -> None:
    dictionary = Dictionary.load(str(trained_model.data / "dict.txt"))
    texts = symbol_texts(dictionary, trained_model.data)
    line = trained_model.held_out_lines(1)[0]
    ids = SentencePieceVocabulary(trained_model.data / "sentencepiece.model").encode_lines([line])[0]
    assert b"".join(texts[index] for index in ids).decode() == f" {line}"
    assert texts[dictionary.eos()] == b"\n" and texts[dictionary.unk()] == texts[dictionary.pad()] == b"_"
    assert texts[dictionary.index("<0xC3>")] == b"\xc3"
    dictionary.add_symbol("__de__")
    assert symbol_texts(dictionary, trained_model.data)[-1] == b"_"
    assert symbol_texts(small_dictionary(words=2), tmp_path)[4:] == [b" w0", b" w1"]
    with pytest.raises(UserError, match="dict.txt:1: .* where .*sentencepiece.model has"):
        symbol_texts(small_dictionary(), trained_model.data)


WORDS = set("river farmer teacher engine near along behind quiet bridge The northern 7 17 dawn".split())


HEADS, EXPERTS = 4, 8


def expected_experts(token: int) -> int:
    """Different experts of a token under the made-up router: head h chooses (token * (h + 1)) % 8 and the next."""
    return len({(token * (head + 1) + choice) % EXPERTS for head in range(HEADS) for choice in (0, 1)})


def slow_counts(data: Path, length: int | None) -> dict[str, list[list[int]]]:
    """By word, for each occurrence the different experts of its tokens; the text is read character by character.

    Args:
        length: of the blocks into which the text is cut; None: a line is a block.
    """
    model = sentencepiece.SentencePieceProcessor(model_file=str(data / "sentencepiece.model"))
    lines = (data / "text" / "test.txt").read_text(encoding="utf-8").split("\n")[:-1]
    found: dict[str, list[list[int]]] = {}
    position = 0  # of a line's first token among all
    for line, ids in zip(lines, model.encode(lines)):
        characters = []  # each with the index of its token
        for index, token in enumerate(ids):
            characters += [(character, index) for character in model.id_to_piece(token).replace("▁", " ")]
        text = "".join(character for character, _ in characters)
        assert text == (f" {line}" if line else "")
        at = 0
        while at < len(text):
            end = at
            while end < len(text) and text[end].isalnum():
                end += 1
            word = text[at:end]
            if word in WORDS:
                tokens = sorted({index for _, index in characters[at:end]})
                # A token is read one position after it is predicted: block b reads tokens b * length - 1, ....
                needed = [characters[at - 1][1], *tokens]  # the space before it shows that it begins there
                blocks = {(position + index + 1) // length for index in needed} if length else {0}
                # Of the block the token after the last one that is read is known, too: a point there may be in a name.
                seen = (max(blocks) + 1) * length - 1 - position if length else len(ids)
                after = "".join(character for character, index in characters[end:] if index <= seen)
                if len(blocks) == 1 and (after != "." or seen >= len(ids)):
                    found.setdefault(word, []).append([expected_experts(ids[index]) for index in tokens])
            at = max(end, at + 1)
        position += len(ids) + 1  # its end mark
    return found


@pytest.mark.parametrize("length", [None, 7, 40])
@pytest.mark.parametrize("batch_size", [1, 9])
def test_words_are_counted_as_a_slow_loop_counts_them(trained_model, length: int | None, batch_size: int) -> None:
    overrides = {"sample_break_mode": "none", "tokens_per_sample": length} if length else {}
    opened = open_model(trained_model.checkpoint, trained_model.data, "cpu", overrides)
    rows: list[torch.Tensor] = []
    opened.model.decoder.register_forward_pre_hook(lambda module, given: rows.append(given[0]))

    def known_choices(module, given, logits):
        tokens = rows[-1].flatten().repeat_interleave(HEADS)
        first = tokens * (1 + torch.arange(len(tokens)) % HEADS) % EXPERTS
        return torch.zeros_like(logits).scatter(1, first[:, None], 2.0).scatter(1, (first[:, None] + 1) % EXPERTS, 1.0)

    [layer] = [layer.moe_layer for layer in opened.layers if layer.is_moe_layer]
    assert (layer.config.num_heads, layer.config.num_experts, layer.config.top_k) == (HEADS, EXPERTS, 2)
    layer.router.register_forward_hook(known_choices)
    found, expected = count_words(opened, "test", WORDS, batch_size=batch_size), slow_counts(trained_model.data, length)
    assert len(expected) > 5 and any(len(counts) > 1 for of in expected.values() for counts in of)
    assert {word: of.occurrences for word, of in found.items()} == {word: len(of) for word, of in expected.items()}
    for word, of in expected.items():
        counted = sorted(float(count) for [count] in found[word].counts)
        assert counted == pytest.approx(sorted(np.mean(counts) for counts in of))
        assert found[word].tokens == sum(map(len, of)) and found[word].pieces == round(np.mean([*map(len, of)]))
        assert found[word].experts_L == pytest.approx([np.mean([np.mean(counts) for counts in of])])


def words_of(sizes: dict[str, tuple[int, int]]) -> dict[str, Word]:
    """Words by name, from how often they occur and of how many tokens they are."""
    return {name: Word([np.ones(1)] * count, count * pieces) for name, (count, pieces) in sizes.items()}


def test_pairs_are_of_like_words() -> None:
    polysemous = words_of({"a": (100, 1), "b": (8, 1), "c": (8, 2), "d": (11, 1), "e": (30, 3), "f": (2, 1)})
    control = words_of({"u": (70, 1), "v": (10, 1), "w": (8, 2), "x": (8, 1), "y": (3, 1), "z": (142, 1)})
    polysemous |= words_of({"g": (50, 4), "h": (300, 1), "i": (310, 1)})
    control |= words_of({"s": (300, 1), "t": (50, 5)})
    pairs = pair_words(polysemous, control)
    # a-u are 0.514 apart in log2, a-z 0.506, y-f 0.58; d and b both are near v and x.
    assert sorted(pairs) == [("b", "x"), ("c", "w"), ("d", "v"), ("h", "s")]
    assert pair_words(polysemous, {}) == [] == pair_words({}, control)


def test_comparison_against_the_mean_and_the_normal_interval() -> None:
    values_P2L = np.random.default_rng(0).normal([[3.0, 3.5], [2.0, 3.0]], 1.0, size=(300, 2, 2))
    compared = compare_pairs(values_P2L)
    differences = [sum(one) / 2 - sum(other) / 2 for one, other in values_P2L.tolist()]
    mean = sum(differences) / 300
    stderr = (sum((value - mean) ** 2 for value in differences) / 300 / 300) ** 0.5
    assert compared.difference == pytest.approx(mean) and compared.stderr == pytest.approx(stderr, rel=0.05)
    assert compared.interval == pytest.approx((mean - 1.96 * stderr, mean + 1.96 * stderr), abs=0.008)
    assert compared.by_layer == pytest.approx((values_P2L[:, 0] - values_P2L[:, 1]).mean(0).tolist())
    assert compare_pairs(values_P2L) == compared and compare_pairs(values_P2L, seed=2).interval != compared.interval


def test_shuffled_labels_differ_from_zero_as_often_as_chance_says() -> None:
    """Of 200 comparisons without a difference, 95 % intervals miss 0 in about 10: 1 to 24 but once in 10,000."""
    values_P2L, generator = np.random.default_rng(1).gamma(2.0, size=(60, 2, 1)), random.Random(1)
    values_P2L[:, 0] += 1.0  # a difference, which shuffling takes away
    low, _ = compare_pairs(values_P2L).interval
    assert low > 0
    missed = 0
    for _ in range(200):
        shuffled = np.array([pair[::-1] if generator.random() < 0.5 else pair for pair in values_P2L])
        low, high = compare_pairs(shuffled).interval
        missed += not low <= 0 <= high
    assert 1 <= missed <= 24


def test_occurrences_name_their_words() -> None:
    assert [*find_words([b" a", b" b", b"\n"], {"b"})] == [Occurrence("b", 1, 2)]
