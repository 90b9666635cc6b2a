"""lm-eval is an optional package: whether it is there, where it keeps its tasks, and its results as a record."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from .records import Metric, Record

INSTALL = 'pip install "mhmoe-fairseq[lm-eval]"'


def require_lm_eval() -> Path:
    """The folder of lm-eval's packaged tasks.

    Raises:
        UserError: lm-eval is not installed; the message has the line that installs it.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"lm-eval is not installed: {INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "tasks"


def stay_offline() -> None:
    """Keep lm-eval and its data library off the network; call it before they are imported."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def record_of(results: dict[str, Any]) -> Record:
    """What lm-eval wrote into its results file, task by task; the main metric is the mean of the tasks' first ones.

    Raises:
        UserError: no task has a number.
    """
    parts = {task: found for task, values in results["results"].items() if (found := _metrics(results, task, values))}
    if not parts:
        raise UserError("lm-eval's results hold no number")
    firsts = [next(iter(metrics.values())) for metrics in parts.values()]
    mean = Metric(sum(metric.value for metric in firsts) / len(firsts), "", count=len(firsts))
    version = {"lm-eval": results["lm_eval_version"]}
    return Record("zero-shot", "lm-eval", {"mean over tasks": mean}, parts, settings=version)


def _metrics(results: dict[str, Any], task: str, values: dict[str, Any]) -> dict[str, Metric]:
    """``acc,none`` and the like, and their standard errors, as lm-eval names them."""
    count = results.get("n-samples", {}).get(task, {}).get("effective")
    found = {}
    for key, value in values.items():
        name, _, variant = key.partition(",")
        if variant and not name.endswith("_stderr") and isinstance(value, (int, float)):
            stderr = values.get(f"{name}_stderr,{variant}")
            title = name if variant == "none" else f"{name}, {variant}"
            found[title] = Metric(value, "", stderr if isinstance(stderr, (int, float)) else None, count)
    return found
