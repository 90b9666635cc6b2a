"""What all criterions share: the flags of the MoE layers' losses, sums over batches, one loss for each row."""

import math
from typing import Any, ClassVar

from fairseq import utils
from fairseq.criterions import FairseqCriterion
from fairseq.logging import metrics
from torch import Tensor, nn

from .gate_losses import GateLossConfig, GateLosses, log_gate_losses

Outcome = tuple[Tensor, Any, dict[str, Any]]  # the loss, what it is later divided by, what to log
Rows = tuple[Tensor, dict[str, Tensor], list[dict[str, Any]]]  # losses, sums to log, the model's extras


class MoECriterion(FairseqCriterion):
    """Base of all criterions, which add the MoE layers' balance loss and z-loss to their own with ``gate_losses``.

    Args:
        task: fairseq's.
        cfg: the criterion's flags.

    Raises:
        UserError: naming a flag whose number is out of its range.
    """

    def __init__(self, task: Any, cfg: GateLossConfig) -> None:
        super().__init__(task)
        self.cfg = cfg
        self.gate_losses = GateLosses(cfg)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """True: everything logged is additive, vectors included."""
        return True


class RowCriterion(MoECriterion):
    """Base of criterions with one loss for each row: ``loss = sum of the rows' + rows * (w_b * balance + w_z * z)``.

    The logs give the rows' mean loss in bits (``loss``), the percentages, and how many samples stand for one with a
    bad image (``replaced``), where there are such. All come from sums, so that a validation set's are exact.

    Attributes:
        percentages: name in the log -> key of a sum over rows, whose mean is logged times 100.
    """

    percentages: ClassVar[dict[str, str]] = {}

    def rows(self, model: nn.Module, sample: dict[str, Any]) -> Rows:
        """``(B,)`` losses in nats, sums over the rows to log, and the ``extra`` of each of the model's calls."""
        raise NotImplementedError

    def forward(self, model: nn.Module, sample: dict[str, Any], reduce: bool = True) -> Outcome:
        """Return the loss of one batch, in nats and summed, the number of rows, and what to log, all of it additive.

        Args:
            model: the model.
            sample: the batch.
            reduce: sum over the rows and add the auxiliary losses; else return the rows' own losses, ``(B,)``.
        """
        return self.outcome(sample, *self.rows(model, sample), reduce=reduce)

    def outcome(
        self, sample: dict[str, Any], losses: Tensor, sums: dict[str, Tensor], extras: list[dict], reduce: bool = True
    ) -> Outcome:
        """Return what ``forward`` does, from what ``rows`` returned for the sample."""
        rows = losses.size(0)
        log = {
            "loss": losses.detach().sum(),
            **sums,
            "ntokens": sample["ntokens"],
            "nsentences": rows,
            "sample_size": rows,
            "num_replaced": sample.get("num_replaced", 0),  # samples that stand for one with a bad image
        }
        if not reduce:
            return losses, rows, log
        loss, gate_log = self.gate_losses.add_to(losses.sum(), extras, rows)
        return loss, rows, {**log, **gate_log}

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Log the mean loss, the percentages and the routing metrics of all batches together."""
        rows = total(logging_outputs, "sample_size")
        log_bits("loss", total(logging_outputs, "loss"), rows)
        for name, key in cls.percentages.items():
            metrics.log_scalar(name, 100 * total(logging_outputs, key) / rows, rows, round=2)
        log_replaced(logging_outputs)
        log_gate_losses(logging_outputs, rows)


def total(logging_outputs: list[dict[str, Any]], key: str) -> Any:
    """Return the sum of one entry over the logs that have it."""
    return sum(log.get(key, 0) for log in logging_outputs)


def log_bits(name: str, nats: Any, count: Any) -> None:
    """Log a mean of ``count`` losses, whose sum is ``nats``, in bits."""
    metrics.log_scalar(name, nats / count / math.log(2), count, round=3)


def log_perplexity(name: str, of: str) -> None:
    """Log the perplexity that belongs to a loss that is logged in bits as ``of``."""
    metrics.log_derived(name, lambda meters: utils.get_perplexity(meters[of].avg))


def log_replaced(logging_outputs: list[dict[str, Any]]) -> None:
    """Log how many samples stand for one with a bad image, if any do."""
    replaced = total(logging_outputs, "num_replaced")
    if replaced:
        metrics.log_scalar_sum("replaced", float(replaced))
