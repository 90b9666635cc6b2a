"""The three data sets of masked data modelling: images, texts, images with their texts."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...common.errors import UserError
from ..multimodal.index import Index
from ..multimodal.masking import block_mask, check_fraction, mask_index, masked_count
from .base import DatasetSettings, ImageTextDataset, Sample

Views = Callable[[Image.Image, np.random.Generator], tuple[Tensor, Tensor]]


class MaskedDataset(ImageTextDataset):
    """What the three share: the batch's keys.

    A batch has ``text_targets (B, S)`` with padding where nothing is predicted, ``tokenizer_images (B, 3, H2, W2)``
    uint8, ``ntokens``, the masked tokens and patches, ``num_positions``, those of the model without padding, and
    ``net_input`` with ``text_tokens (B, S)``, ``images (B, 3, H, W)`` and ``masked_patches (B, N)`` bool. Where the
    targets and the masked patches are, as indices of these flattened, is in ``masked_token_indices`` and
    ``masked_patch_indices``, ``(M,)``: from a mask the host would have to learn their number, and wait for the device.
    What the modality has not is None.
    """

    def add_targets(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Add the keys."""
        pad = self.settings.dictionary.pad()
        targets = batch["text_targets"] = self.stack(samples, "text_targets", pad)
        batch["tokenizer_images"] = self.stack(samples, "tokenizer_image")
        patches = batch["net_input"]["masked_patches"] = self.stack(samples, "masked_patches")
        tokens_at = batch["masked_token_indices"] = None if targets is None else _indices(targets.ne(pad))
        patches_at = batch["masked_patch_indices"] = None if patches is None else _indices(patches)
        batch["ntokens"] = sum(len(found) for found in (tokens_at, patches_at) if found is not None)
        class_positions = 0 if patches is None else patches.numel() + len(samples)
        batch["num_positions"] = class_positions + sum(len(sample.get("text", ())) for sample in samples)


def _indices(mask: Tensor) -> Tensor:
    """``(M,)`` indices of True in the flattened mask."""
    return mask.flatten().nonzero().squeeze(1)


class MaskedImages(MaskedDataset):
    """Images of which some patches are masked, in blocks; what is predicted is the visual tokenizer's codes.

    Args:
        index: of task ``image``, or of any other with images; its texts are not read.
        views: ``PretrainingViews`` or ``EvaluationViews``.
        fraction: of the patches that are masked.
    """

    stream = 1
    has_texts = False

    def __init__(self, index: Index, settings: DatasetSettings, views: Views, fraction: float = 0.4) -> None:
        check_fraction(fraction, "--image-mask-prob")
        super().__init__(settings.positions(index, self.has_texts), settings, index)
        self._views, self._image_fraction = views, fraction

    def make_sample(self, row: int, rng: np.random.Generator) -> Sample:
        """Return ``image``, ``tokenizer_image`` uint8, and ``masked_patches (N,)`` bool."""
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
        image_fraction, text_fraction: of the patches and of the tokens that are masked.
    """

    stream = 3
    has_texts = True

    def __init__(
        self, index: Index, settings: DatasetSettings, views: Views, image_fraction: float = 0.4,
        text_fraction: float = 0.5,
    ) -> None:  # fmt: skip
        check_fraction(text_fraction, "--pair-text-mask-prob")
        mask_index(settings.dictionary)
        super().__init__(index, settings, views, image_fraction)
        self._text_fraction = text_fraction

    def make_sample(self, row: int, rng: np.random.Generator) -> Sample:
        """Return ``image``, ``tokenizer_image``, ``masked_patches``, ``text`` and ``text_targets``."""
        return {**super().make_sample(row, rng), **self.masked(self.text(row), self._text_fraction, rng)}


class MaskedTexts(MaskedDataset):
    """Lines of text of which some tokens are masked.

    A line that is longer than ``max_text_length`` becomes several samples of about equal length, so that no text is
    lost; empty lines, which stand between documents, are none.

    Args:
        lines: fairseq's data set of lines that end with ``</s>``; it has ``sizes``.
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
        """Return ``text`` and ``text_targets``."""
        line = int(np.searchsorted(self._ends, row, side="right"))
        start, end = self._cuts(line, row)
        return self.masked(self.settings.text(self._lines[line][start:end]), self._fraction, rng)
