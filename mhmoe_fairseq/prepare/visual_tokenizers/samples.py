"""Patches of training images that a tokenizer is fitted to, and how well it does on them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.errors import UserError
from ...common.files import sha256_of
from ...data.images.reading import ImageError, read_image
from ...data.images.transforms import EvaluationViews, PretrainingViews
from ...data.multimodal.index import index_files, read_index
from ...data.visual_tokenizers.base import VisualTokenizer, to_patches
from .settings import KMeansSettings

_MAX_IMAGES, _MEASURED = 8192, 512


def image_files(folder: Path, split: str) -> list[Path]:
    """The images of ``image.SPLIT.jsonl``; ``UserError`` when there is no such file."""
    file = index_files(folder, "image", split)[0]
    if not file.is_file():
        raise UserError(f"{folder}: has no {file.name}; `mhmoe prepare image-text` writes it")
    paths = read_index(folder, "image", split)["image_path"]
    return [folder / paths[row] for row in range(len(paths))]


def read_views(
    files: Sequence[Path], image_size: int, rng: np.random.Generator, *, crops: int = 0
) -> tuple[Tensor, int]:
    """Each image as a whole, and ``crops`` random crops of it as pre-training draws them.

    Returns:
        (P, 1 + crops, 3, image_size, image_size) in [0, 1], and how many images could not be read.

    Raises:
        UserError: none of the images can be read.
    """
    whole, crop = EvaluationViews(image_size, image_size), PretrainingViews(image_size, image_size)
    views, problems = [], []
    for file in files:
        try:
            image = read_image(file)
        except ImageError as error:
            problems.append(str(error))
            continue
        views.append(torch.stack([whole(image)[1], *(crop(image, rng)[1] for _ in range(crops))]))
    if not views:
        raise UserError(problems[0] if problems else "there are no images")
    return torch.stack(views), len(problems)


def choose(files: Sequence[Path], most: int, rng: np.random.Generator) -> list[Path]:
    """At most ``most`` files, drawn without replacement, in their order."""
    if len(files) <= most:
        return list(files)
    return [files[index] for index in sorted(rng.choice(len(files), most, replace=False))]


def sample_patches(files: Sequence[Path], settings: KMeansSettings) -> tuple[Tensor, dict[str, Any]]:
    """About ``settings.max_patches`` patches, as many of each image, half of them from random crops.

    Returns:
        (R, 3 * patch_size ** 2) in [0, 1], and what was sampled, for the tokenizer's provenance.
    """
    rng, max_patches = np.random.default_rng(settings.seed), settings.max_patches
    chosen = choose(files, min(_MAX_IMAGES, max_patches), rng)
    views, unreadable = read_views(chosen, settings.image_size, rng, crops=1)
    patches = to_patches(views.flatten(0, 1), settings.patch_size).unflatten(0, views.shape[:2]).flatten(1, 2)
    each = min(patches.shape[1], max(1, max_patches // len(patches)))
    kept = torch.from_numpy(rng.random(patches.shape[:2])).topk(each, dim=1).indices
    sampled = patches.gather(1, kept[:, :, None].expand(-1, -1, patches.shape[2])).flatten(0, 1)
    return sampled, {"images": len(views), "unreadable": unreadable, "patches": len(sampled), "seed": settings.seed}


def measure(tokenizer: VisualTokenizer, images: Tensor) -> dict[str, float]:
    """How the ids of ``images`` (B, 3, S, S) are spread, and the error of the images decoded from them.

    Returns:
        ``used``: share of the codes that occur; ``perplexity``: of the ids' distribution, at most ``vocab_size``;
        ``mean_squared_error`` per value in [0, 1], where the kind can decode.
    """
    ids = torch.cat([tokenizer.encode(block) for block in images.split(256)])
    shares = torch.bincount(ids.flatten(), minlength=tokenizer.vocab_size).double() / ids.numel()
    found = {
        "used": round(float((shares > 0).double().mean()), 4),
        "perplexity": round(float(torch.special.entr(shares).sum().exp()), 1),
    }
    if tokenizer.can_decode:
        blocks = zip(ids.split(256), images.split(256))
        error = sum(float((tokenizer.decode(part) - block).square().sum()) for part, block in blocks)
        found["mean_squared_error"] = round(error / images.numel(), 6)
    return found


def measured_on(folder: Path, tokenizer: VisualTokenizer, seed: int) -> dict[str, object]:
    """Hash of the training index, and the figures of :func:`measure` on training and held-out images."""
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
