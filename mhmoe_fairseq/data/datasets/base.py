"""What the data sets of images and texts share: settings, order, generators, batches, and skipping bad images."""

import abc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from fairseq.data import Dictionary, data_utils
from PIL import Image
from torch import Tensor

from ...common.errors import UserError
from ..images.reading import ImageError, read_image
from ..multimodal.index import Index
from ..multimodal.masking import mask_text
from .batching import FittingRows

Sample = dict[str, Any]

logger = logging.getLogger(__name__)

_MOST_BAD = 1000  # bad images in a row after which the folder is wrong, not the images
_ORDER, _SAMPLE = 0, 1  # what a generator is for
_LEAST_TEXT = 3


@dataclass(frozen=True)
class DatasetSettings:
    """What all data sets of a task are read by.

    Args:
        folder: has the index files; the images' paths are relative to it.
        img_size, patch_size: sides of the model's images and of a patch, in pixels.
        max_text_length: tokens of a text with ``<s>`` and ``</s>``; the end of a longer one is left out.
        seed: of orders, crops and masks.
        training: whether order, crops and masks are new in every epoch; otherwise rows come in the files' order,
            always with the same masks.
        skip_bad_images: whether another sample takes the place of one with a bad image, in training only; otherwise a
            bad image is an error.

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

    def positions(self, index: Index, has_texts: bool = True) -> np.ndarray:
        """``(rows,)`` positions of rows: an image and, with ``has_texts``, the text if there is one, after the cut."""
        sizes = np.full(len(index), self.image_positions)
        if has_texts and "text_segment" in index:
            sizes += np.minimum(index["text_segment"].lengths + 2, self.max_text_length)
        return sizes

    def text(self, ids: np.ndarray | Tensor) -> Tensor:
        """``(S,)``: ``<s> ids </s>``, the end of the ids left out where there is no room for it."""
        kept = torch.as_tensor(ids[: self.max_text_length - 2]).long()
        return torch.cat([torch.tensor([self.dictionary.bos()]), kept, torch.tensor([self.dictionary.eos()])])


class ImageTextDataset(FittingRows, abc.ABC):
    """Base of the data sets; a subclass gives ``make_sample``, and ``numbers`` or ``add_targets`` for its batches.

    Everything random about a sample comes from a generator made of seed, epoch and row, so that it does not depend on
    the number of workers or ranks, and a resumed run sees what an uninterrupted one does.

    Args:
        sizes: ``(rows,)`` positions of each row in the model.
        index: the index file's rows, where the data come from one: errors name its lines.

    Attributes:
        stream: keeps the generators of different data sets apart.
        numbers: batch key -> field of the index whose numbers ``(B,)`` it holds, or None where no row has the field.
    """

    stream: ClassVar[int]
    numbers: ClassVar[Mapping[str, str]] = {}

    def __init__(self, sizes: np.ndarray, settings: DatasetSettings, index: Index | None = None) -> None:
        self.sizes = sizes.astype(np.int32)
        self.settings, self.index = settings, index
        self.epoch = 1
        self._told: set[str] = set()

    @abc.abstractmethod
    def make_sample(self, row: int, rng: np.random.Generator) -> Sample:
        """Return the sample of a row: ``text (S,)`` and ``image (3, H, W)`` where there are such, and what it adds."""

    def add_targets(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Add to a batch what ``collater`` does not give."""

    def index_row(self, row: int) -> int:
        """Return the row of the index that a row of the data set is read from."""
        return row

    def place(self, row: int) -> str:
        """Return where a row comes from, for messages: the index file and line."""
        return f"row {row}" if self.index is None else self.index.place(self.index_row(row))

    def __getitem__(self, row: int) -> Sample:
        """Return the sample of a row.

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
        """Return a batch; ``{}`` of no samples, which fairseq takes for one of another rank's that has run out.

        Every batch has ``id (B,)``; ``nsentences``, the number of samples; ``ntokens``, that of the texts' tokens, or
        without texts of images; ``num_replaced``, that of samples that stand for one with a bad image; ``net_input``
        with ``text_tokens (B, S)`` or None and ``images (B, 3, H, W)`` or None; and the keys of ``numbers``.
        """
        if not samples:
            return {}
        text_tokens = self.stack(samples, "text", self.settings.dictionary.pad())
        ids = [sample["id"] for sample in samples]
        batch = {
            "id": torch.tensor(ids),
            "nsentences": len(samples),
            "ntokens": len(samples) if text_tokens is None else sum(len(sample["text"]) for sample in samples),
            "num_replaced": sum(sample["is_replaced"] for sample in samples),
            "net_input": {"text_tokens": text_tokens, "images": self.stack(samples, "image")},
        }
        rows = [self.index_row(row) for row in ids]
        for key, field in self.numbers.items():
            is_known = self.index is not None and field in self.index
            batch[key] = torch.from_numpy(self.column(field)[rows]) if is_known else None
        self.add_targets(batch, samples)
        return batch

    @staticmethod
    def stack(samples: Sequence[Sample], key: str, pad: int | None = None) -> Tensor | None:
        """Stack the tensors that every sample has under ``key``, padded on the right with ``pad``; None if none has."""
        if samples[0].get(key) is None:
            return None
        tensors = [sample[key] for sample in samples]
        return torch.stack(tensors) if pad is None else data_utils.collate_tokens(tensors, pad)

    def add_text_targets(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Add ``text_targets (B, S)``, padding where nothing is predicted, and count the others as ``ntokens``."""
        pad = self.settings.dictionary.pad()
        batch["text_targets"] = self.stack(samples, "text_targets", pad)
        batch["ntokens"] = int(batch["text_targets"].ne(pad).sum())

    def ordered_indices(self) -> np.ndarray:
        """Return all rows, ``(rows,)``, in training shuffled anew for every epoch."""
        if not self.settings.training:
            return np.arange(len(self))
        return self._generator(_ORDER).permutation(len(self))

    def column(self, field: str) -> Any:
        """Return a column of the index, of a data set that has one."""
        assert self.index is not None, "a data set of an index"
        return self.index[field]

    def read(self, row: int, field: str = "image_path") -> Image.Image:
        """Return the image that a row names; raises ``ImageError``."""
        return read_image(self.settings.folder / self.column(field)[self.index_row(row)])

    def text(self, row: int) -> Tensor:
        """Return the text of a row, ``(S,)``, with ``<s>`` and ``</s>``."""
        return self.settings.text(self.column("text_segment")[self.index_row(row)])

    def masked(self, text: Tensor, fraction: float, rng: np.random.Generator, *, masks_end: bool = False) -> Sample:
        """Return a text's masked ``text`` and its ``text_targets``, see ``mask_text``."""
        masked, targets = mask_text(text, fraction, self.settings.dictionary, rng, masks_end=masks_end)
        return {"text": masked, "text_targets": targets}

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops, masks and batches in training: fairseq's hook before an epoch."""
        if self.settings.training:
            self.epoch = epoch

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        """False in training: batches differ, and fairseq-fixed keeps workers, which would not learn of the epoch."""
        return not self.settings.training

    def batch_by_size(self, indices: np.ndarray, *args: Any, **kwargs: Any) -> list[np.ndarray]:
        """Return batches that hold every row: fairseq-fixed drops a last one of another multiple."""
        return super().batch_by_size(indices, *args, **{**kwargs, "required_batch_size_multiple": 1})

    def _generator(self, purpose: int, *row: int) -> np.random.Generator:
        return np.random.default_rng([self.settings.seed % 2**32, self.stream, purpose, self.epoch, *row])

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.warning(f"{message}: another sample takes its place")
