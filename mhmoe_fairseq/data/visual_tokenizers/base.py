"""What every visual tokenizer offers, and how one is kept in a file."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...common.errors import UserError
from ...common.ranges import SIZE, Range
from ..tensor_files import save_tensors

FORMAT = 1
SIZES = ("vocab_size", "patch_size", "image_size")
Provenance = dict[str, Any] | None
_MAX_SCORES = 1 << 24  # entries of one block of vector-code scores: 64 MB of float32


class VisualTokenizer(nn.Module, ABC):
    """Turns an image into one id per patch: the targets of masked image modelling.

    Args:
        vocab_size: number of codes.
        patch_size, image_size: sides in pixels of a patch and of the square images that :meth:`encode` takes.
        provenance: how it was made (JSON values), for people to read.
        settings: what else the constructor of its kind takes (JSON values).

    Raises:
        UserError: a size that is not positive, or an image that is not whole patches.
    """

    kind: ClassVar[str]
    can_decode: ClassVar[bool] = True

    def __init__(
        self, vocab_size: int, patch_size: int, image_size: int, *, provenance: Provenance = None, **settings: Any
    ) -> None:
        super().__init__()
        check_sizes(vocab_size, patch_size, image_size)
        self.vocab_size, self.patch_size, self.image_size = vocab_size, patch_size, image_size
        self.provenance, self.settings = dict(provenance or {}), settings

    @property
    def token_shape(self) -> tuple[int, int]:
        """Rows and columns of the grid of ids."""
        return (self.image_size // self.patch_size,) * 2

    @property
    def device(self) -> torch.device:
        """Where its buffers are."""
        return next(iter(self.state_dict().values())).device

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the ids of the patches, row by row.

        Args:
            images: (B, 3, image_size, image_size), values in [0, 1]; moved to the tokenizer's device.

        Returns:
            (B, N) int64, N = rows x columns of :attr:`token_shape`.

        Raises:
            ValueError: another shape, integers, or values outside [0, 1] on the CPU.
        """
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"images {tuple(images.shape)}: this tokenizer takes (B, 3, {self.image_size}, {self.image_size})"
            )
        if not images.is_floating_point():
            raise ValueError(f"images of {images.dtype}: must be floating point in [0, 1]")
        check_range(images)
        images = images.to(self.device, torch.float32)
        with torch.autocast(self.device.type, enabled=False):  # ids must not depend on the trainer's precision
            return self._encode(images)

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor:
        """As :meth:`encode`, for checked images on the right device."""

    def decode(self, ids: Tensor) -> Tensor:
        """Return the images of ids (B, N): (B, 3, image_size, image_size) in [0, 1]; only where :attr:`can_decode`."""
        raise UserError(f"a {self.kind} tokenizer cannot show what its ids stand for: it does not decode to pixels")

    def save(self, path: Path) -> None:
        """Write plain tensors and values to ``path``, atomically."""
        content = {
            "format": FORMAT,
            "kind": self.kind,
            **{name: getattr(self, name) for name in SIZES},
            "settings": self.settings,
            "state": {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()},
            "provenance": self.provenance,
        }
        save_tensors(content, path)

    def train(self, mode: bool = True) -> "VisualTokenizer":
        """Stays in evaluation mode: a tokenizer inside a model in training must not change its ids."""
        return super().train(False)


def check_sizes(vocab_size: int, patch_size: int, image_size: int, vocab_flag: str = "--vocab-size") -> None:
    """``UserError`` that names the flag of a bad size."""
    codes = Range(low=2, integer=True)
    for flag, value, allowed in ((vocab_flag, vocab_size, codes), ("--patch-size", patch_size, SIZE)):
        if problem := allowed.problem(value):
            raise UserError(f"{flag} ({value}) {problem}")
    if image_size < patch_size or image_size % patch_size:
        raise UserError(f"--image-size {image_size}: must be a multiple of --patch-size {patch_size}")


def check_range(images: Tensor) -> None:
    """``ValueError`` for values outside [0, 1], on the CPU only: elsewhere the host would wait for the device."""
    if images.device.type != "cpu" or not images.numel():
        return
    low, high = float(images.min()), float(images.max())
    if not (low >= -1e-4 and high <= 1 + 1e-4):  # NaN is neither
        raise ValueError(f"images in [{low:g}, {high:g}]: must be in [0, 1], not normalised")


def to_patches(images: Tensor, patch_size: int) -> Tensor:
    """(B, 3, H, W) -> (B, N, 3 * patch_size ** 2): the patches row by row, each colour by colour."""
    return torch.nn.functional.unfold(images, patch_size, stride=patch_size).transpose(1, 2)


def from_patches(patches: Tensor, patch_size: int, image_size: int) -> Tensor:
    """The inverse of :func:`to_patches` for square images."""
    return torch.nn.functional.fold(patches.transpose(1, 2), (image_size, image_size), patch_size, stride=patch_size)


def nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    """Return the index of the code with the smallest Euclidean distance, the first of equals.

    ``vectors`` (..., D) and ``codes`` (K, D) give (...) int64.
    """
    half_norms = codes.square().sum(1) / 2
    blocks = vectors.flatten(0, -2).split(max(1, _MAX_SCORES // len(codes)))
    found = [torch.addmm(half_norms, block, codes.T, alpha=-1).argmin(1) for block in blocks]
    return torch.cat(found).view(vectors.shape[:-1])
