"""What a model that was fine-tuned on pictures predicts for a split: figures beside baselines, and files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from ..data.files import atomic_open, write_json


class Predictions(Protocol):
    """What is known of a split after a model has seen it."""

    @property
    def has_scores(self) -> bool:
        """Whether the split has labels to compare with."""

    def describe(self) -> Iterator[str]:
        """The lines that ``mhmoe predict`` prints."""

    def write(self, path: Path) -> None:
        """Write the predictions."""


@dataclass(frozen=True)
class Answers:
    """Of visual question answering.

    Args:
        split: its name.
        question_ids: ``(Q,)``.
        answers: the most probable answer of each question.
        scores: ``(Q,)`` their soft scores, from 0 to 1; None where the split has no labels.
        baselines: name -> mean soft score in percent.
    """

    split: str
    question_ids: np.ndarray
    answers: list[str]
    scores: np.ndarray | None
    baselines: dict[str, float] = field(default_factory=dict)

    @property
    def has_scores(self) -> bool:
        """Whether the split has labels."""
        return self.scores is not None

    def describe(self) -> Iterator[str]:
        """One line."""
        figures = {} if self.scores is None else {"VQA score": 100 * float(self.scores.mean()), **self.baselines}
        yield _line(self.split, len(self.answers), "questions", figures)

    def write(self, path: Path) -> None:
        """The layout of VQAv2's evaluation server: ``[{"question_id", "answer"}]``."""
        records = zip(self.question_ids.tolist(), self.answers)
        lines = ",\n".join(
            json.dumps({"question_id": question, "answer": answer}, ensure_ascii=False) for question, answer in records
        )
        _write(path, f"[\n{lines}\n]\n")


@dataclass(frozen=True)
class Judgements:
    """Of statements about two pictures.

    Args:
        split: its name.
        identifiers: of the statements.
        judgements: ``(S,)`` 1 for true.
        labels: ``(S,)`` right ones, or None.
        baselines: name -> accuracy in percent.
    """

    split: str
    identifiers: list[str]
    judgements: np.ndarray
    labels: np.ndarray | None
    baselines: dict[str, float] = field(default_factory=dict)

    @property
    def has_scores(self) -> bool:
        """Whether the split has labels."""
        return self.labels is not None

    @property
    def consistency(self) -> float | None:
        """Share of sentences in percent that are judged rightly with all of their pictures, as NLVR2 defines it.

        ``test1-12-0-1`` is the pair of pictures 0 with sentence 1 of set 12; None where an identifier is of another
        form.
        """
        parts = [identifier.split("-") for identifier in self.identifiers]
        if self.labels is None or any(len(part) != 4 for part in parts):
            return None
        right: dict[tuple[str, ...], bool] = {}
        for (split, number, _, sentence), is_right in zip(parts, self.judgements == self.labels):
            key = (split, number, sentence)
            right[key] = right.get(key, True) and bool(is_right)
        return 100 * sum(right.values()) / len(right)

    def describe(self) -> Iterator[str]:
        """One line."""
        figures = {}
        if self.labels is not None:
            figures["accuracy"] = 100 * float((self.judgements == self.labels).mean())
            if self.consistency is not None:
                figures["consistency"] = self.consistency
            figures.update(self.baselines)
        yield _line(self.split, len(self.identifiers), "statements", figures)

    def write(self, path: Path) -> None:
        """The layout of NLVR2's own ``metrics.py``: CSV lines ``identifier,True`` or ``identifier,False``."""
        rows = ([identifier, str(bool(judged))] for identifier, judged in zip(self.identifiers, self.judgements))
        _write(path, _csv(rows))


@dataclass(frozen=True)
class Classes:
    """Of pictures.

    Args:
        split: its name.
        paths: of the pictures.
        classes: names by label.
        best: ``(P, 5)`` the most probable classes, most probable first; fewer columns where there are fewer classes.
        labels: ``(P,)``.
        baselines: name -> accuracy in percent.
    """

    split: str
    paths: list[str]
    classes: list[str]
    best: np.ndarray
    labels: np.ndarray
    baselines: dict[str, float] = field(default_factory=dict)

    has_scores: ClassVar[bool] = True

    def describe(self) -> Iterator[str]:
        """One line."""
        is_right = self.best == self.labels[:, None]
        figures = {"top-1": 100 * float(is_right[:, 0].mean()), "top-5": 100 * float(is_right.any(axis=1).mean())}
        yield _line(self.split, len(self.paths), "pictures", {**figures, **self.baselines})

    def write(self, path: Path) -> None:
        """CSV lines of path, right class and most probable classes, with a header."""
        header = ["image_path", "label", *(f"top{place + 1}" for place in range(self.best.shape[1]))]
        rows = [
            [file, self.classes[label], *(self.classes[guess] for guess in best)]
            for file, label, best in zip(self.paths, self.labels, self.best)
        ]
        _write(path, _csv([header, *rows]))


@dataclass(frozen=True)
class Recalls:
    """Of pictures and captions.

    Args:
        split: its name.
        pictures, captions: how many.
        recalls: name -> percent, see ``tasks._recall.recalls``.
    """

    split: str
    pictures: int
    captions: int
    recalls: dict[str, float]

    has_scores: ClassVar[bool] = True

    def describe(self) -> Iterator[str]:
        """A line for each direction."""
        ways = (("text", self.pictures, "captions by picture"), ("image", self.captions, "pictures by caption"))
        for direction, count, what in ways:
            found = {f"R@{rank}": self.recalls[f"{direction}_r{rank}"] for rank in (1, 5, 10)}
            # A picture has captions / pictures of the captions on average, so chance is the same both ways.
            yield _line(self.split, count, what, {**found, "R@1 by chance": 100 / self.pictures})
        yield f"{self.split}: mean recall {self.recalls['mean_recall']:.2f}"

    def write(self, path: Path) -> None:
        """The figures as a JSON object."""
        write_json(path, {"split": self.split, "pictures": self.pictures, "captions": self.captions, **self.recalls})


def _line(split: str, count: int, what: str, figures: dict[str, float]) -> str:
    start = f"{split}: {count:,} {what}"
    return ", ".join([start, *(f"{name} {value:.2f}" for name, value in figures.items())])


def _csv(rows: Iterable[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    with atomic_open(path) as stream:
        stream.write(text.encode())
