"""Held-out images with their reference captions: for a loss as in training, and for CIDEr of decoded captions."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import numpy as np

from ..common.errors import UserError
from ..data.datasets import CaptionDataset, DatasetSettings
from ..data.datasets.labelled import Transform
from ..data.multimodal.collate import Sample, pad_key
from ..data.multimodal.index import Index
from ..data.multimodal.masking import mask_text
from ..metrics.captions import CiderD, tokenize


class ReferencedCaptions(CaptionDataset):
    """A split's images, each once, with its first reference masked as in training, always alike.

    A batch has ``text_targets`` as in training, and ``split``.

    Args:
        index, settings, transform, fraction: as of :class:`CaptionDataset`; not for training.
        split: its name.
        references: captions by image id.
        ids: the first caption of each image, by image id, in the dictionary's ids without specials.

    Attributes:
        cider: scores a caption of the image of a row, which batches have as ``id``.

    Raises:
        ValueError: if an image has no reference.
    """

    def __init__(
        self,
        index: Index,
        settings: DatasetSettings,
        transform: Transform,
        fraction: float,
        split: str,
        references: Mapping[int, Sequence[str]],
        ids: Mapping[int, Sequence[int]],
    ) -> None:
        super().__init__(index, settings, transform, fraction)
        self.split = split
        self.fraction = fraction
        images = [int(index["image_id"][row]) for row in self._rows]
        unknown = [image for image in images if image not in references]
        if unknown:
            raise UserError(
                f"{index.files[0]}: {len(unknown)} of {len(images)} images have no reference caption, first image_id "
                f"{unknown[0]}"
            )
        self._ids = [ids[image] for image in images]
        self.sizes = self.sizes + settings.text_positions(np.array([len(tokens) for tokens in self._ids]))
        self.cider = CiderD([[tokenize(caption) for caption in references[image]] for image in images])

    def make_sample(self, row: int, rng: np.random.Generator) -> Sample:
        """``image``, ``image_id``, ``text`` and ``text_targets``."""
        sample = super().make_sample(row, rng)
        text = self.settings.text(self._ids[row])
        masked, targets = mask_text(text, self.fraction, self.settings.dictionary, rng, masks_end=True)
        return {**sample, "text": masked, "text_targets": targets}

    def add_targets(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Add the keys."""
        super().add_targets(batch, samples)
        pad = self.settings.dictionary.pad()
        batch["text_targets"] = pad_key(samples, "text_targets", pad)
        batch["ntokens"] = int(batch["text_targets"].ne(pad).sum())
        batch["split"] = self.split
