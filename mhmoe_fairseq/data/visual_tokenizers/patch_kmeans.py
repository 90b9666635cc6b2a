"""Codes that are mean patches: k-means on the pixels of the training images.

Low-level targets (colours and edges, not meanings); ids and losses cannot be compared with another tokenizer's.
"""

from typing import Any

import torch
from torch import Tensor

from .base import VisualTokenizer, from_patches, nearest, to_patches


class PatchKMeans(VisualTokenizer):
    """The nearest of ``vocab_size`` mean patches.

    Args:
        centroids: (vocab_size, 3 * patch_size ** 2), differences from ``mean``; zeros if not given.
        mean: (3 * patch_size ** 2,), the mean of all training patches; zeros if not given.
    """

    kind = "patch_kmeans"
    centroids: Tensor
    mean: Tensor

    def __init__(
        self, vocab_size: int, patch_size: int, image_size: int, provenance: dict[str, Any] | None = None, *,
        centroids: Tensor | None = None, mean: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(vocab_size, patch_size, image_size, provenance)
        width = 3 * patch_size**2
        self.register_buffer("centroids", torch.zeros(vocab_size, width) if centroids is None else centroids)
        self.register_buffer("mean", torch.zeros(width) if mean is None else mean)

    def _encode(self, images: Tensor) -> Tensor:
        patches = to_patches(images, self.patch_size) - self.mean
        return nearest(patches.flatten(0, 1), self.centroids).view(patches.shape[:2])

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Every patch replaced by its code: (B, N) -> (B, 3, image_size, image_size)."""
        patches = self.centroids[ids.to(self.device)] + self.mean
        return from_patches(patches, self.patch_size, self.image_size).clamp(0, 1)
