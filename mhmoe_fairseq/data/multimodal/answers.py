"""The answers of visual question answering: ``answer2label.txt``, one JSON object per line."""

from collections.abc import Sequence
from pathlib import Path

from ...common.errors import UserError
from ...common.files import atomic_open, json_line, read_json_lines

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
    """Write ``answer2label.txt`` atomically; an answer's label is its place."""
    with atomic_open(folder / ANSWERS_FILE) as stream:
        stream.writelines(json_line({"answer": answer, "label": label}) for label, answer in enumerate(answers))
