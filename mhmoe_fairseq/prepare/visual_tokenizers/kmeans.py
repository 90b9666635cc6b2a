"""Fitting of mean patches, :class:`~mhmoe_fairseq.data.visual_tokenizers.PatchKMeans`: k-means on training images."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ...common.errors import UserError
from ...data.visual_tokenizers import PatchKMeans
from ...data.visual_tokenizers.base import nearest
from .samples import image_files, measured_on, sample_patches
from .settings import KMeansSettings

Say = Callable[[str], None]


def fit_kmeans(folder: Path, settings: KMeansSettings, say: Say) -> PatchKMeans:
    """A tokenizer from patches of the images in ``image.train.jsonl`` of a prepared folder.

    Raises:
        UserError: bad settings, no such index, no readable image, or too few distinct patches.
    """
    settings.check()
    patches, sampled = sample_patches(image_files(folder, "train"), settings)
    fitted = fit_patch_kmeans(patches, settings, say)
    fitted.provenance = {**sampled, "iterations": settings.iterations, **measured_on(folder, fitted, settings.seed)}
    return fitted


def fit_patch_kmeans(patches: Tensor, settings: KMeansSettings, say: Say = lambda line: None) -> PatchKMeans:
    """Codes by Lloyd's algorithm from different patches drawn by ``settings.seed``; equal input gives equal codes.

    It ends when no code moves any more, or after ``iterations``. A code that no patch is nearest to moves onto a patch
    drawn by its squared distance from its code. Drawing the first codes by distance, as k-means++ does, gave the same
    error on held-out images, fewer codes in use, and took longer.

    Args:
        patches: (R, 3 * patch_size ** 2) in [0, 1], of training images.

    Raises:
        UserError: fewer distinct patches than codes.
    """
    vocab_size, iterations = settings.vocab_size, settings.iterations
    distinct = torch.unique(patches, dim=0)
    if len(distinct) < vocab_size:
        raise UserError(
            f"{vocab_size} codes (--vocab-size, in mhmoe prepare --visual-vocab-size): more than the {len(distinct)} "
            "distinct patches of the training images"
        )
    generator = torch.Generator().manual_seed(settings.seed)
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
    return PatchKMeans(vocab_size, settings.patch_size, settings.image_size, centroids=centroids, mean=mean)


def _draw(distances: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` indices drawn by ``distances``, without replacement as far as there are positive ones."""
    enough = int((distances > 0).sum()) >= count
    weights = distances.double() if enough else torch.ones_like(distances, dtype=torch.float64)
    # The largest of log(u) / w is a draw by w; torch.multinomial takes at most 2**24 rows.
    keys = torch.rand(len(weights), generator=generator, dtype=torch.float64).log() / weights
    return keys.nan_to_num(nan=float("-inf")).topk(min(count, len(weights))).indices
