"""P1's table 2: zero-shot answers to English questions, by lm-eval's own prompts and metrics."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.files import write_json
from ..data.zero_shot_tasks import PACKAGED, TASKS
from .packaged_tasks import Scored, score_task, write_task
from .records import Metric, Record, mean_percent

if TYPE_CHECKING:
    from .lm_eval_model import MHMoEHarnessModel

PARTS = {(name, score): f"{task.title} {score}" for name, task in TASKS.items() for score in task.scores}
EIGHT = [part for (name, _), part in PARTS.items() if name in PACKAGED]
# Means that a paper's can stand beside: of the eight tasks that can be had, and of all nine. The paper's avg is the
# mean of its 14 columns, not of its nine tasks: so say its own numbers.
COMPARABLE = {f"mean of {len(EIGHT)} scores": EIGHT, f"mean of {len(PARTS)} scores": list(PARTS.values())}


def evaluate_english(
    model: "MHMoEHarnessModel",
    files: Mapping[str, str],
    questions: Path,
    out: Path,
    *,
    scores: Path,
    limit: int | None,
    say: Callable[[str], None],
) -> Record:
    """Score one task after the other.

    Args:
        model: lm-eval's view of the model.
        files: hash of each task's file.
        questions: folder of ``mhmoe prepare zero-shot``.
        out: where lm-eval's tasks are written.
        scores: folder for the answers' log-probabilities, in order, and which of them are right.
        limit: score only so many questions of each.
        say: told of each task when it is done.
    """
    import lm_eval

    parts: dict[str, dict[str, Metric]] = {}
    sums: list[Metric] = []  # of each task, over its scores
    cut = {}
    for name in files:
        task = TASKS[name]
        write_task(out, name, task.packaged, questions / task.file, task.split)
        model.num_cut = model.num_scored = 0
        found = score_task(model, out, name, task.scores.values(), limit)
        right = [task.right(sample["doc"]) for sample in found.samples]
        guesses = task.describe([sample["doc"] for sample in found.samples])
        measured = {PARTS[name, score]: found.metrics[metric] for score, metric in task.scores.items()}
        parts |= {part: {"accuracy": replace(metric, baselines=guesses)} for part, metric in measured.items()}
        sums.append(_sum_of(found, list(task.scores.values()), guesses["chance"]))
        cut[name] = [model.num_cut, model.num_scored]
        rows = [{"log_probs": log_probs, "right": flags} for log_probs, flags in zip(found.log_probs, right)]
        write_json(scores / f"{name}.json", rows)
        told = ", ".join(f"{part} {metric.value:.1f} ± {metric.stderr or 0:.1f}" for part, metric in measured.items())
        shortened = f"; {model.num_cut:,} of {model.num_scored:,} texts cut on the left" if model.num_cut else ""
        say(f"{told} ({', '.join(f'{guess} {value:.1f}' for guess, value in guesses.items())}){shortened}")
    mean = _mean_over(sums, len(parts))
    tasks = len({TASKS[name].title for name in files})
    comparable = {title: mean for title, of in COMPARABLE.items() if list(parts) == of}
    if len(parts) == len(PARTS):  # the eight are among them
        eight = [of for name, of in zip(files, sums) if name in PACKAGED]
        comparable |= {next(iter(COMPARABLE)): _mean_over(eight, len(EIGHT))}
    return Record(
        "zero-shot",
        "english",
        {"accuracy": mean, **comparable},
        parts,
        absent={task.title: "not scored" for name, task in TASKS.items() if name not in files},
        settings={
            "limit": limit,
            "accuracy": f"mean of {len(parts)} scores of {tasks} task{'s' if tasks > 1 else ''}",
            "cut texts": {name: dict(zip(("cut", "scored"), counts)) for name, counts in cut.items()},
            "most tokens": model.max_length,
            "prompts, targets and metric": f"lm-eval {lm_eval.__version__}",
        },
        data={
            "path": str(questions),
            "digest": hashlib.sha256(json.dumps([dict(files), limit], sort_keys=True).encode()).hexdigest(),
            "split": "english",
            "files": dict(files),
        },
    )


def _sum_of(found: Scored, metrics: Sequence[str], chance: float) -> Metric:
    """Mean over questions of the sum of a task's scores, whose errors are not independent: they share the questions."""
    sums = mean_percent([sum(float(sample[metric]) for metric in metrics) for sample in found.samples])
    return replace(sums, baselines={"chance": chance * len(metrics)})


def _mean_over(sums: Sequence[Metric], count: int) -> Metric:
    """The mean of ``count`` scores, from the sums of independent tasks."""
    stderr = math.sqrt(sum((metric.stderr or 0.0) ** 2 for metric in sums)) / count
    chance = sum(metric.baselines["chance"] for metric in sums) / count
    questions = sum(metric.count or 0 for metric in sums)
    return Metric(sum(metric.value for metric in sums) / count, "%", stderr, questions, {"chance": chance})
