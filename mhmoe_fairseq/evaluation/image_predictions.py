"""What a model that was fine-tuned on images predicts for a split: figures beside baselines, and files."""

from __future__ import annotations

import abc
import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..common.files import atomic_open, write_json


@dataclass(frozen=True)
class Predictions(abc.ABC):
    """Base of the predictions of all tasks.

    Args:
        split: its name.
        baselines: name -> what one gets without looking at the images, in percent.

    Attributes:
        unit: what is counted.
    """

    unit = "rows"

    split: str
    baselines: dict[str, float] = field(default_factory=dict, kw_only=True)

    @property
    @abc.abstractmethod
    def count(self) -> int:
        """How many are predicted."""

    @property
    @abc.abstractmethod
    def figures(self) -> dict[str, float]:
        """Name -> percent; nothing where the split has no labels."""

    @abc.abstractmethod
    def write(self, path: Path) -> None:
        """Write the predictions atomically."""

    def describe(self) -> str:
        """The line that ``mhmoe predict`` prints."""
        shown = {**self.figures, **(self.baselines if self.figures else {})}
        start = f"{self.split}: {self.count:,} {self.unit}"
        return ", ".join([start, *(f"{name} {value:.2f}" for name, value in shown.items())])


@dataclass(frozen=True)
class Answers(Predictions):
    """Of visual question answering.

    Args:
        question_ids: ``(Q,)``.
        answers: the most probable answer of each question.
        scores: ``(Q,)`` their soft scores, from 0 to 1; None where the split has no labels.
    """

    unit = "questions"

    question_ids: np.ndarray
    answers: list[str]
    scores: np.ndarray | None

    @property
    def count(self) -> int:
        """Questions."""
        return len(self.answers)

    @property
    def figures(self) -> dict[str, float]:
        """``VQA score``: the mean soft score."""
        return {} if self.scores is None else {"VQA score": 100 * float(self.scores.mean())}

    def write(self, path: Path) -> None:
        """The layout of VQAv2's evaluation server: ``[{"question_id", "answer"}]``."""
        records = zip(self.question_ids.tolist(), self.answers)
        lines = ",\n".join(
            json.dumps({"question_id": question, "answer": answer}, ensure_ascii=False) for question, answer in records
        )
        _write(path, f"[\n{lines}\n]\n")


@dataclass(frozen=True)
class Judgements(Predictions):
    """Of statements about two images.

    Args:
        identifiers: of the statements.
        judgements: ``(S,)`` 1 for true.
        labels: ``(S,)`` right ones, or None.
    """

    unit = "statements"

    identifiers: list[str]
    judgements: np.ndarray
    labels: np.ndarray | None

    @property
    def count(self) -> int:
        """Statements."""
        return len(self.identifiers)

    @property
    def figures(self) -> dict[str, float]:
        """``accuracy``, and ``consistency`` where the identifiers allow it."""
        if self.labels is None:
            return {}
        found = {"accuracy": 100 * float((self.judgements == self.labels).mean())}
        return found if self.consistency is None else {**found, "consistency": self.consistency}

    @property
    def consistency(self) -> float | None:
        """Share of sentences in percent that are judged rightly with all of their images, as NLVR2 defines it.

        ``test1-12-0-1`` is the pair of images 0 with sentence 1 of set 12; None where an identifier is of another
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

    def write(self, path: Path) -> None:
        """The layout of NLVR2's own ``metrics.py``: CSV lines ``identifier,True`` or ``identifier,False``."""
        rows = ([identifier, str(bool(judged))] for identifier, judged in zip(self.identifiers, self.judgements))
        _write(path, _csv(rows))


@dataclass(frozen=True)
class Classes(Predictions):
    """Of images.

    Args:
        paths: of the images.
        classes: names by label.
        best: ``(P, 5)`` the most probable classes, most probable first; fewer columns where there are fewer classes.
        labels: ``(P,)``.
    """

    unit = "images"

    paths: list[str]
    classes: list[str]
    best: np.ndarray
    labels: np.ndarray

    @property
    def count(self) -> int:
        """Images."""
        return len(self.paths)

    @property
    def figures(self) -> dict[str, float]:
        """``top-1`` and ``top-5``: how often the right class is among the most probable ones."""
        is_right = self.best == self.labels[:, None]
        return {"top-1": 100 * float(is_right[:, 0].mean()), "top-5": 100 * float(is_right.any(axis=1).mean())}

    def write(self, path: Path) -> None:
        """CSV lines of path, right class and most probable classes, with a header."""
        header = ["image_path", "label", *(f"top{place + 1}" for place in range(self.best.shape[1]))]
        rows = [
            [file, self.classes[label], *(self.classes[guess] for guess in best)]
            for file, label, best in zip(self.paths, self.labels, self.best)
        ]
        _write(path, _csv([header, *rows]))


@dataclass(frozen=True)
class Recalls(Predictions):
    """Of images and captions.

    Args:
        images, captions: how many.
        recalls: name -> percent, see ``tasks._recall.recalls``.
    """

    unit = "captions"

    images: int
    captions: int
    recalls: dict[str, float]

    @property
    def count(self) -> int:
        """Captions."""
        return self.captions

    @property
    def figures(self) -> dict[str, float]:
        """Recall at 1, 5 and 10 of the texts of an image and of the image of a text, and their mean."""
        ranked = {f"{way} R@{rank}": self.recalls[f"{way}_r{rank}"] for way in ("text", "image") for rank in (1, 5, 10)}
        return {"mean recall": self.recalls["mean_recall"], **ranked}

    def write(self, path: Path) -> None:
        """The figures as a JSON object: there are no predictions of single rows."""
        write_json(path, {"split": self.split, "images": self.images, "captions": self.captions, **self.figures})


def _csv(rows: Iterable[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    with atomic_open(path) as stream:
        stream.write(text.encode())
