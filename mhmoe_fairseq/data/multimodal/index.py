"""BEiT-3's data files: indexes of one JSON object per line, one file or two per task and split, and VQA's answers.

fairseq's names of splits are used: ``train``, ``valid``, ``test``. The files keep the names that unilm's scripts give
them, so that COCO, VQAv2, NLVR2, Flickr30k and ImageNet work as prepared by those.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import UserError
from ...common.files import atomic_open, json_line, read_json_lines
from .fields import FIELDS, MISSING, Builder, Lists, parse_record

ANSWERS_FILE = "answer2label.txt"
TASKS = tuple(FIELDS)

_PLAIN: dict[str, tuple[str, ...]] = {"train": ("train",), "valid": ("valid",), "test": ("test",)}
_KARPATHY: dict[str, tuple[str, ...]] = {"train": ("train",), "valid": ("val",), "test": ("test",)}
# Task -> the file's name around the part, and fairseq's split -> parts; a part after the first may be absent.
_PARTS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "image": ("image.{}.jsonl", _PLAIN),
    "pair": ("pair.{}.jsonl", _PLAIN),
    "vqa": (
        "vqa.{}.jsonl",
        {"train": ("train", "trainable_val"), "valid": ("rest_val",), "test": ("test",), "test-dev": ("test-dev",)},
    ),
    "nlvr2": ("nlvr2.{}.index.jsonl", {"train": ("train",), "valid": ("dev",), "test": ("test-P",)}),
    "captioning": ("{name}.{}.jsonl", _KARPATHY),
    "retrieval": ("{name}.{}.jsonl", _KARPATHY),
    "imagenet": ("imagenet.{}.index.jsonl", {"train": ("train",), "valid": ("val",), "test": ("val",)}),
}
# Parts that take the place of a split's own where their file is there: ImageNet's test images are without labels, so
# that val is test; prepared data have test images of their own, on which no checkpoint was selected.
_PREFERRED = {("imagenet", "test"): ("test",)}
# The data sets that have a task's files, the default first.
NAMES = {"captioning": ("coco_captioning", "nocaps"), "retrieval": ("coco_retrieval", "flickr30k")}
_TRAINED_ON = {("nocaps", "train"): "coco_captioning"}


@dataclass(frozen=True, eq=False)
class Index:
    """The rows of a split by column: ``index["image_path"][row]``.

    Columns of paths and words are ``Strings``, of ids and scores ``Lists``, of numbers int64 arrays, in which
    ``MISSING`` stands for none. A column that no row has is absent.

    Args:
        task: whose fields the columns are.
        columns: field -> column.
        files: the files that were read, in order.
        starts: the first row of each file.
        lines: ``(rows,)`` the line of each row in its file.
    """

    task: str
    columns: dict[str, Lists | np.ndarray]
    files: list[Path]
    starts: list[int]
    lines: np.ndarray

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, field: str) -> Any:
        return self.columns[field]

    def __contains__(self, field: str) -> bool:
        return field in self.columns

    def place(self, row: int) -> str:
        """Return ``file:line`` of a row."""
        return f"{self.files[np.searchsorted(self.starts, row, side='right') - 1]}:{self.lines[row]}"

    def check_ids(self, field: str, message: str, limit: int) -> None:
        """``UserError`` for the first id that is not below ``limit``: its line, and ``message`` with both numbers."""
        column = self.columns[field]
        ids = column.values if isinstance(column, Lists) else column
        if ids.max(initial=-1) >= limit:
            first = int(np.argmax(ids >= limit))
            row = column.row_of(first) if isinstance(column, Lists) else first
            raise UserError(f"{self.place(row)}: {message.format(ids[first], limit)}")

    def record(self, row: int) -> dict[str, Any]:
        """Return a row as its file has it, without optional fields that it lacks."""
        record = {}
        for name, column in self.columns.items():
            is_none = row in column.null_rows if isinstance(column, Lists) else column[row] == MISSING
            if not (is_none and FIELDS[self.task][name].is_optional):
                value = None if is_none else column[row]
                record[name] = value.tolist() if isinstance(value, (np.ndarray, np.integer)) else value
        return record


def index_files(folder: Path, task: str, split: str, name: str | None = None) -> list[Path]:
    """Return the files that a split is read from: one that must be there, and others if they are.

    Args:
        task: one of ``TASKS``.
        split: ``train``, ``valid`` or ``test``; of vqa also ``test-dev``.
        name: of the data set, see ``NAMES``; None for the first that the folder has. ``nocaps`` trains on COCO.

    Raises:
        UserError: for a task, split or name that there is not.
    """
    if task not in _PARTS:
        raise UserError(f"task {task!r} has no index files; there are {', '.join(TASKS)}")
    pattern, splits = _PARTS[task]
    if split not in splits:
        raise UserError(f"{task} has no split {split!r}; there are {', '.join(splits)}")
    names = NAMES.get(task, ("",))
    if name is not None and name not in names:
        raise UserError(
            f"{task} has no data set {name!r}; there are {', '.join(filter(None, names)) or 'none to name'}"
        )
    choices = [
        [folder / pattern.format(part, name=_TRAINED_ON.get((candidate, split), candidate)) for part in splits[split]]
        for candidate in (names if name is None else [name])
    ]
    preferred = [[folder / pattern.format(part)] for part in _PREFERRED.get((task, split), ())]
    files = next((files for files in [*preferred, *choices] if files[0].is_file()), choices[0])
    return [files[0], *(file for file in files[1:] if file.is_file())]


def written_file(folder: Path, task: str, split: str) -> Path:
    """Return the file that ``mhmoe prepare`` writes a split to, whatever the folder has."""
    pattern, splits = _PARTS[task]
    part = _PREFERRED.get((task, split), splits[split])[0]
    return folder / pattern.format(part, name=NAMES.get(task, ("",))[0])


def read_index(
    folder: Path, task: str, split: str, name: str | None = None, *, vocabulary_size: int | None = None
) -> Index:
    """Read and check the rows of a split.

    Args:
        folder: what the images' paths are relative to; see ``index_files`` for the other arguments.
        vocabulary_size: if given, token ids must be below it.

    Raises:
        FileNotFoundError: if the split has no file.
        UserError: naming file, line and field: no JSON, a field that is missing or of another kind, a token of another
            dictionary, a path that leaves the folder; or no row at all.
    """
    files, starts, lines = index_files(folder, task, split, name), [], array("i")
    builders = {field: Builder(kind.typecode) for field, kind in FIELDS[task].items()}
    kept = {field for field, kind in FIELDS[task].items() if not kind.is_optional}
    if not files[0].is_file():
        raise FileNotFoundError(
            f"{files[0]} is missing: make the data with mhmoe prepare image-text, or as unilm's scripts do"
        )
    for file in files:
        starts.append(len(lines))
        for place, record in read_json_lines(file):
            values = parse_record(record, task, place)
            largest = max(values.get("text_segment") or (0,))
            if vocabulary_size is not None and largest >= vocabulary_size:
                raise UserError(
                    f"{place}: token id {largest}, dict.txt has {vocabulary_size:,} words: made with another dictionary"
                )
            for field, value in values.items():
                builders[field].append(value)
            if len(kept) < len(builders):
                kept.update(field for field, value in values.items() if value is not None)
            lines.append(int(place.rpartition(":")[2]))
    if not lines:
        raise UserError(f"{files[0]}: has no lines, so split {split} of {task} is empty")
    columns = {field: builder.finish() for field, builder in builders.items() if field in kept}
    return Index(task, columns, files, starts, np.array(lines))


def write_index(file: Path, task: str, records: Iterable[Mapping[str, Any]]) -> int:
    """Write an index file atomically, one line per record; what ``read_index`` would refuse is refused.

    Args:
        file: ``index_files`` knows the names; a second part of a split, such as ``vqa.trainable_val.jsonl``, is a file
            of its own.
        task: whose fields the records have; other fields are not written.

    Returns:
        the number of lines.

    Raises:
        UserError: naming the file, the line to be, the field and the rule.
    """
    number = 0
    with atomic_open(file) as stream:
        for number, record in enumerate(records, start=1):
            values = parse_record(record, task, f"{file}:{number}")
            stream.write(json_line({field: value for field, value in values.items() if field in record}))
    return number


def read_answers(folder: Path) -> list[str]:
    """Return the answers of visual question answering, by label; empty lines are passed over.

    Raises:
        FileNotFoundError: if the folder has no ``answer2label.txt``.
        UserError: naming file and line: no JSON, another label than the place counted from 0, an answer twice;
            or fewer than two answers.
    """
    file = folder / ANSWERS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: it names the answers, one per line, as unilm's scripts write it")
    answers: dict[str, str] = {}
    for place, row in read_json_lines(file):
        if not isinstance(row, dict) or not isinstance(row.get("answer"), str) or type(row.get("label")) is not int:
            raise UserError(f'{place}: must be {{"answer": text, "label": number}}')
        answer, label = row["answer"], row["label"]
        if label != len(answers):
            raise UserError(f"{place}: label {label}, must be its place counted from 0: {len(answers)}")
        if answer in answers:
            raise UserError(f"{place}: answer {answer!r} is on line {answers[answer].rpartition(':')[2]} too")
        answers[answer] = place
    if len(answers) < 2:
        raise UserError(f"{file}: {len(answers)} answers, must be at least two")
    return list(answers)


def write_answers(folder: Path, answers: Sequence[str]) -> None:
    """Write ``answer2label.txt`` atomically, with an answer's position as its label."""
    with atomic_open(folder / ANSWERS_FILE) as stream:
        stream.writelines(json_line({"answer": answer, "label": label}) for label, answer in enumerate(answers))
