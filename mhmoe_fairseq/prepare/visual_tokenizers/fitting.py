"""Fitting of visual tokenizers to the training images of a prepared folder: k-means on patches, or a small network."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image

from ...common.errors import UserError
from ...common.files import atomic_path, sha256_of
from ...common.timing import tracked
from ...data.images.reading import ImageError, read_image
from ...data.images.transforms import EvaluationViews, PretrainingViews
from ...data.multimodal.index import index_files, read_index
from ...data.visual_tokenizers import VQVAE, PatchKMeans
from ...data.visual_tokenizers.base import VisualTokenizer, nearest, to_patches
from .settings import TOKENIZER_FILE, KMeansSettings, VQVAESettings

Say = Callable[[str], None]

_MEASURED, _SHOWN = 512, 12  # images
_DEAD_SHARE = 0.03  # of the uniform load: codes below it move onto vectors of the batch
_REPORTS = 10
_NOT_RECORDED = {"vocab_size", "patch_size", "image_size", "max_patches", "device"}  # most are with the model


def fit_tokenizer(folder: Path, settings: KMeansSettings | VQVAESettings, say: Say) -> VisualTokenizer:
    """Fits the kind of ``settings`` to the images in ``image.train.jsonl`` of a prepared folder.

    Its provenance has the settings, what was read, the hash of the training index, and :func:`measure` on images of the
    training and the validation part.

    Raises:
        UserError: no such index, no readable image, or fewer distinct patches than codes.
    """
    to_measure = {
        split: whole_images(folder, split, settings.image_size, _MEASURED, settings.seed)
        for split in ("train", "valid") if index_files(folder, "image", split)[0].is_file()
    }  # fmt: skip
    rng = np.random.default_rng(settings.seed)
    views, unreadable = read_views(folder, "train", settings.image_size, settings.max_images, rng, crops=1)
    seen = {"images": len(views), "unreadable": unreadable}
    if isinstance(settings, KMeansSettings):
        patches = sample_patches(views, settings, rng)
        seen["patches"] = len(patches)
        fitted: VisualTokenizer = fit_patch_kmeans(patches, settings, say)
    else:
        fitted = train_vqvae(views.flatten(0, 1), settings, say)
    recorded = {name: value for name, value in asdict(settings).items() if name not in _NOT_RECORDED}
    index = sha256_of(index_files(folder, "image", "train")[0])
    fitted.provenance = {**seen, **recorded, "image_index_sha256": index}
    fitted.provenance |= {split: measure(fitted, images) for split, images in to_measure.items()}
    return fitted


def fit_into(folder: Path, settings: KMeansSettings, say: Say) -> dict[str, Any]:
    """Writes a folder's ``visual_tokenizer.pt`` and says how good it is; returns what the manifest records."""
    start = time.monotonic()
    fitted = fit_tokenizer(folder, settings, say=lambda line: None)
    fitted.save(folder / TOKENIZER_FILE)
    held_out = fitted.provenance.get("valid", fitted.provenance["train"])
    say(
        f"visual tokenizer: {fitted.kind}, {fitted.vocab_size} codes for patches of {fitted.patch_size} pixels, "
        f"held-out images use {held_out['used']:.0%} of them (perplexity {held_out['perplexity']:g}), mean "
        f"squared error {held_out['mean_squared_error']:g}, {time.monotonic() - start:.1f} s"
    )
    return {"kind": fitted.kind, **asdict(settings), **fitted.provenance}


def read_views(
    folder: Path, split: str, image_size: int, most: int, rng: np.random.Generator, *, crops: int = 0
) -> tuple[Tensor, int]:
    """Reads at most ``most`` images of ``image.SPLIT.jsonl``, drawn without replacement, in their order.

    Returns:
        (P, 1 + crops, 3, image_size, image_size) in [0, 1]: each image as a whole, and random crops of it as
        pre-training draws them; and how many images could not be read.

    Raises:
        UserError: there is no such file, or none of the images can be read.
    """
    file = index_files(folder, "image", split)[0]
    if not file.is_file():
        raise UserError(f"{folder}: has no {file.name}; `mhmoe prepare image-text` writes it")
    paths = read_index(folder, "image", split)["image_path"]
    rows = range(len(paths)) if len(paths) <= most else sorted(rng.choice(len(paths), most, replace=False))
    whole, crop, read = EvaluationViews(image_size, image_size), PretrainingViews(image_size, image_size), 0
    views, problems = torch.empty(len(rows), 1 + crops, 3, image_size, image_size), []
    for row in tracked(rows, "read images", "images"):
        try:
            image = read_image(folder / paths[row])
        except ImageError as error:
            problems.append(str(error))
            continue
        views[read] = torch.stack([whole(image)[1], *(crop(image, rng)[1] for _ in range(crops))])
        read += 1
    if not read:
        raise UserError(problems[0] if problems else "there are no images")
    return views[:read], len(problems)


def whole_images(folder: Path, split: str, image_size: int, most: int, seed: int) -> Tensor:
    """Reads at most ``most`` images of a part, drawn by ``seed``: (B, 3, image_size, image_size) in [0, 1]."""
    return read_views(folder, split, image_size, most, np.random.default_rng(seed))[0][:, 0]


def measure(tokenizer: VisualTokenizer, images: Tensor) -> dict[str, float]:
    """Tells how the ids of ``images`` (B, 3, S, S) are spread, and the error of the images decoded from them.

    Returns:
        ``used``: share of the codes that occur; ``perplexity``: of the ids' distribution, at most ``vocab_size``;
        ``mean_squared_error`` per value in [0, 1].
    """
    ids = torch.cat([tokenizer.encode(block) for block in images.split(256)])
    shares = torch.bincount(ids.flatten(), minlength=tokenizer.vocab_size).double() / ids.numel()
    blocks = zip(ids.split(256), images.split(256))
    error = sum(float((tokenizer.decode(part) - block).square().sum()) for part, block in blocks)
    return {
        "used": round(float((shares > 0).double().mean()), 4),
        "perplexity": round(float(torch.special.entr(shares).sum().exp()), 1),
        "mean_squared_error": round(error / images.numel(), 6),
    }


def draw_comparison(tokenizer: VisualTokenizer, folder: Path, path: Path, seed: int) -> None:
    """Draws a dozen held-out images (training ones where none are held out) over what their ids decode to."""
    split = next(split for split in ("valid", "train") if index_files(folder, "image", split)[0].is_file())
    images = whole_images(folder, split, tokenizer.image_size, _SHOWN, seed)
    decoded = tokenizer.decode(tokenizer.encode(images)).cpu()
    rows = torch.cat([torch.cat(list(row), dim=2) for row in (images, decoded)], dim=1)
    with atomic_path(path) as temporary:
        to_pil_image(rows).save(temporary, format="PNG")


def sample_patches(views: Tensor, settings: KMeansSettings, rng: np.random.Generator) -> Tensor:
    """Draws about ``max_patches`` of the views' patches, as many of each image: (R, 3 * patch_size ** 2)."""
    num_patches = views.shape[1] * (views.shape[-1] // settings.patch_size) ** 2  # of an image
    each = min(num_patches, max(1, settings.max_patches // len(views)))
    kept = torch.from_numpy(rng.random((len(views), num_patches))).topk(each, dim=1).indices
    patches = (to_patches(of_image, settings.patch_size).flatten(0, 1) for of_image in views)
    return torch.cat([of_image[rows] for of_image, rows in zip(patches, kept)])


def fit_patch_kmeans(patches: Tensor, settings: KMeansSettings, say: Say = lambda line: None) -> PatchKMeans:
    """Fits codes by Lloyd's algorithm to patches drawn by ``settings.seed``; equal input gives equal codes.

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
    for iteration in tracked(range(1, iterations + 1), "fit", "iterations"):
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
    """Draws ``count`` indices by ``distances``, without replacement as far as there are positive ones."""
    enough = int((distances > 0).sum()) >= count
    weights = distances.double() if enough else torch.ones_like(distances, dtype=torch.float64)
    # The largest of log(u) / w is a draw by w; torch.multinomial takes at most 2**24 rows.
    keys = torch.rand(len(weights), generator=generator, dtype=torch.float64).log() / weights
    return keys.nan_to_num(nan=float("-inf")).topk(min(count, len(weights))).indices


def train_vqvae(images: Tensor, settings: VQVAESettings, say: Say) -> VQVAE:
    """Trains the small network on batches of images (B, 3, S, S); says their mean squared error ten times."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = VQVAE(settings.vocab_size, settings.patch_size, settings.image_size).to(settings.device)
    generator = torch.Generator().manual_seed(settings.seed)
    load = torch.zeros(settings.vocab_size, device=settings.device)  # of each code, a moving average
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.updates)
    start, errors = time.monotonic(), []
    for update in tracked(range(1, settings.updates + 1), "fit", "updates"):
        batch = images[torch.randint(len(images), (settings.batch_size,), generator=generator)].to(settings.device)
        vectors = model.vectors(batch)
        ids = model.choose(vectors.detach())
        chosen = model.codes[ids]
        passed = vectors + (chosen - vectors).detach()  # the decoder's gradient goes on as if nothing were replaced
        error = F.mse_loss(model.from_vectors(passed), batch)
        loss = error + settings.commitment * F.mse_loss(vectors, chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        _move_codes(model.codes, load, vectors.detach().flatten(0, 1), ids.flatten(), settings.decay, generator)
        errors.append(float(error.detach()))
        if update % max(1, settings.updates // _REPORTS) == 0 or update == settings.updates:
            recent = sum(errors) / len(errors)
            say(f"vqvae {update}/{settings.updates}: mean squared error {recent:.5f}, {time.monotonic() - start:.0f} s")
            errors = []
    return model.cpu().eval().requires_grad_(False)


def _move_codes(
    codes: Tensor, load: Tensor, vectors: Tensor, ids: Tensor, decay: float, generator: torch.Generator
) -> None:
    """Moves codes towards the mean of the vectors that chose them, and those that few choose onto drawn vectors."""
    counts = torch.bincount(ids, minlength=len(codes))
    load.mul_(decay).add_(counts / len(ids), alpha=1 - decay)
    means = F.normalize(torch.zeros_like(codes).index_add_(0, ids, vectors), dim=1)
    moved = F.normalize(decay * codes + (1 - decay) * means, dim=1)
    codes.copy_(torch.where(counts[:, None] > 0, moved, codes))
    dead = (load < _DEAD_SHARE / len(codes)).nonzero()[:, 0]
    if len(dead):
        drawn = torch.randint(len(vectors), (len(dead),), generator=generator).to(vectors.device)
        codes[dead] = vectors[drawn]
        load[dead] = 1 / len(codes)
