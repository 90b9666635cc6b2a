"""Contrastive loss of images and their texts over the rows of all ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fairseq.criterions import FairseqCriterion, register_criterion
from torch import Tensor, nn

from .gate_losses import GateLossConfig, GateLosses
from .gathering import gather_rows
from .row_logs import log_rows, row_log


class Vectors(NamedTuple):
    """What the last batch of all ranks was embedded as.

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
class RetrievalCriterion(FairseqCriterion):
    """``loss = rows * ((c_i + c_t) / 2 + w_b * balance + w_z * z)``, divided by the rows later.

    ``c_i`` is the cross entropy in nats of an image's own text among the texts of all ranks, by similarity times
    ``exp(logit_scale)``, and ``c_t`` that of a text's own image. A rank counts its own rows, so that the sum over
    the ranks is the loss of all. The auxiliary losses are the mean of those of the model's two calls.

    The logs give ``(c_i + c_t) / 2`` in bits (``loss``), and in percent how often an image's own text is the most
    similar of the batch (``image_accuracy``), and a text's own image (``text_accuracy``).
    """

    def __init__(
        self, task: Any, moe_gate_loss_wt: float, moe_gate_loss_combine_method: str, mhmoe_z_loss_wt: float
    ) -> None:
        super().__init__(task)
        self.task = task
        self.gate_losses = GateLosses(moe_gate_loss_wt, moe_gate_loss_combine_method, mhmoe_z_loss_wt)
        self._vectors: Vectors | None = None

    def take_vectors(self) -> Vectors | None:
        """Those of the last batch in evaluation, on every rank those of all, for recall over a whole set; once."""
        vectors, self._vectors = self._vectors, None
        return vectors

    def forward(self, model: nn.Module, sample: dict[str, Any], reduce: bool = True) -> tuple[Tensor, int, dict]:
        """The loss of one batch.

        Args:
            model: called with the sample's images, then with its texts, and the task's ``head_name``.
            sample: row i of ``images`` belongs to row i of ``text_tokens``. Where ``counted`` is False it is only there
                for the calls that all ranks make together, and its rows are compared with none.
            reduce: sum over the rows.

        Returns:
            the loss, in nats and summed (one value per row, without the auxiliary losses, if not ``reduce``); the
            number of rows; what to log, all of it additive.
        """
        head = self.task.head_name
        images, image_extra = model(images=sample["net_input"]["images"], head=head)
        texts, text_extra = model(text_tokens=sample["net_input"]["text_tokens"], head=head)
        kept = slice(None) if sample.get("counted", True) else slice(0)
        images, texts = images[kept], texts[kept]
        everyone, start = gather_rows(torch.stack([images, texts], dim=1))
        all_images, all_texts = everyone.unbind(1)
        if not model.training:
            ids, _ = gather_rows(torch.stack([sample["id"], sample["image_ids"]], dim=1)[kept])
            self._vectors = Vectors(*ids.unbind(1), all_images.detach(), all_texts.detach())
        scale = model.heads[head].logit_scale.float().exp()
        to_texts = scale * images.float() @ all_texts.float().T
        to_images = scale * texts.float() @ all_images.float().T
        own = start + torch.arange(len(images), device=images.device)
        losses = sum(F.cross_entropy(logits, own, reduction="none") for logits in (to_texts, to_images)) / 2
        logging_output: dict[str, Any] = {
            "loss": losses.detach().sum(),
            "image_correct": to_texts.argmax(dim=1).eq(own).sum(),
            "text_correct": to_images.argmax(dim=1).eq(own).sum(),
            **row_log(sample, len(own)),
        }
        if not reduce:
            return losses, len(own), logging_output
        loss, log = self.gate_losses.add_all_to(losses.sum(), [image_extra, text_extra], len(own))
        return loss, len(own), {**logging_output, **log}

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Log the mean loss and what is found within a batch."""
        log_rows(logging_outputs, image_accuracy="image_correct", text_accuracy="text_correct")

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """True: everything logged is additive, vectors included."""
        return True
