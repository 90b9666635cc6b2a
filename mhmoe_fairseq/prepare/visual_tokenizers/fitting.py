"""Fitting a visual tokenizer to the training images of a prepared folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor

from ...common.files import sha256_of
from ...data.multimodal.index import index_files
from ...data.visual_tokenizers.base import VisualTokenizer, check_sizes
from ...data.visual_tokenizers.patch_kmeans import fit_patch_kmeans
from .samples import choose, image_files, measure, read_views, sample_patches

Say = Callable[[str], None]
FILE = "visual_tokenizer.pt"
_MEASURED = 512


@dataclass(frozen=True)
class FitSettings:
    """How a tokenizer is fitted.

    Args:
        vocab_size: number of codes.
        patch_size: side of a patch in pixels.
        image_size: side of the images it takes.
        seed: of everything that is drawn.
        max_patches: about how many patches k-means sees.
        iterations: of k-means.
    """

    vocab_size: int = 512
    patch_size: int = 16
    image_size: int = 64
    seed: int = 1
    max_patches: int = 60_000
    iterations: int = 15

    def check(self, vocab_flag: str = "--vocab-size") -> None:
        """``UserError`` that names the flag of a bad size."""
        check_sizes(self.vocab_size, self.patch_size, self.image_size, vocab_flag)


def fit_kmeans(folder: Path, settings: FitSettings, say: Say) -> VisualTokenizer:
    """k-means on patches of the images in ``image.train.jsonl``; see :func:`~.patch_kmeans.fit_patch_kmeans`."""
    settings.check()
    patches, sampled = sample_patches(
        image_files(folder, "train"), image_size=settings.image_size, patch_size=settings.patch_size,
        max_patches=settings.max_patches, seed=settings.seed,
    )  # fmt: skip
    fitted = fit_patch_kmeans(
        patches, vocab_size=settings.vocab_size, patch_size=settings.patch_size, image_size=settings.image_size,
        seed=settings.seed, iterations=settings.iterations, say=say,
    )  # fmt: skip
    fitted.provenance = {**sampled, "iterations": settings.iterations, **measured_on(folder, fitted, settings.seed)}
    return fitted


def measured_on(folder: Path, tokenizer: VisualTokenizer, seed: int) -> dict[str, object]:
    """Hash of the training index, and the figures of :func:`~.samples.measure` on training and held-out images."""
    record: dict[str, object] = {"image_index_sha256": sha256_of(index_files(folder, "image", "train")[0])}
    for split in ("train", "valid"):
        if index_files(folder, "image", split)[0].is_file():
            record[split] = measure(tokenizer, whole_images(folder, split, tokenizer.image_size, _MEASURED, seed))
    return record


def whole_images(folder: Path, split: str, image_size: int, most: int, seed: int) -> Tensor:
    """At most ``most`` images of a part, drawn by ``seed``: (B, 3, image_size, image_size) in [0, 1]."""
    rng = np.random.default_rng(seed)
    views, _ = read_views(choose(image_files(folder, split), most, rng), image_size, rng)
    return views[:, 0]


def comparison(tokenizer: VisualTokenizer, images: Tensor) -> Tensor:
    """Images over what their ids decode to, as one image: (3, 2 * S, B * S) in [0, 1]."""
    decoded = tokenizer.decode(tokenizer.encode(images)).cpu()
    return torch.cat([torch.cat(list(row), dim=2) for row in (images, decoded)], dim=1)
