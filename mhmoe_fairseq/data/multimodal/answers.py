"""The answers of visual question answering: ``answer2label.txt``, one JSON object per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Sequence

from ...common.errors import UserError
from ...common.files import atomic_open, read_utf8_lines

ANSWERS_FILE = "answer2label.txt"


def read_answers(folder: Path) -> list[str]:
    """The answers in the order of their labels; empty lines are passed over.

    Raises:
        FileNotFoundError: if the folder has no ``answer2label.txt``.
        UserError: naming file and line: no JSON, another label than the place counted from 0, an answer twice;
            or fewer than two answers.
    """
    file = folder / ANSWERS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: it names the answers, one per line, as unilm's scripts write it")
    answers: dict[str, int] = {}
    for number, line in enumerate(read_utf8_lines(file), start=1):
        if not line.strip():
            continue
        answer = _parse(line, len(answers), f"{file}:{number}")
        if answer in answers:
            raise UserError(f"{file}:{number}: answer {answer!r} is on line {answers[answer]} too")
        answers[answer] = number
    if len(answers) < 2:
        raise UserError(f"{file}: {len(answers)} answers, must be at least two")
    return list(answers)


def write_answers(folder: Path, answers: Sequence[str]) -> None:
    """Write ``answer2label.txt`` atomically; an answer's label is its place."""
    with atomic_open(folder / ANSWERS_FILE) as stream:
        for label, answer in enumerate(answers):
            stream.write((json.dumps({"answer": answer, "label": label}, ensure_ascii=False) + "\n").encode())


def _parse(line: str, label: int, place: str) -> str:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("answer"), str) or type(row.get("label")) is not int:
        raise UserError(f'{place}: must be {{"answer": text, "label": number}}')
    if row["label"] != label:
        raise UserError(f"{place}: label {row['label']}, must be its place counted from 0: {label}")
    return row["answer"]
