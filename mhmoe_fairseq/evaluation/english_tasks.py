"""P1's table 2: zero-shot answers to English questions, by lm-eval's own prompts and metrics."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..common.files import write_json
from ..data.zero_shot_tasks import PACKAGED, TASKS
from .packaged_tasks import LANGUAGE_SYMBOLS, RELEASE, Scored, active_experts, release, score_task, write_task
from .records import ExpertLoads, LayerLoads, Metric, Record, mean_percent

if TYPE_CHECKING:
    from .expert_loads import LoadCounter
    from .lm_eval_model import MHMoEHarnessModel

PARTS = {(name, score): f"{task.title} {score}" for name, task in TASKS.items() for score in task.scores}
EIGHT = [part for (name, _), part in PARTS.items() if name in PACKAGED]
# Means that a paper's can stand beside: of all nine tasks, and of the eight that can be had. The paper's avg is the
# mean of its 14 columns, not of its nine tasks: so say its own numbers.
COMPARABLE = {f"mean of {len(PARTS)} scores": list(TASKS), f"mean of {len(EIGHT)} scores": list(PACKAGED)}
_ERRORS, _CUT, LENGTH = "errors of sums", "cut texts", "most tokens"  # names of settings


class Answers(NamedTuple):
    """What a model's answers to one task were worth.

    Attributes:
        scores: by the record's name of them, with what guesses reach.
        error: standard error of their sum in percent; their own are not independent, they share the questions.
        cut: how many texts were ``cut`` on the left, of all that were ``scored``.
        sha256: of the file of questions.
        loads: the experts' while they were scored; none of a dense model.
    """

    scores: dict[str, Metric]
    error: float
    cut: dict[str, int]
    sha256: str
    loads: list[LayerLoads]


def answers_of(record: Record) -> dict[str, Answers]:
    """Returns what a record of this module says of each of its tasks."""
    rows = [] if record.experts is None else record.experts.layers
    return {
        name: Answers(
            {part: record.parts[part]["accuracy"] for (of, _), part in PARTS.items() if of == name},
            record.settings[_ERRORS][name],
            record.settings[_CUT][name],
            sha256,
            [row for row in rows if row.part == name],
        )
        for name, sha256 in record.data["files"].items()
    }


def known_answers(kept: Record | None, files: Mapping[str, str], language_symbols: bool = False) -> dict[str, Answers]:
    """Returns what need not be scored again: tasks of the same questions by the same release of lm-eval.

    Args:
        kept: an earlier record of the same checkpoint.
        files: hash of each task's file.
        language_symbols: as for :func:`evaluate_english`.
    """
    if kept is None or kept.settings.get(RELEASE) != release() or _ERRORS not in kept.settings:
        return {}
    if kept.settings.get(LANGUAGE_SYMBOLS, False) != language_symbols:
        return {}
    found = answers_of(kept).items()
    return {name: answers for name, answers in found if files.get(name, answers.sha256) == answers.sha256}


def evaluate_english(
    model: "MHMoEHarnessModel",
    counter: "LoadCounter",
    files: Mapping[str, str],
    questions: Path,
    out: Path,
    *,
    known: Mapping[str, Answers],
    digest: str,
    scores: Path,
    language_symbols: bool = False,
    limit: int | None,
    say: Callable[[str], None],
) -> Record:
    """Score one task after the other; the record has these and what is known of others.

    Args:
        model: lm-eval's view of the model.
        counter: of the model's experts.
        files: hash of each task's file.
        questions: folder of ``mhmoe prepare zero-shot``.
        out: where lm-eval's tasks are written.
        known: tasks that are not scored again.
        digest: tells these questions from others.
        scores: folder for the answers' log-probabilities, in order, and which of them are right.
        language_symbols: lead every text with the symbol of English.
        limit: score only so many questions of each.
        say: told of each task when it is done.
    """
    found = dict(known)
    model.scorer.set_language("en" if language_symbols else None)
    for name in (name for name in files if name not in known):
        task = TASKS[name]
        write_task(out, name, task.packaged, questions / task.file, task.split)
        model.num_cut = model.num_scored = 0
        with counter.counting(name):
            scored = score_task(model, out, name, task.scores.values(), limit)
        right = [task.right(sample["doc"]) for sample in scored.samples]
        guesses = task.describe([sample["doc"] for sample in scored.samples])
        measured = {
            PARTS[name, score]: replace(scored.metrics[metric], baselines=guesses)
            for score, metric in task.scores.items()
        }
        rows = [{"log_probs": log_probs, "right": flags} for log_probs, flags in zip(scored.log_probs, right)]
        write_json(scores / f"{name}.json", rows)
        cut = {"cut": model.num_cut, "scored": model.num_scored}
        loads = [] if counter.loads is None else counter.loads.of(name).layers
        found[name] = Answers(measured, _error(scored, task.scores.values()), cut, files[name], loads)
        told = ", ".join(f"{part} {metric.value:.1f} ± {metric.stderr or 0:.1f}" for part, metric in measured.items())
        shortened = f"; {model.num_cut:,} of {model.num_scored:,} texts cut on the left" if model.num_cut else ""
        say(f"{told} ({', '.join(f'{guess} {value:.1f}' for guess, value in guesses.items())}){shortened}")
    in_order = {name: found[name] for name in TASKS if name in found}
    settings: dict[str, object] = {"limit": limit, LENGTH: model.max_length, RELEASE: release()}
    settings |= {LANGUAGE_SYMBOLS: True} if language_symbols else {}
    return _record_of(in_order, settings, {"path": str(questions), "digest": digest, "split": "english"})


def _record_of(found: Mapping[str, Answers], settings: dict[str, object], data: dict[str, object]) -> Record:
    means = {title: mean_over([found[name] for name in of]) for title, of in COMPARABLE.items() if {*of} <= {*found}}
    scored = sum(len(answers.scores) for answers in found.values())
    rows = [row for answers in found.values() for row in answers.loads]
    experts = ExpertLoads.of_parts(rows) if rows else None
    return Record(
        "zero-shot",
        "english",
        # A mean of other tasks has a name that no mean of a paper's has.
        {
            **(means or {f"mean of {scored} of {len(PARTS)} scores": mean_over(found.values())}),
            **active_experts(experts),
        },
        {part: {"accuracy": metric} for answers in found.values() for part, metric in answers.scores.items()},
        experts,
        absent={task.title: "not scored" for name, task in TASKS.items() if name not in found},
        settings={
            **settings,
            _ERRORS: {name: answers.error for name, answers in found.items()},
            _CUT: {name: answers.cut for name, answers in found.items()},
        },
        data={**data, "files": {name: answers.sha256 for name, answers in found.items()}},
    )


def _error(scored: Scored, metrics: Collection[str]) -> float:
    """Standard error of the sum of a task's scores over its questions."""
    return mean_percent([sum(float(sample[metric]) for metric in metrics) for sample in scored.samples]).stderr or 0.0


def mean_over(tasks: Collection[Answers]) -> Metric:
    """Returns the mean of all scores of independent tasks, with what chance and the commonest answers reach.

    Where no answer is the commonest, in TruthfulQA, chance stands for it.
    """
    scores = [metric for answers in tasks for metric in answers.scores.values()]
    guesses = {
        "chance": [metric.baselines["chance"] for metric in scores],
        "majority": [metric.baselines.get("majority", metric.baselines["chance"]) for metric in scores],
    }
    return Metric(
        sum(metric.value for metric in scores) / len(scores),
        "%",
        math.sqrt(sum(answers.error**2 for answers in tasks)) / len(scores),
        sum(next(iter(answers.scores.values())).count or 0 for answers in tasks),
        {name: sum(values) / len(values) for name, values in guesses.items()},
    )
