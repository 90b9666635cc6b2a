"""lm-eval's own tasks on local files: its prompts, answers and metrics by inclusion, its downloads left out."""

import logging
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..common.errors import UserError
from ..common.files import write_json
from .records import ExpertLoads, Metric

if TYPE_CHECKING:
    from .lm_eval_model import MHMoEHarnessModel


RELEASE = "prompts, targets and metric"  # a record's setting, :func:`release`
LANGUAGE_SYMBOLS = "language symbols"  # another, whether texts begin with them


class Scored(NamedTuple):
    """What lm-eval found of one task.

    Attributes:
        metrics: by lm-eval's name, in percent with its standard error.
        samples: lm-eval's own, in the order of the questions.
        log_probs: of every question's answers.
    """

    metrics: dict[str, Metric]
    samples: list[dict[str, Any]]
    log_probs: list[list[float]]


def release() -> str:
    """Returns whose prompts and metrics they are."""
    import lm_eval

    return f"lm-eval {lm_eval.__version__}"


def active_experts(experts: ExpertLoads | None) -> dict[str, Metric]:
    """Returns the share of active experts over all tasks, mean of the MoE layers; nothing of a dense model."""
    shares = [] if experts is None else experts.of(None).active()
    return {"active experts": Metric(100 * statistics.fmean(shares), "%")} if shares else {}


def stay_offline() -> None:
    """Keep lm-eval and its data library off the network: they read this when they are imported."""
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def write_task(folder: Path, name: str, packaged: str, data: Path, split: str) -> None:
    """Write ``NAME.yaml``, which includes a packaged task and changes only where the data come from.

    Args:
        packaged: the task's own file below lm-eval's folder of tasks.
        data: file of JSON lines in the fields that the task reads.
        split: that it is scored on, ``validation`` or ``test``.

    Raises:
        UserError: lm-eval has no such task.
    """
    import lm_eval

    include = Path(lm_eval.__file__).parent / "tasks" / packaged
    if not include.is_file():
        raise UserError(f"{include}: lm-eval has no task {name}; another version of it may")
    task = {
        "include": str(include),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(data.resolve())}, "cache_dir": str(folder.resolve() / "cache")},
        "training_split": None,
        "validation_split": "validation" if split == "validation" else None,
        "test_split": "test" if split == "test" else None,
    }
    write_json(folder / f"{name}.yaml", task)  # what is JSON is YAML


def score_task(
    model: "MHMoEHarnessModel", folder: Path, name: str, metrics: Iterable[str], limit: int | None
) -> Scored:
    """Run a task of ``write_task`` on its first ``limit`` questions, or on all.

    Args:
        metrics: lm-eval's names of the shares that are wanted, such as ``acc``.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(model=model, tasks=[name], task_manager=manager, limit=limit, log_samples=True)
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    measured = {}
    for metric in metrics:
        value, stderr = (found["results"][name][f"{key},none"] for key in (metric, f"{metric}_stderr"))
        known = isinstance(stderr, (int, float))  # of one question there is none
        measured[metric] = Metric(100 * float(value), "%", 100 * float(stderr) if known else None, len(samples))
    log_probs = [[float(log_prob) for log_prob, _ in sample["filtered_resps"]] for sample in samples]
    return Scored(measured, samples, log_probs)
