"""Cross entropy plus the MoE layers' balance loss and z-loss."""

import math
from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from typing import Any

import torch
import torch.nn.functional as F
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor, nn

from ..moe import RoutingStats
from ..moe.parallelism import Traffic
from ..moe.stats import active_share, load_max_over_mean

COMBINE_CHOICES = ChoiceEnum(["sum", "average"])


@dataclass
class MoECrossEntropyConfig(FairseqDataclass):
    """Flags of the criterion."""

    moe_gate_loss_wt: float = field(default=0.01, metadata={"help": "weight of the MoE layers' balance loss"})
    moe_gate_loss_combine_method: COMBINE_CHOICES = field(
        default="average", metadata={"help": "combine the MoE layers' balance losses, and z-losses, by sum or average"}
    )
    mhmoe_z_loss_wt: float = field(
        default=0.0, metadata={"help": "weight of the router's z-loss, the mean squared log-sum-exp of its logits"}
    )
    sentence_avg: bool = II("optimization.sentence_avg")


@register_criterion("moe_cross_entropy", dataclass=MoECrossEntropyConfig)
class MoECrossEntropyCriterion(FairseqCriterion):
    """``loss = cross entropy in nats, summed over targets, + sample_size * (w_b * balance + w_z * z)``.

    ``balance`` and ``z`` are the layers' values combined by sum or average. A dense model has neither, and its loss is
    plain cross entropy. The logs give cross entropy alone, in bits as everywhere in fairseq (``loss``, and ``ppl``
    from it), so that models with and without MoE layers, and any weights, compare.
    """

    def __init__(
        self,
        task: Any,
        moe_gate_loss_wt: float,
        moe_gate_loss_combine_method: str,
        mhmoe_z_loss_wt: float,
        sentence_avg: bool,
    ) -> None:
        super().__init__(task)
        for flag, weight in (("--moe-gate-loss-wt", moe_gate_loss_wt), ("--mhmoe-z-loss-wt", mhmoe_z_loss_wt)):
            if weight < 0:
                raise ValueError(f"{flag} ({weight}) must be at least 0")
        self.gate_weight = moe_gate_loss_wt
        self.z_weight = mhmoe_z_loss_wt
        self.combine_by_sum = str(moe_gate_loss_combine_method) == "sum"
        self.sentence_avg = sentence_avg

    def forward(self, model: nn.Module, sample: dict[str, Any], reduce: bool = True) -> tuple[Tensor, int, dict]:
        """The loss of one batch.

        Returns:
            the loss, in nats and summed (one value per target, without the auxiliary losses, if not ``reduce``); the
            number of targets or sentences that it is later divided by; what to log, all of it additive.
        """
        logits, extra = model(**sample["net_input"])
        cross_entropy = self._cross_entropy(model, logits, sample, reduce)
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "loss": cross_entropy.detach().sum(),
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
        }
        losses = [losses for losses in extra.get("l_aux", []) if losses is not None]
        if not losses or not reduce:
            return cross_entropy, sample_size, logging_output

        balance, z = self._combine(torch.stack(losses))
        loss = cross_entropy + sample_size * (self.gate_weight * balance + self.z_weight * z)
        logging_output["gate_loss"] = balance.detach() * sample_size
        logging_output["z_loss"] = z.detach() * sample_size
        logging_output.update(_routing_log([stats for stats in extra["moe_stats"] if stats is not None]))
        logging_output.update(_traffic_log([traffic for traffic in extra["moe_traffic"] if traffic is not None]))
        return loss, sample_size, logging_output

    def _cross_entropy(self, model: nn.Module, logits: Tensor, sample: dict[str, Any], reduce: bool) -> Tensor:
        log_probs = model.get_normalized_probs((logits, None), log_probs=True)
        target = model.get_targets(sample, None)
        return F.nll_loss(
            log_probs.reshape(-1, log_probs.size(-1)),
            target.reshape(-1),
            ignore_index=self.padding_idx,
            reduction="sum" if reduce else "none",
        )

    def _combine(self, losses: Tensor) -> Tensor:
        """``(layers, 2) -> (2,)``."""
        return losses.sum(0) if self.combine_by_sum else losses.mean(0)

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Log sums over the batches; what is derived from routing is derived from the whole set's counts."""
        total = {key: sum(log.get(key, 0) for log in logging_outputs) for key in ("loss", "ntokens", "sample_size")}
        sample_size, ntokens = total["sample_size"], total["ntokens"]
        metrics.log_scalar("loss", total["loss"] / sample_size / math.log(2), sample_size, round=3)
        per_token = "loss"
        if sample_size != ntokens:
            per_token = "nll_loss"
            metrics.log_scalar(per_token, total["loss"] / ntokens / math.log(2), ntokens, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters[per_token].avg))

        for key in ("gate_loss", "z_loss"):
            if any(key in log for log in logging_outputs):
                value = sum(log.get(key, 0) for log in logging_outputs) / sample_size
                metrics.log_scalar(key, value, sample_size, round=4)
        if any("moe_load" in log for log in logging_outputs):
            _log_routing(logging_outputs)
        if any("a2a_rows" in log for log in logging_outputs):
            _log_traffic(logging_outputs)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """True: everything logged is additive, vectors included."""
        return True


def _routing_log(stats: list[RoutingStats]) -> dict[str, Tensor]:
    """Additive routing counts: loads ``(layers, E)``, the rest ``(layers,)``."""
    return {
        "moe_load": torch.stack([layer.expert_load for layer in stats]),
        "moe_dropped": torch.stack([layer.dropped for layer in stats]),
        "moe_entropy_sum": torch.stack([layer.entropy for layer in stats]),
        "moe_subtokens": torch.stack([layer.num_subtokens for layer in stats]),
    }


def _traffic_log(traffic: list[Traffic]) -> dict[str, Tensor]:
    """Additive counts of what went to the experts, ``(layers,)``; nothing without expert parallelism."""
    if not traffic:
        return {}
    return {
        "a2a_rows": torch.tensor([layer.rows for layer in traffic], dtype=torch.float64),
        "a2a_bytes": torch.tensor([layer.bytes for layer in traffic], dtype=torch.float64),
    }


def _log_traffic(logging_outputs: list[dict[str, Any]]) -> None:
    """Of an average layer and an average update (in validation, batch), over all processes, in one direction."""
    for key, name, unit in (("a2a_rows", "a2a_rows", 1), ("a2a_bytes", "a2a_mb", 1e6)):
        total = sum(log[key] for log in logging_outputs if key in log)
        metrics.log_scalar(name, float(total.mean()) / unit, weight=1, round=6)


def _log_routing(logging_outputs: list[dict[str, Any]]) -> None:
    # Hidden meters (leading underscore) add the counts up; the figures come from the sums, so that a validation set's
    # are exact and not means over batches.
    for key in ("moe_load", "moe_dropped", "moe_entropy_sum", "moe_subtokens"):
        metrics.log_scalar(f"_{key}", sum(log[key] for log in logging_outputs if key in log), weight=1)

    def mean(values: Tensor) -> float:
        return round(float(values.mean()), 4)

    def count(meters: Any, key: str) -> Tensor:
        return meters[f"_{key}"].sum

    metrics.log_derived("moe_active", lambda meters: mean(active_share(count(meters, "moe_load"))))
    metrics.log_derived("moe_load_max", lambda meters: mean(load_max_over_mean(count(meters, "moe_load"))))
    metrics.log_derived(
        "moe_overflow",
        lambda meters: mean(count(meters, "moe_dropped") / count(meters, "moe_load").sum(1).clamp(min=1)),
    )
    metrics.log_derived(
        "moe_entropy",
        lambda meters: mean(count(meters, "moe_entropy_sum") / count(meters, "moe_subtokens").clamp(min=1)),
    )
