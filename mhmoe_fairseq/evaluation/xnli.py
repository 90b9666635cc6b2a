"""Zero-shot XNLI: lm-eval's official prompts on the user's own copy of the data, language by language.

A copy is one file per language, or the official files of all languages, ``xnli.dev.tsv``, ``xnli.test.tsv`` and their
``.jsonl`` twins, with the fields ``language``, ``gold_label``, ``sentence1`` and ``sentence2``. Files per language may
name these ``premise``, ``hypothesis`` and ``label``, as the data set that lm-eval downloads does, whose labels are 0, 1
and 2.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoints.open import was_trained_with
from ..common.errors import UserError
from ..common.files import atomic_open, json_line, read_utf8_lines, sha256_of, write_json
from ..data.classification import Fields, Labels, file_format, read_examples
from ..data.languages import PAPER_LANGUAGES, XNLI_LANGUAGES, get_language
from .packaged_tasks import score_task, write_task
from .records import Record, mean_of

if TYPE_CHECKING:
    from .lm_eval_model import MHMoEHarnessModel

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
CHANCE = 100 / len(LABELS)


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
    examples: tuple[dict[str, str | int], ...]
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


def _read(path: Path, code: str | None) -> Iterator[dict[str, str | int]]:
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


def write_tasks(folder: Path, sets: Sequence[XnliSet], split: str) -> list[str]:
    """Write each language's examples, in the format that the packaged task reads, and its task.

    ``mhmoe zero-shot lm-eval --include_path FOLDER`` finds the files, ``xnli_<code>.jsonl`` and ``xnli_<code>.yaml``.

    Returns:
        the tasks' names.

    Raises:
        UserError: lm-eval has no such task.
    """
    names = []
    for one in sets:
        name = f"xnli_{one.code}"
        data = folder / f"{name}.jsonl"
        with atomic_open(data) as stream:
            stream.writelines(map(json_line, one.examples))
        write_task(folder, name, f"xnli/{name}.yaml", data, split)
        names.append(name)
    return names


def evaluate_xnli(
    model: "MHMoEHarnessModel",
    codes: Sequence[str],
    tasks: Path,
    scores: Path,
    *,
    language_symbols: bool | None,
    limit: int | None,
    say: Callable[[str], None],
) -> Record:
    """Evaluate one language after the other: lm-eval's ``acc``, and how often each label was predicted.

    A model that knows nothing predicts one label almost always.

    Args:
        model: lm-eval's view of the model.
        codes: languages with a task in ``tasks``, the folder of ``write_tasks``.
        scores: folder for the candidates' log-probabilities, in the order of ``LABELS``, and the right answers.
        language_symbols: lead every text with its language's symbol; None: if the model was trained so.
        limit: score only so many examples of each.
        say: told of each language when it is done.
    """
    import lm_eval

    if language_symbols is None:
        language_symbols = was_trained_with(model.hub, "mhmoe_language_token")
    accuracies, predicted = {}, {}
    for code in codes:
        model.scorer.set_language(code if language_symbols else None)
        found = score_task(model, tasks, f"xnli_{code}", ["acc"], limit)
        accuracies[code] = dataclasses.replace(found.metrics["acc"], baselines={"chance": CHANCE})
        say(f"{code} {accuracies[code].value:.1f} ± {accuracies[code].stderr or 0:.1f}")
        labels = [int(sample["target"]) for sample in found.samples]
        rows = [{"log_probs": row, "label": label} for row, label in zip(found.log_probs, labels)]
        write_json(scores / f"{code}.json", rows)
        chosen = [row.index(max(row)) for row in found.log_probs]
        predicted[code] = {label: chosen.count(index) for index, label in enumerate(LABELS)}
    metrics = {"accuracy": mean_of(list(accuracies.values()))}
    if set(PAPER_LANGUAGES) <= set(accuracies):
        metrics["mean of the paper's languages"] = mean_of([accuracies[code] for code in PAPER_LANGUAGES])
    return Record(
        "zero-shot",
        "xnli",
        metrics,
        {code: {"accuracy": accuracy} for code, accuracy in accuracies.items()},
        settings={
            "language symbols": language_symbols,
            "limit": limit,
            "predicted": predicted,
            "prompts, targets and metric": f"lm-eval {lm_eval.__version__}",
        },
    )
