"""The three data sets of masked data modelling: images, texts, images with their texts."""

from typing import Any, Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...common.errors import UserError
from ..multimodal.collate import Sample, add_masking
from ..multimodal.index import Index
from ..multimodal.masking import block_mask, check_fraction, mask_index, mask_text, masked_count
from .base import DatasetSettings, ImageTextDataset

Views = Callable[[Image.Image, np.random.Generator], tuple[Tensor, Tensor]]


class MaskedDataset(ImageTextDataset):
    """What the three share: the batch's keys.

    A batch has ``text_targets (B, S)`` with padding where nothing is predicted, ``tokenizer_images (B, 3, H2, W2)``
    uint8, ``ntokens``, the masked tokens and patches, ``num_positions``, those of the model without padding,
    ``masked_token_places`` and ``masked_patch_places (M,)`` as of ``add_masking``, and ``net_input`` with ``text_tokens
    (B, S)``, ``images (B, 3, H, W)`` and ``masked_patches (B, N)`` bool; what the modality has not is None.
    """

    def add_targets(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Add the keys."""
        add_masking(batch, samples, self.settings.dictionary.pad())


class MaskedImages(MaskedDataset):
    """Images of which some patches are masked, in blocks; what is predicted is the visual tokenizer's codes.

    Args:
        index: of task ``image``, or of any other with images.
        settings: how rows are read.
        views: ``PretrainingViews`` or ``EvaluationViews``.
        fraction: of the patches that are masked.
    """

    stream = 1

    def __init__(self, index: Index, settings: DatasetSettings, views: Views, fraction: float = 0.4) -> None:
        check_fraction(fraction, "--image-mask-prob")
        super().__init__(self.positions_of(index, settings), settings, index)
        self._views, self._image_fraction = views, fraction

    @staticmethod
    def positions_of(index: Index, settings: DatasetSettings) -> np.ndarray:
        """``(rows,)`` positions of each row in the model: its texts, if there are any, are not read."""
        return np.full(len(index), settings.image_positions)

    def make_sample(self, row: int, rng: np.random.Generator) -> Sample:
        """``image``, ``tokenizer_image`` uint8, and ``masked_patches (N,)`` bool."""
        image, tokenizer_image = self._views(self.read(row), rng)
        # Its values are k / 255. As bytes they take a quarter of the memory, and fairseq, which turns every float32 of
        # a batch into half precision, leaves them as they are: targets are the same in every precision.
        tokenizer_image = tokenizer_image.mul(255).round().to(torch.uint8)
        rows, columns = grid = self.settings.grid
        masked_patches = block_mask(grid, masked_count(rows * columns, self._image_fraction), rng)
        return {"image": image, "tokenizer_image": tokenizer_image, "masked_patches": masked_patches}


class MaskedPairs(MaskedImages):
    """Images with their texts, both masked.

    Args:
        index: of task ``pair``, or of any other with images and texts.
        settings: how rows are read.
        views: ``PretrainingViews`` or ``EvaluationViews``.
        image_fraction: of the patches that are masked.
        text_fraction: of the tokens that are masked.
    """

    stream = 3

    def __init__(
        self, index: Index, settings: DatasetSettings, views: Views, image_fraction: float = 0.4,
        text_fraction: float = 0.5,
    ) -> None:  # fmt: skip
        check_fraction(text_fraction, "--pair-text-mask-prob")
        mask_index(settings.dictionary)
        super().__init__(index, settings, views, image_fraction)
        self._text_fraction = text_fraction

    @staticmethod
    def positions_of(index: Index, settings: DatasetSettings) -> np.ndarray:
        """``(rows,)`` positions of each image with its text."""
        return settings.positions(index)

    def make_sample(self, row: int, rng: np.random.Generator) -> Sample:
        """``image``, ``tokenizer_image``, ``masked_patches``, ``text`` and ``text_targets``."""
        sample = super().make_sample(row, rng)
        masked, targets = mask_text(self.text(row), self._text_fraction, self.settings.dictionary, rng)
        return {**sample, "text": masked, "text_targets": targets}


class MaskedTexts(MaskedDataset):
    """Lines of text of which some tokens are masked.

    A line that is longer than ``max_text_length`` becomes several samples of about equal length, so that no text is
    lost; empty lines, which stand between documents, are none.

    Args:
        lines: fairseq's data set of lines that end with ``</s>``; it has ``sizes``.
        settings: see there.
        fraction: of the tokens that are masked.

    Raises:
        UserError: if there is no text.
    """

    stream = 2

    def __init__(self, lines: Any, settings: DatasetSettings, fraction: float = 0.15) -> None:
        check_fraction(fraction, "--text-mask-prob")
        mask_index(settings.dictionary)
        self._lines, self._fraction = lines, fraction
        self._lengths = np.asarray(lines.sizes).astype(np.int32) - 1
        self._pieces = -(-self._lengths // (settings.max_text_length - 2))
        self._ends = np.cumsum(self._pieces, dtype=np.int64)
        if not len(self._ends) or not self._ends[-1]:
            raise UserError(f"{settings.folder}: the text of this split has no line that is not empty")
        owners = np.repeat(np.arange(len(self._ends)), self._pieces)
        starts, ends = self._cuts(owners, np.arange(self._ends[-1]))
        super().__init__(ends - starts + 2, settings)

    def _cuts(self, line: Any, row: Any) -> tuple[Any, Any]:
        """Where rows, which are of these lines, start and end in them."""
        length, pieces = self._lengths[line].astype(np.int64), self._pieces[line]
        part = row - (self._ends[line] - pieces)
        return part * length // pieces, (part + 1) * length // pieces

    def make_sample(self, row: int, rng: np.random.Generator) -> Sample:
        """``text`` and ``text_targets``."""
        line = int(np.searchsorted(self._ends, row, side="right"))
        start, end = self._cuts(line, row)
        text = self.settings.text(self._lines[line][start:end])
        masked, targets = mask_text(text, self._fraction, self.settings.dictionary, rng)
        return {"text": masked, "text_targets": targets}
