"""Data sets of images with questions, statements, classes or captions, all of them rows of an index."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...common.errors import UserError
from ..multimodal.fields import MISSING
from ..multimodal.index import Index
from ..multimodal.masking import check_fraction, mask_index
from .base import DatasetSettings, ImageTextDataset, Sample

Transform = Callable[[Image.Image, np.random.Generator], Tensor]


class IndexedDataset(ImageTextDataset):
    """One sample per row of an index, with its image and, if the index has texts, its text.

    Args:
        transform: ``TrainTransform`` or ``EvaluationTransform``.
        num_classes: of what rows are labelled with, where that is known.

    Attributes:
        labels: field with a row's class or classes, and the message for one that is not below ``num_classes``.
        has_targets: whether the split is labelled.

    Raises:
        UserError: naming the line of such a class.
    """

    index: Index
    labels: ClassVar[tuple[str, str]]
    has_targets = True

    def __init__(
        self, index: Index, settings: DatasetSettings, transform: Transform, num_classes: int | None = None
    ) -> None:
        super().__init__(settings.positions(index), settings, index)
        self.transform, self.num_classes = transform, num_classes
        if num_classes is not None:
            index.check_ids(*self.labels, num_classes)

    def make_sample(self, row: int, rng: np.random.Generator) -> Sample:
        """Return ``image``, and ``text`` if there are texts."""
        sample = {"image": self.transform(self.read(row), rng)}
        if "text_segment" in self.index:
            sample["text"] = self.text(row)
        return sample


class VQADataset(IndexedDataset):
    """Questions about images, whose classes are the answers.

    A batch has ``question_ids (B,)`` and ``targets (B, answers)`` float, the soft score of every answer, or None if
    the split has no answers.
    """

    num_classes: int
    stream = 4
    numbers = {"question_ids": "qid"}
    labels = ("labels", "answer {}, answer2label.txt has {:,} answers")

    def __init__(self, index: Index, settings: DatasetSettings, transform: Transform, num_classes: int) -> None:
        super().__init__(index, settings, transform, num_classes)
        self.has_targets = len(index["labels"].values) > 0

    def add_targets(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Add ``targets``."""
        batch["targets"] = torch.zeros(len(samples), self.num_classes) if self.has_targets else None
        if self.has_targets:
            for scores, row in zip(batch["targets"], batch["id"].tolist()):
                scores[torch.from_numpy(self.index["labels"][row]).long()] = torch.from_numpy(self.index["scores"][row])


class ImagePairs(IndexedDataset):
    """Statements about two images, as in NLVR2.

    A batch has all left images and then all right ones, ``images (2B, 3, H, W)``, the texts twice, ``text_tokens
    (2B, S)``, ``targets (B,)``, 1 where the statement is true, or None if the split has none, and ``identifiers``,
    a list of strings.

    Raises:
        UserError: naming the first line that lacks a label where others have one.
    """

    stream = 5
    numbers = {"targets": "label"}

    def __init__(self, index: Index, settings: DatasetSettings, transform: Transform) -> None:
        super().__init__(index, settings, transform)
        self.sizes = 2 * self.sizes
        self.has_targets = "label" in index
        if self.has_targets and (index["label"] == MISSING).any():
            row = int(np.argmax(index["label"] == MISSING))
            raise UserError(f"{index.place(row)}: no label, but other lines of the split have one")

    def make_sample(self, row: int, rng: np.random.Generator) -> Sample:
        """Return ``image``, ``image2`` and ``text``."""
        sample = super().make_sample(row, rng)
        return {**sample, "image2": self.transform(self.read(row, "image2_path"), rng)}

    def add_targets(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Add the identifiers, and the right images."""
        inputs = batch["net_input"]
        inputs["images"] = torch.cat([inputs["images"], torch.stack([sample["image2"] for sample in samples])])
        inputs["text_tokens"] = torch.cat([inputs["text_tokens"]] * 2)
        batch["identifiers"] = [self.index["identifier"][row] for row in batch["id"].tolist()]


class LabelledImages(IndexedDataset):
    """Images with a class; a batch has ``targets (B,)``."""

    stream = 6
    numbers = {"targets": "label"}
    labels = ("label", "class {}, there are {:,} classes")


class CaptionDataset(IndexedDataset):
    """Captions to be completed in training, images to be captioned in evaluation.

    In training every row is a sample: a batch has the masked captions, ``text_targets (B, S)`` with padding where
    nothing is predicted, and their number as ``ntokens``. In evaluation every image is one, without text, whatever
    the number of rows that it has. ``image_ids (B,)`` are in both.

    Args:
        fraction: of a caption's tokens that are masked in training; ``</s>`` is one of them.

    Raises:
        UserError: in training, naming the first line whose text is null.
    """

    stream = 7
    numbers = {"image_ids": "image_id"}

    def __init__(self, index: Index, settings: DatasetSettings, transform: Transform, fraction: float = 0.7) -> None:
        check_fraction(fraction, "--caption-mask-prob")
        mask_index(settings.dictionary)
        super().__init__(index, settings, transform)
        self._fraction = fraction
        self._rows = np.arange(len(index))
        if settings.training:
            null = index["text_segment"].null_rows
            if len(null):
                raise UserError(f"{index.place(null[0])}: text_segment is null, but training needs captions")
        else:
            self._rows = np.sort(np.unique(index["image_id"], return_index=True)[1])
            self.sizes = np.full(len(self._rows), settings.image_positions, dtype=np.int32)

    def index_row(self, row: int) -> int:
        """Return the first row of the image in evaluation."""
        return int(self._rows[row])

    def make_sample(self, row: int, rng: np.random.Generator) -> Sample:
        """Return ``image``; in training ``text`` and ``text_targets`` too."""
        sample = super().make_sample(row, rng)
        text = sample.pop("text")
        return (
            {**sample, **self.masked(text, self._fraction, rng, masks_end=True)} if self.settings.training else sample
        )

    def add_targets(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Add ``text_targets`` in training."""
        if self.settings.training:
            self.add_text_targets(batch, samples)


class RetrievalDataset(IndexedDataset):
    """Images with captions to be found by each other; a batch has ``image_ids (B,)``.

    Rows of one ``image_id`` are captions of one image, in evaluation too.
    """

    stream = 8
    numbers = {"image_ids": "image_id"}
