"""Compare the ids of an exported tokenizer with those that this package scores, on real and odd texts by language.

DATA is a folder of ``mhmoe prepare multilingual``, whose vocabulary is compared, or that of ``--tiktoken-ranks``. A
difference of a kind that docs/export.md does not name is shown, and the status is 1.
"""

import argparse
import random
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fairseq.data import Dictionary
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceConfig

from mhmoe_fairseq.checkpoints.huggingface.tokenizer import build_tokenizer
from mhmoe_fairseq.common.arguments import existing_file, existing_folder, whole
from mhmoe_fairseq.common.tables import markdown_table
from mhmoe_fairseq.data.languages import LANGUAGES, language_symbol
from mhmoe_fairseq.data.vocabularies import MODEL_FILE, open_vocabulary
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


def open_both(folder: Path, ranks: Path | None) -> tuple[Any, TextScorer]:
    """Returns the exported tokenizer of a vocabulary, and this package's scorer of it without a model."""
    dictionary = Dictionary()
    for symbol in (*open_vocabulary(folder, ranks).symbols, *map(language_symbol, LANGUAGES)):
        dictionary.add_symbol(symbol)
    dictionary.pad_to_multiple_(8)
    if ranks is None:
        bpe: Any = WholeSentencepieceBPE(SentencepieceConfig(sentencepiece_model=str(folder / MODEL_FILE)))
    else:
        bpe = TiktokenBPE(SimpleNamespace(mhmoe_tiktoken_ranks=str(ranks)))
    scorer = object.__new__(TextScorer)
    scorer.clean, scorer.dictionary, scorer._told_of_unknown_words = True, dictionary, True
    scorer.model = SimpleNamespace(encode=lambda line: dictionary.encode_line(bpe.encode(line)).long())  # type: ignore
    return build_tokenizer(dictionary, folder, ranks, "</s>"), scorer


def is_different(tokenizer: Any, scorer: TextScorer, text: str) -> bool:
    """Whether the two give a text other ids."""
    return tokenizer.encode(text).ids != [scorer.dictionary.eos(), *scorer.encode(text)]


def known_difference(tokenizer: Any, scorer: TextScorer, text: str) -> str:
    """Which of the differences that docs/export.md names this one is; "" for none of them."""
    if _SYMBOLS.search(text):
        return "a spelled symbol"
    same = sorted(tokenizer.encode(text).ids) == sorted([scorer.dictionary.eos(), *scorer.encode(text)])
    return "pieces in another order" if same else ""


def main(words: Sequence[str] | None = None) -> int:
    """Print a table of languages; returns 1 if there is a difference that is not known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=existing_folder, metavar="DATA")
    parser.add_argument("--tiktoken-ranks", type=existing_file, metavar="FILE", help="compare this vocabulary")
    parser.add_argument("--texts", type=whole(), default=5000, metavar="N", help="of each language")
    args = parser.parse_args(words)
    tokenizer, scorer = open_both(args.data, args.tiktoken_ranks)
    rows, unknown = [], []
    for folder in sorted((args.data / "text").iterdir()):
        files = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
        lines = [*dict.fromkeys(line for text in files for line in text.split("\n") if line)]
        texts = make_texts(lines, args.texts, folder.name)
        different = [text for text in texts if is_different(tokenizer, scorer, text)]
        kinds = Counter(known_difference(tokenizer, scorer, text) for text in different)
        unknown += [text for text in different if not known_difference(tokenizer, scorer, text)]
        real = len({*texts} & {*lines})
        named = ", ".join(f"{kind or 'unknown'} {number}" for kind, number in kinds.items())
        rows.append([folder.name, str(len(texts)), str(real), str(len(different)), named])
        print(rows[-1], file=sys.stderr)
    print(markdown_table(["language", "texts", "lines as they are", "other ids", "because of"], rows))
    for text in unknown[:20]:
        print(repr(text[:200]), tokenizer.encode(text).ids[:40], scorer.encode(text)[:40])
    return int(bool(unknown))


if __name__ == "__main__":
    sys.exit(main())
