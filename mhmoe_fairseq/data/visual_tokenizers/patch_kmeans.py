"""Codes that are mean patches: k-means on the pixels of the training images.

Low-level targets (colours and edges, not meanings); ids and losses cannot be compared with another tokenizer's.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch
from torch import Tensor

from ...common.errors import UserError
from .base import VisualTokenizer, from_patches, nearest, to_patches

Say = Callable[[str], None]


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
        self,
        vocab_size: int,
        patch_size: int,
        image_size: int,
        provenance: Optional[dict[str, Any]] = None,
        *,
        centroids: Optional[Tensor] = None,
        mean: Optional[Tensor] = None,
    ):
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


def fit_patch_kmeans(
    patches: Tensor,
    *,
    vocab_size: int,
    patch_size: int,
    image_size: int,
    seed: int,
    iterations: int = 20,
    say: Say = lambda line: None,
) -> PatchKMeans:
    """Lloyd's algorithm from different patches drawn by ``seed``; the same input gives the same codes.

    It ends when no code moves any more, or after ``iterations``. A code that no patch is nearest to moves onto a patch
    drawn by its squared distance from its code. Drawing the first codes by distance, as k-means++ does, gave the same
    error on held-out images, fewer codes in use, and took longer.

    Args:
        patches: (R, 3 * patch_size ** 2) in [0, 1], of training images.

    Raises:
        UserError: fewer distinct patches than codes.
    """
    distinct = torch.unique(patches, dim=0)
    if len(distinct) < vocab_size:
        raise UserError(
            f"{vocab_size} codes (--vocab-size, in mhmoe prepare --visual-vocab-size): more than the {len(distinct)} "
            "distinct patches of the training images"
        )
    if iterations < 1:
        raise UserError(f"--iterations {iterations}: must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    mean = patches.mean(0)
    points = patches - mean
    centroids = distinct[torch.randperm(len(distinct), generator=generator)[:vocab_size]] - mean
    for iteration in range(1, iterations + 1):
        assigned = nearest(points, centroids)
        counts = torch.bincount(assigned, minlength=vocab_size)
        distances = (points - centroids[assigned]).square().sum(1)
        sums = torch.zeros_like(centroids).index_add_(0, assigned, points)
        moved = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centroids)
        has_settled = bool((counts > 0).all()) and torch.equal(moved, centroids)
        centroids = moved
        dead = (counts == 0).nonzero()[:, 0]
        if len(dead) and iteration < iterations:
            centroids[dead] = points[_draw(distances, len(dead), generator)]
        say(
            f"k-means {iteration}/{iterations}: mean squared error {float(distances.mean()) / points.shape[1]:.6f}, "
            f"{vocab_size - len(dead)} of {vocab_size} codes used"
        )
        if has_settled:
            break
    return PatchKMeans(vocab_size, patch_size, image_size, centroids=centroids, mean=mean)


def _draw(distances: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` indices drawn by ``distances``, without replacement as far as there are positive ones."""
    enough = int((distances > 0).sum()) >= count
    weights = distances.double() if enough else torch.ones_like(distances, dtype=torch.float64)
    # The largest of log(u) / w is a draw by w; torch.multinomial takes at most 2**24 rows.
    keys = torch.rand(len(weights), generator=generator, dtype=torch.float64).log() / weights
    return keys.nan_to_num(nan=float("-inf")).topk(min(count, len(weights))).indices
