"""Recall at 1, 5 and 10 of images by texts and of texts by images, over a whole set."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from fairseq.logging.meters import Meter
from torch import Tensor

RANKS = (1, 5, 10)
_CHUNK = 1024  # rows of the similarity matrix at a time


def recalls(images: Tensor, texts: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """How often what belongs together is found, in percent.

    Args:
        images: ``(I, D)`` of length 1.
        texts: ``(T, D)`` of length 1.
        image_of_text: ``(T,)`` the row of each text's image; every image has a text.

    Returns:
        ``text_rK``: how often one of an image's texts is among the K most similar to it; ``image_rK``: how often a
        text's image is among the K most similar to it; ``mean_recall`` of the six. Of equally similar ones the right
        one counts as the last, so that a model that gives all the same vector finds nothing.
    """
    image_ids = torch.arange(len(images), device=images.device)
    of_images = (images, image_ids, texts, image_of_text)
    of_texts = (texts, image_of_text, images, image_ids)
    found: dict[str, float] = {}
    for direction, pairs in (("text", of_images), ("image", of_texts)):
        ranks = _ranks(*pairs)
        found |= {f"{direction}_r{most}": 100 * float((ranks < most).double().mean()) for most in RANKS}
    return {**found, "mean_recall": sum(found.values()) / len(found)}


def chance_of_recall(texts_of_image: Sequence[int]) -> float:
    """Percent of ``mean_recall`` that a random order reaches on average.

    Args:
        texts_of_image: how many texts each image has.
    """
    images, texts = len(texts_of_image), sum(texts_of_image)
    by_rank = []
    for most in RANKS:
        drawn = min(most, texts)
        misses = sum(math.comb(texts - own, drawn) for own in texts_of_image) / math.comb(texts, drawn)
        by_rank += [1 - misses / images, min(most, images) / images]
    return 100 * sum(by_rank) / len(by_rank)


def _ranks(queries: Tensor, query_ids: Tensor, answers: Tensor, answer_ids: Tensor) -> Tensor:
    """``(Q,)``: how many other answers are at least as similar to a query as the most similar one with its id."""
    ranks = []
    for some, ids in zip(queries.split(_CHUNK), query_ids.split(_CHUNK)):
        similarity = some @ answers.T
        is_own = answer_ids[None] == ids[:, None]
        best = similarity.masked_fill(~is_own, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append((~(similarity < best) & ~is_own).sum(dim=1))  # what is no number ranks last
    return torch.cat(ranks)


class VectorMeter(Meter):
    """Keeps what a validation has embedded, each text and each image once, whatever batches it came in."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._texts: dict[int, tuple[int, Tensor]] = {}
        self._images: dict[int, Tensor] = {}

    def update(self, vectors: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        """Add a batch: ``(rows,)`` numbers of texts and of their images, ``(rows, D)`` images and texts."""
        ids, image_ids, images, texts = vectors
        rows = zip(ids.tolist(), image_ids.tolist(), images.float().cpu(), texts.float().cpu())
        for text_id, image_id, image, text in rows:
            self._texts[text_id] = (image_id, text)
            self._images[image_id] = image

    @property
    def recalls(self) -> dict[str, float]:
        """The recalls of what was added so far; see ``recalls``."""
        row_of_image = {image: row for row, image in enumerate(self._images)}
        image_of_text = torch.tensor([row_of_image[image] for image, _ in self._texts.values()])
        texts = torch.stack([text for _, text in self._texts.values()])
        return recalls(torch.stack(list(self._images.values())), texts, image_of_text)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a validation is never resumed."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start empty."""
        self.reset()

    @property
    def smoothed_value(self) -> float:
        """fairseq's name for a meter's figure."""
        return self.recalls["mean_recall"]
