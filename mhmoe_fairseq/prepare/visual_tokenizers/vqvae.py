"""Training of the small convolutional tokenizer, :class:`~mhmoe_fairseq.data.visual_tokenizers.VQVAE`."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...data.visual_tokenizers import VQVAE
from .samples import choose, image_files, measured_on, read_views
from .settings import VQVAESettings

_KEPT_IMAGES = 4096
_DEAD_SHARE = 0.03  # of the uniform load: codes below it move onto vectors of the batch
_REPORTS = 10


class Trainer:
    """One training; the codes' loads and sums are kept beside the model, which stays free of them."""

    def __init__(self, settings: VQVAESettings):
        self._settings = settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = VQVAE(settings.vocab_size, settings.patch_size, settings.image_size)
        self.model = model.to(settings.device)
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._load = torch.zeros(settings.vocab_size, device=settings.device)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), settings.learning_rate, betas=(0.9, 0.95))
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, settings.updates)

    def step(self, images: Tensor) -> float:
        """One update on (B, 3, S, S); the mean squared error of the images."""
        vectors = self.model.vectors(images)
        ids = self.model.choose(vectors.detach())
        chosen = self.model.codes[ids]
        passed = vectors + (chosen - vectors).detach()  # the decoder's gradient goes on as if nothing were replaced
        error = F.mse_loss(self.model.from_vectors(passed), images)
        loss = error + self._settings.commitment * F.mse_loss(vectors, chosen)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        self._move_codes(vectors.detach().flatten(0, 1), ids.flatten())
        return float(error.detach())

    def _move_codes(self, vectors: Tensor, ids: Tensor) -> None:
        settings, codes = self._settings, self.model.codes
        counts = torch.bincount(ids, minlength=settings.vocab_size)
        self._load.mul_(settings.decay).add_(counts / len(ids), alpha=1 - settings.decay)
        means = F.normalize(torch.zeros_like(codes).index_add_(0, ids, vectors), dim=1)
        moved = F.normalize(settings.decay * codes + (1 - settings.decay) * means, dim=1)
        codes.copy_(torch.where(counts[:, None] > 0, moved, codes))
        dead = (self._load < _DEAD_SHARE / settings.vocab_size).nonzero()[:, 0]
        if len(dead):
            drawn = torch.randint(len(vectors), (len(dead),), generator=self._generator).to(vectors.device)
            codes[dead] = vectors[drawn]
            self._load[dead] = 1 / settings.vocab_size

    def order(self, count: int) -> Tensor:
        """Indices of the next batch out of ``count`` images."""
        return torch.randint(count, (self._settings.batch_size,), generator=self._generator)


def fit_vqvae(folder: Path, settings: VQVAESettings, say: Callable[[str], None]) -> VQVAE:
    """Trains on the images in ``image.train.jsonl`` of a prepared folder.

    Raises:
        UserError: bad settings, no such index, or no readable image.
    """
    settings.check()
    rng = np.random.default_rng(settings.seed)
    files = choose(image_files(folder, "train"), _KEPT_IMAGES, rng)
    views, unreadable = read_views(files, settings.image_size, rng, crops=settings.crops)
    images = views.flatten(0, 1)
    trainer, start, errors = Trainer(settings), time.monotonic(), []
    for update in range(1, settings.updates + 1):
        errors.append(trainer.step(images[trainer.order(len(images))].to(settings.device)))
        if update % max(1, settings.updates // _REPORTS) == 0 or update == settings.updates:
            recent = sum(errors) / len(errors)
            say(f"vqvae {update}/{settings.updates}: mean squared error {recent:.5f}, {time.monotonic() - start:.0f} s")
            errors = []
    fitted = trainer.model.cpu().eval()
    fitted.requires_grad_(False)
    stored = ("vocab_size", "patch_size", "image_size")  # with the model
    trained = {name: value for name, value in asdict(settings).items() if name not in (*stored, "device")}
    fitted.provenance = {"images": len(views), "unreadable": unreadable, **trained}
    fitted.provenance |= measured_on(folder, fitted, settings.seed)
    return fitted
