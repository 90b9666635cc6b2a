"""Contrastive loss of images and their texts over the rows of all ranks."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairseq.criterions import register_criterion
from torch import Tensor, nn

from .base import RowCriterion, Rows
from .gate_losses import GateLossConfig


class Embeddings(NamedTuple):
    """The images and texts of a batch of all ranks, and what compares them.

    Attributes:
        images, texts: ``(rows, D)`` of length 1; row i of both belong together.
        own: this rank's rows.
        scale: factor of their similarities.
        extras: what the model's two calls returned beside them.
    """

    images: Tensor
    texts: Tensor
    own: slice
    scale: Tensor
    extras: list[dict[str, Any]]


class Vectors(NamedTuple):
    """A batch's embeddings with their numbers, for recall over a whole set.

    Attributes:
        ids: ``(rows,)`` numbers of the texts in their data set.
        image_ids: ``(rows,)`` the image of each text.
        images, texts: ``(rows, D)`` of length 1.
    """

    ids: Tensor
    image_ids: Tensor
    images: Tensor
    texts: Tensor


@register_criterion("mhmoe_retrieval", dataclass=GateLossConfig)
class RetrievalCriterion(RowCriterion):
    """``loss = rows * ((c_i + c_t) / 2 + w_b * balance + w_z * z)``, divided by the rows later.

    ``c_i`` is the cross entropy in nats of an image's own text among the texts of all ranks, by similarity times
    ``exp(logit_scale)``, and ``c_t`` that of a text's own image. A rank counts its own rows, so that the sum over
    the ranks is the loss of all. The auxiliary losses are the mean of those of the model's two calls.

    The logs give ``(c_i + c_t) / 2`` in bits (``loss``), and in percent how often an image's own text is the most
    similar of the batch (``image_accuracy``), and a text's own image (``text_accuracy``).
    """

    percentages = {"image_accuracy": "image_correct", "text_accuracy": "text_correct"}

    def embed(self, model: nn.Module, sample: dict[str, Any]) -> Embeddings:
        """Return the embeddings of a batch, those of all ranks on every rank; all ranks must call it together.

        Args:
            model: called with the sample's images, then with its texts, and the task's ``head_name``.
            sample: row i of ``images`` belongs to row i of ``text_tokens``. Where ``counted`` is False it is only there
                for the calls that all ranks make together, and its rows are compared with none.
        """
        head = self.task.head_name
        images, image_extra = model(images=sample["net_input"]["images"], head=head)
        texts, text_extra = model(text_tokens=sample["net_input"]["text_tokens"], head=head)
        rows = torch.stack([images, texts], dim=1)[_counted(sample)]
        everyone, start = gather_rows(rows)
        scale = model.heads[head].logit_scale.float().exp()
        return Embeddings(*everyone.unbind(1), slice(start, start + len(rows)), scale, [image_extra, text_extra])

    def compare(self, found: Embeddings) -> Rows:
        """Return the loss of each of this rank's rows, right answers, and the ``extra`` of the model's calls."""
        images, texts = found.images.float(), found.texts.float()
        to_texts = found.scale * images[found.own] @ texts.T
        to_images = found.scale * texts[found.own] @ images.T
        own = torch.arange(found.own.start, found.own.stop, device=images.device)
        losses = sum(F.cross_entropy(logits, own, reduction="none") for logits in (to_texts, to_images)) / 2
        sums = {
            "image_correct": to_texts.argmax(dim=1).eq(own).sum(),
            "text_correct": to_images.argmax(dim=1).eq(own).sum(),
        }
        return losses, sums, found.extras

    def rows(self, model: nn.Module, sample: dict[str, Any]) -> Rows:
        """Return what ``compare`` does for a batch."""
        return self.compare(self.embed(model, sample))

    def vectors(self, found: Embeddings, sample: dict[str, Any]) -> Vectors:
        """Return a batch's embeddings with their numbers; all ranks must call it together."""
        ids, _ = gather_rows(torch.stack([sample["id"], sample["image_ids"]], dim=1)[_counted(sample)])
        return Vectors(*ids.unbind(1), found.images.detach(), found.texts.detach())


def _counted(sample: dict[str, Any]) -> slice:
    return slice(None) if sample.get("counted", True) else slice(0)


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """All ranks' rows, in the order of the ranks, which may have different numbers of them.

    Every rank must call it, and if one needs gradients all must: in the backward pass each gets the sum of what all
    ranks' losses say about its own rows.

    Args:
        rows: ``(n, ...)`` of this rank; the shapes but for n, and the types, are one on all ranks.

    Returns:
        ``(sum of n, ...)``, and where this rank's begin.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows, 0
    own = torch.tensor([rows.size(0)], device=rows.device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, own)
    counts = [int(size) for size in sizes]
    return _GatherRows.apply(rows, counts), sum(counts[: dist.get_rank()])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: rows.size(0)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _OwnRowsOfSum.apply(gradient, ctx.counts), None


class _OwnRowsOfSum(torch.autograd.Function):
    """The transpose of ``_GatherRows``, so that gradients can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        total = rows.contiguous().clone()
        dist.all_reduce(total)
        start = sum(counts[: dist.get_rank()])
        return total[start : start + counts[dist.get_rank()]]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _GatherRows.apply(gradient, ctx.counts), None
