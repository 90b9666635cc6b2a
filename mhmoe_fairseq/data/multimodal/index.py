"""BEiT-3's index files: one JSON object per line, one file or two per task and split.

fairseq's names of splits are used: ``train``, ``valid``, ``test``. The files keep the names that unilm's scripts give
them, so that COCO, VQAv2, NLVR2, Flickr30k and ImageNet work as prepared by those.
"""

from array import array
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Sequence

import numpy as np

from ...common.errors import UserError
from ...common.files import atomic_open, json_line, read_json_lines
from .columns import MISSING, Lists, Strings
from .fields import FIELDS, parse_record

TASKS = tuple(FIELDS)

_PLAIN = {"train": ("train",), "valid": ("valid",), "test": ("test",)}
_KARPATHY = {"train": ("train",), "valid": ("val",), "test": ("test",)}
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


class Index:
    """The rows of a split by column: ``index["image_path"][row]``.

    Columns of paths and words are ``Strings``, of ids and scores ``Lists``, of numbers int64 arrays, in which
    ``columns.MISSING`` stands for none. A column that no row has is absent.

    Args:
        task: whose fields the columns are.
        columns: field -> column.
        files: the files that were read, in order.
        starts: the first row of each file.
        lines: ``(rows,)`` the line of each row in its file.
    """

    def __init__(
        self,
        task: str,
        columns: dict[str, Lists | np.ndarray],
        files: Sequence[Path],
        starts: Sequence[int],
        lines: np.ndarray,
    ) -> None:
        self.task, self.files = task, tuple(files)
        self._columns, self._starts, self._lines = columns, np.asarray(starts), lines

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, field: str) -> Any:
        return self._columns[field]

    def __contains__(self, field: str) -> bool:
        return field in self._columns

    @property
    def nbytes(self) -> int:
        """Memory that the rows take."""
        return self._lines.nbytes + sum(column.nbytes for column in self._columns.values())

    def place(self, row: int) -> str:
        """``file:line`` of a row."""
        return f"{self.files[np.searchsorted(self._starts, row, side='right') - 1]}:{self._lines[row]}"

    def record(self, row: int) -> dict[str, Any]:
        """A row as its file has it; optional fields that it lacks are left out."""
        fields = FIELDS[self.task]
        record = {name: self._plain(name, row) for name in self._columns}
        return {name: value for name, value in record.items() if value is not None or not fields[name].is_optional}

    def _plain(self, name: str, row: int) -> Any:
        column = self._columns[name]
        if isinstance(column, Strings):
            return column[row] or None
        if isinstance(column, Lists):
            return None if column.is_null(row) else column[row].tolist()
        return None if column[row] == MISSING else int(column[row])


def index_files(folder: Path, task: str, split: str, name: str | None = None) -> list[Path]:
    """The files that a split is read from: one that must be there, and others if they are.

    Args:
        task: one of ``TASKS``.
        split: ``train``, ``valid`` or ``test``; of vqa also ``test-dev``.
        name: of the data set, for captioning (``coco_captioning`` or ``nocaps``, which trains on COCO) and retrieval
            (``coco_retrieval`` or ``flickr30k``); None for the first that the folder has.

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
        [folder / pattern.format(part, name=_trained_on(candidate, split)) for part in splits[split]]
        for candidate in (names if name is None else [name])
    ]
    preferred = [[folder / pattern.format(part)] for part in _PREFERRED.get((task, split), ())]
    files = next((files for files in [*preferred, *choices] if files[0].is_file()), choices[0])
    return [files[0], *(file for file in files[1:] if file.is_file())]


def written_file(folder: Path, task: str, split: str) -> Path:
    """The file that ``mhmoe prepare`` writes a split to, whatever ``folder`` has; arguments as of ``index_files``."""
    pattern, splits = _PARTS[task]
    part = _PREFERRED.get((task, split), splits[split])[0]
    return folder / pattern.format(part, name=NAMES.get(task, ("",))[0])


def _trained_on(name: str, split: str) -> str:
    return "coco_captioning" if (name, split) == ("nocaps", "train") else name


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
    builders = {field: kind.builder() for field, kind in FIELDS[task].items()}
    seen: set[str] = set()
    for file in files:
        starts.append(len(lines))
        for place, values in _read_records(file, task):
            _check_vocabulary(values, vocabulary_size, place)
            for field, value in values.items():
                builders[field].append(value)
            if len(seen) < len(builders):
                seen.update(field for field, value in values.items() if value is not None)
            lines.append(int(place.rpartition(":")[2]))
    if not lines:
        raise UserError(f"{files[0]}: has no lines, so split {split} of {task} is empty")
    kept = {field for field, kind in FIELDS[task].items() if field in seen or not kind.is_optional}
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
            kept = {field: value for field, value in values.items() if field in record}
            stream.write(json_line(kept))
    return number


def _read_records(file: Path, task: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """``file:line`` and checked fields; empty lines are passed over."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: make the data with mhmoe prepare image-text, or as unilm's scripts do"
        )
    for place, record in read_json_lines(file):
        yield place, parse_record(record, task, place)


def _check_vocabulary(values: dict[str, Any], size: int | None, place: str) -> None:
    largest = max(values.get("text_segment") or (0,))
    if size is not None and largest >= size:
        raise UserError(f"{place}: token id {largest}, dict.txt has {size:,} words: made with another dictionary")
