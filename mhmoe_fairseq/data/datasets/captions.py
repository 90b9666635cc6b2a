"""Data sets of images with captions, of which an image may have several."""

from typing import Any, Sequence

import numpy as np
import torch

from ...common.errors import UserError
from ..multimodal.collate import Sample, pad_key
from ..multimodal.index import Index
from ..multimodal.masking import check_fraction, mask_index, mask_text
from .base import DatasetSettings
from .labelled import IndexedDataset, Transform


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

    def make_sample(self, row: int, rng: np.random.Generator) -> Sample:
        """``image`` and ``image_id``; in training ``text`` and ``text_targets`` too."""
        row = int(self._rows[row])
        sample = {**super().make_sample(row, rng), "image_id": int(self.index["image_id"][row])}
        text = sample.pop("text")
        if self.settings.training:
            dictionary = self.settings.dictionary
            sample["text"], sample["text_targets"] = mask_text(text, self._fraction, dictionary, rng, masks_end=True)
        return sample

    def add_targets(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Add the keys."""
        batch["image_ids"] = torch.tensor([sample["image_id"] for sample in samples])
        if self.settings.training:
            pad = self.settings.dictionary.pad()
            batch["text_targets"] = pad_key(samples, "text_targets", pad)
            batch["ntokens"] = int(batch["text_targets"].ne(pad).sum())

    def place(self, row: int) -> str:
        """The index file and line."""
        return self.index.place(int(self._rows[row]))


class RetrievalDataset(IndexedDataset):
    """Images with captions to be found by each other; a batch has ``image_ids (B,)``.

    Rows of one ``image_id`` are captions of one image, in evaluation too.
    """

    stream = 8

    def make_sample(self, row: int, rng: np.random.Generator) -> Sample:
        """``image``, ``text`` and ``image_id``."""
        return {**super().make_sample(row, rng), "image_id": int(self.index["image_id"][row])}

    def add_targets(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Add the key."""
        batch["image_ids"] = torch.tensor([sample["image_id"] for sample in samples])
