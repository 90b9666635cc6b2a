"""What all criterions share: the MoE layers' balance loss and z-loss, and logs that add up over batches and ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from functools import partial
from typing import Any, ClassVar

import torch
from fairseq import utils
from fairseq.criterions import FairseqCriterion
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.logging import metrics
from fairseq.models import BaseFairseqModel
from torch import Tensor

from ..common.ranges import check_flags
from ..moe import RoutingStats
from ..moe.stats import active_share, load_max_over_mean, overflow

Outcome = tuple[Tensor, Any, dict[str, Any]]  # the loss, what it is later divided by, what to log
Losses = tuple[Tensor, dict[str, Any], list[dict[str, Any]]]  # of rows, sums to log, the model's extras
COMBINE_CHOICES = ChoiceEnum(["sum", "average"])
_COUNTS = ("moe_load", "moe_dropped", "moe_entropy_sum", "moe_subtokens")  # the fields of RoutingStats
_TRAFFIC = ("a2a_rows", "a2a_bytes")  # the fields of Traffic


@dataclass
class GateLossConfig(FairseqDataclass):
    """The flags of the auxiliary losses."""

    moe_gate_loss_wt: float = field(default=0.01, metadata={"help": "weight of the MoE layers' balance loss"})
    moe_gate_loss_combine_method: COMBINE_CHOICES = field(
        default="average", metadata={"help": "combine the MoE layers' balance losses, and z-losses, by sum or average"}
    )
    mhmoe_z_loss_wt: float = field(
        default=0.0, metadata={"help": "weight of the router's z-loss, the mean squared log-sum-exp of its logits"}
    )


class MoECriterion(FairseqCriterion):
    """Base of all criterions: ``loss = sum of the rows' losses + sample_size * (w_b * balance + w_z * z)``.

    ``balance`` and ``z`` are the MoE layers' losses combined by sum or average; a dense model has neither.

    The logs give the mean loss in bits (``loss``) without the auxiliary losses, so that models with and without MoE
    layers, and any weights, compare; the percentages; how many samples stand for one with a bad image (``replaced``),
    where there are such; and the routing. All come from sums, so that a validation set's are exact.

    Attributes:
        nll: key of a sum in nats, whose mean over ``ntokens`` is logged as ``nll_loss``, and ``ppl`` from it; where it
            is the loss itself, only if it differs from that.
        percentages: name in the log -> keys of two sums, whose quotient is logged times 100.

    Raises:
        UserError: naming a flag whose number is out of its range.
    """

    nll: ClassVar[str] = ""
    percentages: ClassVar[dict[str, tuple[str, str]]] = {}

    def __init__(self, task: Any, cfg: GateLossConfig) -> None:
        super().__init__(task)
        check_flags(cfg)
        self.cfg = cfg

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """True: everything logged is additive, vectors included."""
        return True

    def losses(self, model: BaseFairseqModel, sample: dict[str, Any]) -> Losses:
        """Return the rows' losses in nats, sums to log, and the ``extra`` of each of the model's calls.

        The sums may give ``nsentences`` and ``sample_size``, which are the number of rows by default.
        """
        raise NotImplementedError

    def forward(self, model: BaseFairseqModel, sample: dict[str, Any], reduce: bool = True) -> Outcome:
        """Return the loss of one batch, in nats and summed, what it is later divided by, and what to log.

        Args:
            reduce: sum over the rows and add the auxiliary losses; else return the rows' own losses.
        """
        return self.outcome(sample, *self.losses(model, sample), reduce=reduce)

    def outcome(
        self, sample: dict[str, Any], losses: Tensor, sums: dict[str, Any], calls: list[dict], reduce: bool = True
    ) -> Outcome:
        """Return what ``forward`` does, from what ``losses`` returned for the sample."""
        rows = losses.size(0)
        log = {"ntokens": sample["ntokens"], "nsentences": rows, "sample_size": rows, **sums}
        log["loss"] = losses.detach().sum()
        if "num_replaced" in sample:  # samples that stand for one with a bad image
            log["num_replaced"] = sample["num_replaced"]
        loss, gate_log = self.add_gate_losses(losses.sum(), calls, log["sample_size"])
        return loss if reduce else losses, log["sample_size"], {**log, **gate_log}

    def add_gate_losses(
        self,
        loss: Tensor,
        calls: list[dict[str, Any]],
        sample_size: float | Tensor,
        counted: list[bool] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Add the auxiliary losses of one batch, the mean of those of the model's calls.

        Args:
            loss: the criterion's own, summed over what ``sample_size`` counts.
            calls: what the model returned beside its logits, in each call that the batch took.
            sample_size: what the loss is later divided by.
            counted: of each call, whether it enters the metrics (default: all do). All enter the loss, and what is
                logged has the same keys, since ranks that add their logs up may count different calls.

        Returns:
            the whole loss, and what to log of the MoE layers, all of it additive; nothing for a dense model. Every pool
            of every layer has a row in the routing counts, every layer one in the traffic's.
        """
        combine = torch.sum if str(self.cfg.moe_gate_loss_combine_method) == "sum" else torch.mean
        counted = [True] * len(calls) if counted is None else counted
        share, logged_share = sample_size / len(calls), sample_size / max(sum(counted), 1)
        log: dict[str, Any] = {}
        for extra, is_counted in zip(calls, counted):
            layers = [output for output in extra.get("moe", []) if output is not None]
            if not layers:
                continue
            balance = combine(torch.stack([layer.balance_loss for layer in layers]))
            z = combine(torch.stack([layer.z_loss for layer in layers]))
            loss = loss + share * (self.cfg.moe_gate_loss_wt * balance + self.cfg.mhmoe_z_loss_wt * z)
            counts = zip(*(layer.stats.by_pool() for layer in layers))
            traffic = zip(*(layer.traffic for layer in layers if layer.traffic is not None))
            new = {
                "gate_loss": balance.detach() * logged_share,
                "z_loss": z.detach() * logged_share,
                **dict(zip(_COUNTS, map(torch.cat, counts))),
                **{key: torch.tensor(sent, dtype=torch.float64) for key, sent in zip(_TRAFFIC, traffic)},
            }
            log = {key: log.get(key, 0) + value * is_counted for key, value in new.items()}
        return loss, log

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Log the metrics of all batches together."""
        sample_size, ntokens = total(logging_outputs, "sample_size"), total(logging_outputs, "ntokens")
        log_bits("loss", total(logging_outputs, "loss"), sample_size)
        if cls.nll == "loss" and sample_size == ntokens:
            log_perplexity("ppl", of="loss")
        elif cls.nll:
            log_bits("nll_loss", total(logging_outputs, cls.nll), ntokens)
            log_perplexity("ppl", of="nll_loss")
        for name, (key, counted) in cls.percentages.items():
            if any(key in log for log in logging_outputs):
                count = total(logging_outputs, counted)
                metrics.log_scalar(name, 100 * total(logging_outputs, key) / count, count, round=2)
        log_layers(logging_outputs, sample_size)


def total(logging_outputs: list[dict[str, Any]], key: str) -> Any:
    """Return the sum of one entry over the logs that have it."""
    return sum(log.get(key, 0) for log in logging_outputs)


def log_bits(name: str, nats: Any, count: Any) -> None:
    """Log a mean of ``count`` losses, whose sum is ``nats``, in bits."""
    metrics.log_scalar(name, nats / count / math.log(2), count, round=3)


def log_perplexity(name: str, of: str) -> None:
    """Log the perplexity that belongs to a loss that is logged in bits as ``of``."""
    metrics.log_derived(name, lambda meters: utils.get_perplexity(meters[of].avg))


def log_layers(logging_outputs: list[dict[str, Any]], sample_size: float) -> None:
    """Log how many samples stand for one with a bad image, if any do, and what the MoE layers did.

    That is, unless the model is dense, their losses per target, the routing of the whole set, and the traffic of an
    average layer and update (in validation, batch), over all processes, in one direction.
    """
    replaced = total(logging_outputs, "num_replaced")
    if replaced:
        metrics.log_scalar_sum("replaced", float(replaced))
    logs = [log for log in logging_outputs if "moe_load" in log]
    if not logs:
        return
    for key in ("gate_loss", "z_loss"):
        metrics.log_scalar(key, total(logs, key) / sample_size, sample_size, round=4)
    # Hidden meters (leading underscore) add the counts up; the metrics come from the sums, so that a validation set's
    # are exact and not means over batches. They are on the host, by one copy: fairseq computes all metrics in every
    # update, which on a GPU is a hundred kernels.
    counts = [total(logs, key) for key in _COUNTS]
    on_host = torch.cat([count.flatten() for count in counts]).cpu().split([count.numel() for count in counts])
    for key, count, values in zip(_COUNTS, counts, on_host):
        metrics.log_scalar(f"_{key}", values.view(count.shape), weight=1)
    for name, metric in (
        ("moe_active", lambda rows: active_share(rows.expert_load)),
        ("moe_load_max", lambda rows: load_max_over_mean(rows.expert_load)),
        ("moe_overflow", overflow),
        ("moe_entropy", lambda rows: rows.entropy / rows.num_subtokens.clamp(min=1)),
        ("moe_choices", lambda rows: rows.expert_load.sum(1) / rows.num_subtokens.clamp(min=1)),
    ):
        metrics.log_derived(name, partial(_mean, metric))
    for key, name, unit in zip(_TRAFFIC, ("a2a_rows", "a2a_mb"), (1, 1e6)):
        if any(key in log for log in logs):
            metrics.log_scalar(name, float(total(logs, key).mean()) / unit, weight=1, round=6)


def _mean(metric: Callable[[RoutingStats], Tensor], meters: Any) -> float:
    """Over all rows but those of pools that nothing was routed to, such as the text's where there are images only."""
    rows = RoutingStats(*(meters[f"_{key}"].sum for key in _COUNTS))
    used = rows.expert_load.sum(1) > 0
    if not used.any():
        return 0.0
    return round(float(metric(RoutingStats(*(count[used] for count in rows))).mean()), 4)
