"""The nine English tasks of P1's table 2: which answers are right, and the folder of ``mhmoe prepare zero-shot``."""

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..common.errors import UserError
from ..common.files import sha256_of
from .identity import MANIFEST, read_manifest

Question = Mapping[str, Any]
_MAKE = "mhmoe prepare zero-shot --dest {} makes it"


class ZeroShotTask(NamedTuple):
    """A task of lm-eval, by its name there.

    Attributes:
        title: the paper's name.
        packaged: lm-eval's own definition, below its folder of tasks.
        split: what lm-eval scores, ``validation`` or ``test``.
        scores: what the paper reports, by its name in the paper, with lm-eval's name of the metric.
        right: from a question to 1 for each right answer and 0 for the others, in their order.
        rows: number of questions.
        majority: share in percent of the answer that is right most often; None where the order tells the right one.
    """

    name: str
    title: str
    packaged: str
    split: str
    scores: Mapping[str, str]
    right: Callable[[Question], list[int]]
    rows: int
    majority: float | None
    licence: str

    @property
    def file(self) -> str:
        """Name of the file with the questions, in lm-eval's fields; TruthfulQA's two tasks share one."""
        return f"{self.name.partition('_mc')[0]}.jsonl"

    def describe(self, questions: Sequence[Question]) -> dict[str, float]:
        """Returns what guesses reach, in percent: ``chance``, and ``majority`` where there is one."""
        right = [self.right(question) for question in questions]
        found = {"chance": 100 * sum(sum(flags) / len(flags) for flags in right) / len(right)}
        if self.majority is not None:
            commonest = Counter(flags.index(1) for flags in right).most_common(1)[0][1]
            found["majority"] = 100 * commonest / len(right)
        return found


def _flags(size: int, index: int) -> list[int]:
    return [int(other == index) for other in range(size)]


def _by_label(question: Question) -> list[int]:
    return [int(label == question["answerKey"]) for label in question["choices"]["label"]]


def _of_two(question: Question) -> list[int]:
    return _flags(2, int(question["label"]))


_BOTH = {"acc": "acc", "acc_norm": "acc_norm"}
_ACC = {"acc": "acc"}
_TASKS = (
    ZeroShotTask("arc_challenge", "ARC-C", "arc/arc_challenge.yaml", "test", _BOTH, _by_label, 1172, 26.54,
                 "CC BY-SA 4.0"),
    ZeroShotTask("arc_easy", "ARC-E", "arc/arc_easy.yaml", "test", _BOTH, _by_label, 2376, 26.64, "CC BY-SA 4.0"),
    ZeroShotTask("rte", "RTE", "glue/rte/default.yaml", "validation", _ACC, _of_two, 277, 52.71, "GLUE's terms"),
    ZeroShotTask("openbookqa", "OpenBookQA", "openbookqa/openbookqa.yaml", "test", _BOTH, _by_label, 500, 27.60,
                 "Apache 2.0"),
    ZeroShotTask("winogrande", "Winogrande", "winogrande/default.yaml", "validation", _ACC,
                 lambda question: _flags(2, int(question["answer"]) - 1), 1267, 50.43, "CC BY"),
    ZeroShotTask("piqa", "PIQA", "piqa/piqa.yaml", "validation", _ACC, _of_two, 1838, 50.49, "AFL 3.0"),
    ZeroShotTask("boolq", "BoolQ", "super_glue/boolq/default.yaml", "validation", _ACC, _of_two, 3270, 62.17,
                 "CC BY-SA 3.0"),
    ZeroShotTask("hellaswag", "HellaSwag", "hellaswag/hellaswag.yaml", "validation", _BOTH,
                 lambda question: _flags(len(question["endings"]), int(question["label"])), 10042, 25.73, "MIT"),
    ZeroShotTask("truthfulqa_mc1", "TruthfulQA", "truthfulqa/truthfulqa_mc1.yaml", "validation", {"mc1": "acc"},
                 lambda question: question["mc1_targets"]["labels"], 817, None, "your copy"),
    ZeroShotTask("truthfulqa_mc2", "TruthfulQA", "truthfulqa/truthfulqa_mc2.yaml", "validation", {"mc2": "acc"},
                 lambda question: question["mc2_targets"]["labels"], 817, None, "your copy"),
)  # fmt: skip
TASKS = {task.name: task for task in _TASKS}
TRUTHFULQA = tuple(name for name in TASKS if name.startswith("truthfulqa"))
PACKAGED = tuple(name for name in TASKS if name not in TRUTHFULQA)


def digest_of(folder: Path, limit: int | None) -> str:
    """Returns what tells the eight packaged tasks' first ``limit`` questions from others, whichever are scored."""
    files = read_manifest(folder)["files"]
    hashes = [files.get(TASKS[name].file, {}).get("sha256") for name in PACKAGED]
    return hashlib.sha256(json.dumps([hashes, limit]).encode()).hexdigest()


def choose_tasks(names: str | None) -> list[ZeroShotTask] | None:
    """Returns the tasks named, with commas in between; None for all that a folder has.

    Raises:
        UserError: an unknown name, with the nearest ones; a name that is given twice, or none.
    """
    if names is None:
        return None
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in TASKS:
            near = difflib.get_close_matches(name.lower(), TASKS, n=2, cutoff=0.4)
            meant = f"did you mean {' or '.join(near)}? " if near else ""
            raise UserError(f"--tasks {name}: no such task; {meant}There are {', '.join(TASKS)}")
    if not wanted or len(set(wanted)) < len(wanted):
        raise UserError(f"--tasks {names!r}: must name tasks, each once, of {', '.join(TASKS)}")
    return [TASKS[name] for name in wanted]


def open_tasks(folder: Path, wanted: Sequence[ZeroShotTask] | None) -> dict[str, str]:
    """Returns the hash of the file of each task wanted, or of each that the folder has; it is as it was prepared.

    Raises:
        UserError: naming the folder, the task or the file, and the command that makes it.
    """
    manifest, make = read_manifest(folder), _MAKE.format(folder)
    if not manifest:
        raise UserError(f"--tasks-dir {folder}: has no {MANIFEST}, so its preparation never ended; {make}")
    if manifest.get("kind") != "zero-shot" or not {"files", "tasks"} <= manifest.keys():
        raise UserError(f"--tasks-dir {folder}: {MANIFEST} is not of mhmoe prepare zero-shot; {make}")
    found = {}
    for task in wanted or [TASKS[name] for name in TASKS if name in manifest["tasks"]]:
        if task.name not in manifest["tasks"]:
            how = "give it --truthfulqa with your copy" if task.name in TRUTHFULQA else make
            raise UserError(f"--tasks {task.name}: {folder} was prepared without it; {how}")
        path = folder / task.file
        if not path.is_file() or sha256_of(path) != manifest["files"].get(task.file, {}).get("sha256"):
            state = "is not the file that was prepared" if path.is_file() else "is missing"
            raise UserError(f"{path}: {state}; {make} again with --overwrite")
        found[task.name] = manifest["files"][task.file]["sha256"]
    return found
