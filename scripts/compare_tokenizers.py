"""Compare the ids of an exported tokenizer with those that this package scores, on real and odd texts by language.

DATA is a folder of ``mhmoe prepare multilingual``, whose vocabulary is compared. A difference of a kind that
docs/export.md does not name is shown, and the status is 1.
"""

import argparse
import json
import math
import random
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from fairseq.data import Dictionary
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceConfig
from tokenizers import normalizers

from mhmoe_fairseq.checkpoints.huggingface.tokenizer import build_tokenizer
from mhmoe_fairseq.common.arguments import existing_folder, whole
from mhmoe_fairseq.common.tables import markdown_table
from mhmoe_fairseq.data.languages import LANGUAGES, language_symbol
from mhmoe_fairseq.data.vocabularies import RANKS_FILE, find_vocabulary, read_vocabulary
from mhmoe_fairseq.evaluation.scoring import TextScorer
from mhmoe_fairseq.tasks.tokenizers import TiktokenBPE, WholeSentencepieceBPE

ODD = (
    "", " ", "\n", "\n\n", " \n a", "a\n", "a\n\nb", "\ta\t\tb ",
    "a\r\nb\rc\x0bd\x0ce\x1cf\x1eg\x85h\u2028i\u2029j",
    "a\x00b\x07c\x1f\x7fd",
    "\ufeffBOM", "e\u0301 n\u0303 a\u0308\u0323 \u1e9b\u0323", "\u202bאבג\u202c abc \u200fשלום", "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪",
    "a\u00a0b\u2003c\u3000d\u200be", "\u2581 a\u2581b", "ﬁ Ａ ① ½ K", "<mask> &lt; </S>",
    "don't I'LL we'Ve 12345678", "\u1112\u1161\u11ab\u0958\u0344", "\U0010ffff\ue000\uffff\u0378",
    "x" * 37 + "yz" * 20, "Ωmega" * 2000, "$\\frac{1}{2}$ `code`  -- --- ...",
)  # fmt: skip
LINE_ENDS = ("\n", "\n", "\n\n", "\r\n", "\r", " \n ", "\u2028")
LONGEST_WORD = 10_000
UNKNOWN = "unknown"
_BYTE = -100.0  # in place of the exported score of byte pieces, beside which all others would be nothing
_SYMBOLS = re.compile("|".join(["</?s>", "<pad>", "<unk>", *map(language_symbol, LANGUAGES)]))


def make_texts(lines: Sequence[str], count: int, seed: object = 0) -> list[str]:
    """Returns ``count`` texts made of a language's lines: half of them as they are, the others odd."""
    generator = random.Random(f"texts {seed}")
    texts = [*ODD, generator.choice(lines) + "\n" + "".join(lines)[: 2 * LONGEST_WORD].replace(" ", "")[:LONGEST_WORD]]
    texts += generator.sample(lines, min(len(lines), count // 2))
    while len(texts) < count:
        texts.append(_odd_text(generator, lines))
    return texts[:count]


def _odd_text(generator: random.Random, lines: Sequence[str]) -> str:
    line = generator.choice(lines)
    kind = generator.randrange(6)
    if kind == 0:  # several lines
        return "".join(generator.choice(lines) + generator.choice(LINE_ENDS) for _ in range(generator.randint(2, 4)))
    if kind == 1:  # characters of a line in any order
        return "".join(generator.sample(line, len(line)))
    if kind == 2:  # accents put on letters, or taken off them
        marks = "\u0301\u0323\u0308\u064e\u093c\u0e49\ufe0f\u200d"
        text = unicodedata.normalize("NFD", line)
        return "".join(letter + generator.choice(marks) * (generator.random() < 0.2) for letter in text)
    if kind == 3:  # any characters
        return "".join(_any_character(generator) + generator.choice(("", "", " ")) for _ in range(20))
    words = line.split(" ")
    for _ in range(generator.randint(1, 3)):
        odd = generator.choice(ODD[:-2]) if kind == 4 else _any_character(generator)
        at = generator.randint(0, len(words))
        words[at:at] = [odd] if kind == 4 else [odd * generator.randint(1, 3) + "".join(words[at : at + 1])]
    return generator.choice((" ", "\t", "\u00a0 ")).join(words)


def _any_character(generator: random.Random) -> str:
    code = generator.randrange(generator.choice((0x250, 0x3000, 0x10000, 0x110000)))
    return _any_character(generator) if 0xD800 <= code < 0xE000 else chr(code)


class Both(NamedTuple):
    """The exported tokenizer of a vocabulary, this package's scorer of it without a model, a unigram model's scores."""

    tokenizer: Any
    scorer: TextScorer
    scores: list[float]

    def ids(self, text: str) -> tuple[list[int], list[int]]:
        """The exported tokenizer's ids, and those that this package scores."""
        return self.tokenizer.encode(text).ids, [self.scorer.dictionary.eos(), *self.scorer.encode(text)]


def open_both(folder: Path) -> Both:
    """Open both sides of a folder's vocabulary."""
    file = find_vocabulary(folder)
    if file is None:
        sys.exit(f"{folder}: no vocabulary in it")
    dictionary = Dictionary()
    for symbol in (*read_vocabulary(file).symbols, *map(language_symbol, LANGUAGES)):
        dictionary.add_symbol(symbol)
    dictionary.pad_to_multiple_(8)
    bpe: Any
    if file.name == RANKS_FILE:
        bpe = TiktokenBPE(SimpleNamespace(mhmoe_tiktoken_ranks=str(file)))
    else:
        bpe = WholeSentencepieceBPE(SentencepieceConfig(sentencepiece_model=str(file)))
    scorer = object.__new__(TextScorer)
    scorer.clean, scorer.dictionary, scorer._told_of_unknown_words = True, dictionary, True
    scorer.model = SimpleNamespace(encode=lambda line: dictionary.encode_line(bpe.encode(line)).long())  # type: ignore
    tokenizer = build_tokenizer(dictionary, folder, "</s>")
    model = json.loads(tokenizer.to_str())["model"]
    is_unigram = model["type"] == "Unigram"
    return Both(tokenizer, scorer, [max(score, _BYTE) for _, score in model["vocab"]] if is_unigram else [])


def difference(both: Both, text: str) -> str | None:
    """Returns which difference of those that docs/export.md names a text has, "unknown", or None if it has none."""
    exported, ours = both.ids(text)
    if exported == ours:
        return None
    if _SYMBOLS.search(text):
        return "a spelled symbol"
    if normalizers.NFC().normalize_str(text) != unicodedata.normalize("NFC", text):
        return "marks newer than Unicode 9"
    if both.scores:  # SentencePiece adds them in float32
        one, other = (sum(both.scores[index] for index in ids) for ids in (exported, ours))
        if math.isclose(one, other, rel_tol=1e-6):
            return "equal scores"
    return UNKNOWN


def main(words: Sequence[str] | None = None) -> int:
    """Print a table of languages; returns 1 if there is a difference that is not known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=existing_folder, metavar="DATA")
    parser.add_argument("--texts", type=whole(), default=5000, metavar="N", help="of each language")
    args = parser.parse_args(words)
    both = open_both(args.data)
    rows, unknown = [], []
    for folder in sorted((args.data / "text").iterdir()):
        files = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
        lines = [*dict.fromkeys(line for text in files for line in text.split("\n") if line)]
        texts = make_texts(lines, args.texts, folder.name)
        found = {text: kind for text in texts if (kind := difference(both, text))}
        unknown += [text for text, kind in found.items() if kind == UNKNOWN]
        named = ", ".join(f"{kind} {number}" for kind, number in Counter(found.values()).items())
        rows.append([folder.name, str(len(texts)), str(len({*texts} & {*lines})), str(len(found)), named])
        print(rows[-1], file=sys.stderr)
    print(markdown_table(["language", "texts", "lines as they are", "other ids", "because of"], rows))
    for text in unknown[:20]:
        print(repr(text[:200]), *(ids[:40] for ids in both.ids(text)))
    return int(bool(unknown))


if __name__ == "__main__":
    sys.exit(main())
