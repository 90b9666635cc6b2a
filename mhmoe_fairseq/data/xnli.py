"""A user's copy of XNLI, language by language.

A copy is one file per language, or the official files of all languages, ``xnli.dev.tsv``, ``xnli.test.tsv`` and their
``.jsonl`` twins, with the fields ``language``, ``gold_label``, ``sentence1`` and ``sentence2``. Files per language may
name these ``premise``, ``hypothesis`` and ``label``, as the data set that lm-eval downloads does, whose labels are 0, 1
and 2.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..common.errors import UserError
from ..common.files import read_utf8_lines, sha256_of
from .classification import Fields, Labels, file_format, read_examples
from .languages import XNLI_LANGUAGES, get_language

LABELS = ("entailment", "neutral", "contradiction")  # by id, as XNLI's and lm-eval's
_SPELLINGS = (("entailment",), ("neutral",), ("contradiction", "contradictory"))
SPLITS = {"validation": ("validation", "dev", "valid", "val"), "test": ("test",)}
_SUFFIXES = tuple(suffix + packed for suffix in (".jsonl", ".tsv", ".json") for packed in ("", ".gz"))
_SHARED = ("xnli.{split}", "{split}")
_SINGLE = (
    "{code}/{split}", "{split}/{code}", "xnli_{code}_{split}", "xnli_{split}_{code}", "xnli.{split}.{code}",
    "{code}_{split}", "{split}_{code}", "{split}.{code}", "{code}.{split}", "xnli_{code}", "xnli.{code}", "{code}",
)  # fmt: skip
_PREMISE, _HYPOTHESIS, _LABEL = ("premise", "sentence1"), ("hypothesis", "hypo", "sentence2"), ("label", "gold_label")


class XnliSet(NamedTuple):
    """The examples of one language.

    Attributes:
        path: the file they came from, with its ``sha256``.
        examples: objects with ``premise``, ``hypothesis`` and ``label``, an index into ``LABELS``.
        left_out: other files that could have held the language, and why they were not taken.
    """

    code: str
    path: Path
    sha256: str
    examples: tuple[dict[str, Any], ...]
    left_out: dict[str, str]


def read_xnli(folder: Path, split: str, codes: Sequence[str] | None = None) -> list[XnliSet]:
    """The examples of every language asked for, or of all that are there.

    Args:
        split: validation or test.
        codes: languages; each must have examples.

    Raises:
        UserError: naming the file, the line and the field, or the language without a file.
    """
    found = []
    for code in codes or XNLI_LANGUAGES:
        get_language(code)
        own = _find(folder, _SINGLE, split, code)
        files = [*own, *_find(folder, _SHARED, split, code)]
        left_out: dict[str, str] = {}
        for path in files:
            examples = tuple(_read(path, None if path in own else code))
            if examples:
                left_out |= {str(other): f"{path} is read" for other in files[files.index(path) + 1 :]}
                found.append(XnliSet(code, path, sha256_of(path), examples, left_out))
                break
            left_out[str(path)] = f"no example of {code} in it"
        else:
            if codes is not None and not files:
                raise UserError(f"--langs {code}: no XNLI {split} file for it in {folder}; {_expected(split, code)}")
            if codes is not None or own:
                raise UserError(f"{files[0]}: no example of {code}")
    if not found:
        raise UserError(f"--xnli-dir {folder}: no XNLI {split} file in it; {_expected(split, 'de')}")
    for one, other in itertools.combinations(found, 2):
        if one.examples == other.examples:
            raise UserError(f"{one.path} and {other.path}: the same examples for {one.code} and {other.code}")
    return found


def _find(folder: Path, patterns: Sequence[str], split: str, code: str) -> list[Path]:
    """The files that are there, the likeliest first."""
    names = itertools.product(patterns, SPLITS[split], _SUFFIXES)
    paths = (folder / (pattern.format(split=alias, code=code) + suffix) for pattern, alias, suffix in names)
    return [path for path in dict.fromkeys(paths) if path.is_file()]


def _expected(split: str, code: str) -> str:
    alias = SPLITS[split][:2][-1]
    return f"looked for xnli.{alias}.tsv, xnli.{alias}.jsonl, {code}/{split}.jsonl, {code}.jsonl and the like"


def _read(path: Path, code: str | None) -> Iterator[dict[str, Any]]:
    """Examples of a file: those of one language, or all if ``code`` is None."""
    names = _field_names(path)
    if not names:
        return
    premise, hypothesis, label = (
        next((name for name in spellings if name in names), spellings[0])
        for spellings in (_PREMISE, _HYPOTHESIS, _LABEL)
    )
    fields = Fields((premise, hypothesis), label, None if code is None else "language")
    labels = Labels(_SPELLINGS, field=label)
    for example in read_examples(path, fields, code or "", is_shared=code is not None):
        yield {"premise": example.texts[0], "hypothesis": example.texts[1], "label": labels.find(example)}


def _field_names(path: Path) -> list[str]:
    """The names in the first line that is not empty."""
    first = next((line for line in read_utf8_lines(path) if line.strip()), "")
    if file_format(path) == "TSV":
        return first.split("\t")
    try:
        return list(json.loads(first)) if first else []
    except (ValueError, TypeError):
        return [""]  # reading the line says what is wrong with it
