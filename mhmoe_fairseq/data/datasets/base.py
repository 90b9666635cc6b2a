"""What the data sets of images and texts share: settings, order, generators, and what becomes of bad images."""

import abc
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch
from fairseq.data import Dictionary
from PIL import Image
from torch import Tensor

from ...common.errors import UserError
from ..images.reading import ImageError, read_image
from ..multimodal.collate import Sample, collate
from ..multimodal.index import Index
from .batching import SizedRows

logger = logging.getLogger(__name__)

_MOST_BAD = 1000  # bad images in a row after which the folder is wrong, not the images
_ORDER, _SAMPLE = 0, 1  # what a generator is for
_LEAST_TEXT = 3


@dataclass(frozen=True)
class DatasetSettings:
    """What all data sets of a task are read by.

    Args:
        folder: with the index files, that the images' paths are relative to.
        dictionary: of the texts.
        img_size: side of the model's images.
        patch_size: side of a patch.
        max_text_length: tokens of a text with ``<s>`` and ``</s>``; of a longer one the end is left out.
        seed: of orders, crops and masks.
        training: whether order, crops and masks are new in every epoch; otherwise rows come in the files' order and
            their masks are the same every time.
        skip_bad_images: in training, whether another sample takes the place of one with a bad image; otherwise,
            and always in evaluation, a bad image is an error.

    Raises:
        UserError: naming the flags.
    """

    folder: Path
    dictionary: Dictionary
    img_size: int
    patch_size: int
    max_text_length: int
    seed: int = 1
    training: bool = True
    skip_bad_images: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.patch_size <= self.img_size or self.img_size % self.patch_size:
            raise UserError(f"--img-size ({self.img_size}) must be a multiple of --patch-size ({self.patch_size})")
        if self.max_text_length < _LEAST_TEXT:
            raise UserError(
                f"--max-text-length ({self.max_text_length}) must be at least {_LEAST_TEXT}: <s>, a token and </s>"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return (self.img_size // self.patch_size,) * 2

    @property
    def image_positions(self) -> int:
        """Positions of an image in the model: one for the class token, and its patches."""
        return 1 + self.grid[0] * self.grid[1]

    def positions(self, index: Index) -> np.ndarray:
        """``(rows,)`` positions of an index's rows: an image and, where it has texts, its text after the cut."""
        sizes = np.full(len(index), self.image_positions)
        if "text_segment" in index:
            sizes += np.minimum(index["text_segment"].lengths + 2, self.max_text_length)
        return sizes

    def text(self, ids: np.ndarray | Tensor) -> Tensor:
        """``(S,)``: ``<s> ids </s>``, the end of the ids left out where there is no room for it."""
        kept = torch.as_tensor(ids[: self.max_text_length - 2]).long()
        return torch.cat([torch.tensor([self.dictionary.bos()]), kept, torch.tensor([self.dictionary.eos()])])


class ImageTextDataset(SizedRows, abc.ABC):
    """Base of the data sets.

    Everything random about a sample comes from a generator made of seed, epoch and row, so that it does not depend on
    the number of workers or ranks, and a resumed run sees what an uninterrupted one does.

    A subclass gives ``make_sample`` and ``add_targets``.

    Args:
        sizes: ``(rows,)`` positions of each row in the model.
        settings: how rows are read.
        index: the index file's rows, where the data come from one: errors name its lines.

    Attributes:
        stream: keeps the generators of different data sets apart.
    """

    stream = 0

    def __init__(self, sizes: np.ndarray, settings: DatasetSettings, index: Index | None = None) -> None:
        self.sizes = sizes.astype(np.int32)
        self.settings, self.index = settings, index
        self.epoch = 1
        self._told: set[str] = set()

    @abc.abstractmethod
    def make_sample(self, row: int, rng: np.random.Generator) -> Sample:
        """The sample of a row."""

    @abc.abstractmethod
    def add_targets(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Add to a batch what ``collate`` does not give."""

    def place(self, row: int) -> str:
        """Where a row comes from, for messages: the index file and line."""
        return f"row {row}" if self.index is None else self.index.place(row)

    def __getitem__(self, row: int) -> Sample:
        """The sample of a row.

        Raises:
            ImageError: naming the row's place, the image and the rule, unless such samples are skipped.
        """
        row = int(row)
        for step in range(min(len(self), _MOST_BAD)):
            taken = (row + step) % len(self)
            try:
                sample = self.make_sample(taken, self._generator(_SAMPLE, row))
            except ImageError as error:
                if not (self.settings.skip_bad_images and self.settings.training):
                    raise ImageError(f"{self.place(taken)}: {error}") from error
                self._tell(str(error))
            else:
                return {"id": taken, "is_replaced": step > 0, **sample}
        raise ImageError(f"{self.place(row)}: no good image in {step + 1:,} rows from here on")

    def collater(self, samples: list[Sample]) -> dict[str, Any]:
        """A batch; ``{}`` of no samples, which fairseq takes for one of another rank's that has run out."""
        if not samples:
            return {}
        batch = collate(samples, self.settings.dictionary.pad())
        self.add_targets(batch, samples)
        return batch

    def ordered_indices(self) -> np.ndarray:
        """``(rows,)``: all rows, in training shuffled anew for every epoch."""
        if not self.settings.training:
            return np.arange(len(self))
        return self._generator(_ORDER).permutation(len(self))

    def read(self, row: int, field: str = "image_path") -> Image.Image:
        """The image that a row of the index names; raises ``ImageError``."""
        return read_image(self.settings.folder / self.index[field][row])

    def text(self, row: int) -> Tensor:
        """``(S,)``: the text of a row of the index, with ``<s>`` and ``</s>``."""
        return self.settings.text(self.index["text_segment"][row])

    def set_epoch(self, epoch: int) -> None:
        """fairseq's hook before an epoch: training has other crops, masks and batches then."""
        if self.settings.training:
            self.epoch = epoch

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        """False in training: batches differ, and fairseq-fixed keeps workers, which would not learn of the epoch."""
        return not self.settings.training

    def filter_indices_by_size(self, indices: np.ndarray, max_sizes: Any) -> tuple[np.ndarray, list[int]]:
        """Every row fits: texts are cut."""
        return indices, []

    def batch_by_size(
        self,
        indices: np.ndarray,
        max_tokens: int | None = None,
        max_sentences: int | None = None,
        required_batch_size_multiple: int = 1,
    ) -> list[np.ndarray]:
        """Batches that hold every row: fairseq-fixed drops a last one of another multiple.

        Raises:
            UserError: if ``--max-tokens`` is less than the positions of one row.
        """
        longest = int(self.sizes[indices].max(initial=0))
        if max_tokens is not None and longest > max_tokens:
            raise UserError(f"--max-tokens ({max_tokens}) must be at least {longest}, the positions of one sample")
        return super().batch_by_size(indices, max_tokens, max_sentences, required_batch_size_multiple=1)

    def _generator(self, purpose: int, *row: int) -> np.random.Generator:
        return np.random.default_rng([self.settings.seed % 2**32, self.stream, purpose, self.epoch, *row])

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.warning(f"{message}: another sample takes its place")
