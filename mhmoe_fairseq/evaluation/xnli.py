"""Zero-shot XNLI: lm-eval's official prompts on the user's own copy of the data, language by language."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.files import atomic_open, json_line, write_json
from ..data.languages import PAPER_LANGUAGES
from ..data.xnli import LABELS, XnliSet
from .expert_loads import LoadCounter
from .packaged_tasks import LANGUAGE_SYMBOLS, RELEASE, active_experts, release, score_task, write_task
from .records import Metric, Record, mean_of, mean_percent

if TYPE_CHECKING:
    from .lm_eval_model import MHMoEHarnessModel

CHANCE = 100 / len(LABELS)


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
    counter: LoadCounter,
    codes: Sequence[str],
    tasks: Path,
    scores: Path,
    *,
    language_symbols: bool,
    limit: int | None,
    say: Callable[[str], None],
) -> Record:
    """Evaluate one language after the other: lm-eval's ``acc``, and how often each label was predicted.

    A model that knows nothing predicts one label almost always.

    Args:
        model: lm-eval's view of the model.
        counter: of the model's experts.
        codes: languages with a task in ``tasks``, the folder of ``write_tasks``.
        scores: folder for the candidates' log-probabilities, in the order of ``LABELS``, and the right answers.
        language_symbols: lead every text with its language's symbol.
        limit: score only so many examples of each.
        say: told of each language when it is done.
    """
    accuracies: dict[str, Metric] = {}
    rights: dict[str, list[float]] = {}
    predicted = {}
    for code in codes:
        model.scorer.set_language(code if language_symbols else None)
        with counter.counting(code):
            found = score_task(model, tasks, f"xnli_{code}", ["acc"], limit)
        rights[code] = [float(sample["acc"]) for sample in found.samples]
        accuracies[code] = dataclasses.replace(found.metrics["acc"], baselines={"chance": CHANCE})
        say(f"{code} {accuracies[code].value:.1f} ± {accuracies[code].stderr or 0:.1f}")
        labels = [int(sample["target"]) for sample in found.samples]
        rows = [{"log_probs": row, "label": label} for row, label in zip(found.log_probs, labels)]
        write_json(scores / f"{code}.json", rows)
        chosen = [row.index(max(row)) for row in found.log_probs]
        predicted[code] = {label: chosen.count(index) for index, label in enumerate(LABELS)}
    metrics = {"accuracy": _mean_over(codes, accuracies, rights)}
    if set(PAPER_LANGUAGES) <= set(accuracies):
        metrics["mean of the paper's languages"] = _mean_over(PAPER_LANGUAGES, accuracies, rights)
    return Record(
        "zero-shot",
        "xnli",
        {**metrics, **active_experts(counter.loads)},
        {code: {"accuracy": accuracy} for code, accuracy in accuracies.items()},
        counter.loads,
        settings={
            LANGUAGE_SYMBOLS: language_symbols,
            "limit": limit,
            "predicted": predicted,
            RELEASE: release(),
        },
    )


def _mean_over(codes: Sequence[str], accuracies: dict[str, Metric], rights: dict[str, list[float]]) -> Metric:
    """The mean of languages whose n-th examples are translations of each other: only examples are independent."""
    mean = mean_of([accuracies[code] for code in codes])
    if len({len(rights[code]) for code in codes}) > 1:  # not the same examples: as if all languages erred together
        return dataclasses.replace(mean, stderr=statistics.fmean(accuracies[code].stderr or 0.0 for code in codes))
    return dataclasses.replace(mean, stderr=mean_percent([*map(statistics.fmean, zip(*map(rights.get, codes)))]).stderr)
