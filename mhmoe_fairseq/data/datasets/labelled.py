"""Data sets of images with questions, statements or classes."""

from typing import Any, Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...common.errors import UserError
from ..multimodal.collate import Sample
from ..multimodal.columns import MISSING
from ..multimodal.index import Index
from .base import DatasetSettings, ImageTextDataset

Transform = Callable[[Image.Image, np.random.Generator], Tensor]


class IndexedDataset(ImageTextDataset):
    """One sample per row of an index, with its image and, if the index has texts, its text.

    Args:
        index: with ``image_path``.
        settings: how rows are read.
        transform: ``TrainTransform`` or ``EvaluationTransform``.
    """

    def __init__(self, index: Index, settings: DatasetSettings, transform: Transform) -> None:
        super().__init__(settings.positions(index), settings, index)
        self.transform = transform

    def make_sample(self, row: int, rng: np.random.Generator) -> Sample:
        """``image``, and ``text`` if there are texts."""
        sample = {"image": self.transform(self.read(row), rng)}
        if "text_segment" in self.index:
            sample["text"] = self.text(row)
        return sample


class VQADataset(IndexedDataset):
    """Questions about images.

    A batch has ``question_ids (B,)`` and ``targets (B, answers)`` float, the soft score of every answer, or None if
    the split has no answers.

    Args:
        num_answers: of ``answer2label.txt``.

    Raises:
        UserError: naming the line whose answer that file does not have.
    """

    stream = 4

    def __init__(self, index: Index, settings: DatasetSettings, transform: Transform, num_answers: int) -> None:
        super().__init__(index, settings, transform)
        self.num_answers = num_answers
        self.has_targets = len(index["labels"].values) > 0
        if self.has_targets and index["labels"].values.max() >= num_answers:
            row = next(row for row in range(len(index)) if max(index["labels"][row], default=0) >= num_answers)
            raise UserError(
                f"{index.place(row)}: answer {max(index['labels'][row])}, answer2label.txt has {num_answers:,} answers"
            )

    def make_sample(self, row: int, rng: np.random.Generator) -> Sample:
        """``image``, ``text``, ``question_id`` and ``targets (answers,)``."""
        sample = {**super().make_sample(row, rng), "question_id": int(self.index["qid"][row])}
        if self.has_targets:
            scores = torch.zeros(self.num_answers)
            scores[torch.from_numpy(self.index["labels"][row]).long()] = torch.from_numpy(self.index["scores"][row])
            sample["targets"] = scores
        return sample

    def add_targets(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Add the keys."""
        batch["question_ids"] = torch.tensor([sample["question_id"] for sample in samples])
        batch["targets"] = torch.stack([sample["targets"] for sample in samples]) if self.has_targets else None


class ImagePairs(IndexedDataset):
    """Statements about two images, as in NLVR2.

    A batch has all left images and then all right ones, ``images (2B, 3, H, W)``, the texts twice, ``text_tokens
    (2B, S)``, ``targets (B,)``, 1 where the statement is true, or None if the split has none, and ``identifiers``,
    a list of strings.

    Raises:
        UserError: naming the first line that lacks a label where others have one.
    """

    stream = 5

    def __init__(self, index: Index, settings: DatasetSettings, transform: Transform) -> None:
        super().__init__(index, settings, transform)
        self.sizes = 2 * self.sizes
        self.has_targets = "label" in index
        if self.has_targets and (index["label"] == MISSING).any():
            row = int(np.argmax(index["label"] == MISSING))
            raise UserError(f"{index.place(row)}: no label, but other lines of the split have one")

    def make_sample(self, row: int, rng: np.random.Generator) -> Sample:
        """``image``, ``image2``, ``text``, ``identifier`` and ``target``."""
        sample = super().make_sample(row, rng)
        sample["image2"] = self.transform(self.read(row, "image2_path"), rng)
        sample["identifier"] = self.index["identifier"][row]
        if self.has_targets:
            sample["target"] = int(self.index["label"][row])
        return sample

    def add_targets(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Add the keys, and the right images."""
        inputs = batch["net_input"]
        inputs["images"] = torch.cat([inputs["images"], torch.stack([sample["image2"] for sample in samples])])
        inputs["text_tokens"] = torch.cat([inputs["text_tokens"]] * 2)
        batch["identifiers"] = [sample["identifier"] for sample in samples]
        batch["targets"] = torch.tensor([sample["target"] for sample in samples]) if self.has_targets else None


class LabelledImages(IndexedDataset):
    """Images with a class; a batch has ``targets (B,)``.

    Args:
        num_classes: if given, classes must be below it.

    Raises:
        UserError: naming the line of a class that is not.
    """

    stream = 6

    def __init__(
        self, index: Index, settings: DatasetSettings, transform: Transform, num_classes: int | None = None
    ) -> None:
        super().__init__(index, settings, transform)
        if num_classes is not None and index["label"].max() >= num_classes:
            row = int(np.argmax(index["label"] >= num_classes))
            raise UserError(f"{index.place(row)}: class {index['label'][row]}, there are {num_classes:,} classes")

    def make_sample(self, row: int, rng: np.random.Generator) -> Sample:
        """``image`` and ``target``."""
        return {**super().make_sample(row, rng), "target": int(self.index["label"][row])}

    def add_targets(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Add the key."""
        batch["targets"] = torch.tensor([sample["target"] for sample in samples])
