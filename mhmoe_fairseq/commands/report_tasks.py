"""``mhmoe report-tasks``: models fine-tuned on images side by side, in the columns of P1's table 4."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..analysis.reports.paper_numbers import P1, TABLE_4, TABLE_4_COLUMNS
from ..common.arguments import existing_folder, output_file, plain_name
from ..common.console import say
from ..common.errors import UserError
from ..common.files import atomic_open, read_json
from ..common.tables import markdown_table, number

# Column, folder of the task, split, figure: in the order of P1's table 4, then tasks that it does not have.
_COLUMNS = (
    ("questions, valid", "vqa", "valid", "VQA score"),
    ("questions, test", "vqa", "test", "VQA score"),
    ("statements, valid", "nlvr2", "valid", "accuracy"),
    ("statements, test", "nlvr2", "test", "accuracy"),
    ("BLEU-4", "captioning", "test", "BLEU-4"),
    ("METEOR", "captioning", "test", "METEOR"),
    ("CIDEr", "captioning", "test", "CIDEr"),
    ("SPICE", "captioning", "test", "SPICE"),
    ("classes, test", "image_classification", "test", "top-1"),
    ("retrieval, test", "retrieval", "test", "mean recall"),
)
_DERIVED = (
    "Questions and statements are derived from the images' metadata by templates: these are neither VQAv2 nor NLVR2, "
    "and no figure here compares with a paper's."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``mhmoe report-tasks``."""
    parser.add_argument(
        "folder",
        type=existing_folder,
        metavar="DIR",
        help="holds TASK/NAME/scores-SPLIT.json, as finetune.sh leaves them",
    )
    parser.add_argument(
        "--names", type=plain_name, nargs="+", metavar="NAME", help="models, in this order (default: all there are)"
    )
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write the table there as Markdown, too")


def run(args: argparse.Namespace) -> int:
    """Print and write the table.

    Raises:
        ValueError, OSError: if there are no scores of a model, or a file is not what ``mhmoe predict`` wrote.
    """
    names = args.names or find_names(args.folder)
    text = report_tasks(args.folder, names)
    if args.out is not None:
        with atomic_open(args.out) as stream:
            stream.write(text.encode())
    say(text)
    return 0


def find_names(folder: Path) -> list[str]:
    """The models that have scores of any task.

    Raises:
        UserError: if there is none.
    """
    tasks = dict.fromkeys(task for _, task, _, _ in _COLUMNS)
    names = {path.parent.name for task in tasks for path in folder.glob(f"{task}/*/scores-*.json")}
    if not names:
        raise UserError(f"{folder}: no TASK/NAME/scores-SPLIT.json in it, with TASK one of {', '.join(tasks)}")
    return sorted(names)


def report_tasks(folder: Path, names: Sequence[str]) -> str:
    """The Markdown report: our models, what guessing without images reaches, and the paper's table.

    Raises:
        UserError: if a model has no scores at all.
    """
    scores = {
        (name, task, split): _read(folder / task / name / f"scores-{split}.json")
        for name in names
        for _, task, split, _ in _COLUMNS
    }
    for name in names:
        if not any(found for key, found in scores.items() if key[0] == name):
            raise UserError(f"{folder}: no scores of {name}")
    columns = [column for column in _COLUMNS if any(scores[(name, *column[1:3])] for name in names)]
    titles = [column[0] for column in columns]
    figures = [[_figure(scores[(name, task, split)], what) for _, task, split, what in columns] for name in names]
    guesses = _guesses(names, columns, scores)
    rows = [[name, *map(number, row)] for name, row in zip(names, figures)]
    rows += [[f"*{guess}*", *(number(values.get(title)) for title in titles)] for guess, values in guesses.items()]
    parts = ["# Fine-tuned on images", markdown_table(["", *titles], rows)]
    notes = (
        _sizes(names, columns, scores),
        _against_guessing(names, columns, figures, guesses, scores),
        *_absent(scores),
    )
    parts += [note for note in notes if note]
    if any(found.get("derived") for found in scores.values()):
        parts.append(_DERIVED)
    paper = [[model, *(number(value, 1) for value in row)] for model, row in TABLE_4.items()]
    parts += [f"## The paper's table 4\n\n{P1}, 8 experts, on VQAv2, NLVR2 and COCO: no figure of ours.",
              markdown_table(["", *TABLE_4_COLUMNS], paper)]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _read(path: Path) -> dict[str, Any]:
    """The scores of a file, or nothing if there is none.

    Raises:
        UserError: if the file is something else.
    """
    if not path.is_file():
        return {}
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("figures"), dict):
        raise UserError(f"{path}: not the scores that mhmoe predict or mhmoe caption write")
    return found


def _figure(scores: dict[str, Any], name: str) -> float | None:
    return scores.get("figures", {}).get(name)


def _guesses(
    names: Sequence[str], columns: Sequence[tuple[str, str, str, str]], scores: dict[tuple[str, str, str], dict]
) -> dict[str, dict[str, float | None]]:
    """What each way of guessing has in each column; the same for every model, so any model's scores will do."""
    found: dict[str, dict[str, float | None]] = {}
    for title, task, split, figure in columns:
        for name in names:
            scored = scores[(name, task, split)]
            for baseline, value in scored.get("baselines", {}).items():
                found.setdefault(baseline, {})[title] = value
            if scored.get("constant"):  # mhmoe caption's; null without training captions
                found.setdefault("one caption for all", {})[title] = scored["constant"]["figures"].get(figure)
    return found


def _against_guessing(
    names: Sequence[str], columns: Sequence[tuple[str, str, str, str]], rows: Sequence[Sequence[float | None]],
    guesses: dict[str, dict[str, float | None]], scores: dict[tuple[str, str, str], dict],
) -> str:  # fmt: skip
    """A line for each column that can be guessed: by how much each model is above the best way of guessing."""
    lines = []
    for place, (title, task, split, _) in enumerate(columns):
        best = max((values[title] for values in guesses.values() if values.get(title) is not None), default=None)
        if best is None:
            continue
        gains = {name: round(row[place] - best, 2) for name, row in zip(names, rows) if row[place] is not None}
        answers = next((scores[(name, task, split)].get("count") for name in gains), None)
        margin = 2 * _standard_error(best, answers) if answers else 0.0
        failed = ", ".join(name for name, gain in gains.items() if gain <= margin)
        lines.append(
            f"- {title} ({best:.2f}{f', two standard errors {margin:.2f}' if margin else ''}): "
            + ", ".join(f"{name} {gain:+.2f}" for name, gain in gains.items())
            + (f"; **not clearly above it: {failed}**" if failed else "")
        )
    return "\n".join(["Above the best way of guessing without looking, by points:", "", *lines]) if lines else ""


def _standard_error(percent: float, count: int) -> float:
    """Of a share of right answers, in points."""
    return math.sqrt(percent * (100 - percent) / count)


def _sizes(
    names: Sequence[str], columns: Sequence[tuple[str, str, str, str]], scores: dict[tuple[str, str, str], dict]
) -> str:
    sizes = {}
    for _, task, split, _ in columns:
        found = next(filter(None, (scores[(name, task, split)] for name in names)))
        count = found["count"] if "count" in found else found["images"]  # of predictions, or of captions
        sizes[f"{task} {split}"] = f"{task} {split} {count:,}"
    return "Scored on: " + ", ".join(sizes.values()) + ". In percent or times 100; in italics: without looking."


def _absent(scores: dict[tuple[str, str, str], dict]) -> list[str]:
    reasons = {}
    for found in scores.values():
        reasons.update(found.get("absent", {}))
    return [f"{metric.upper()} is absent: {reason}." for metric, reason in reasons.items()]
