"""The MoE layers' balance loss and z-loss, and their routing figures: the part that all criterions share."""

from collections.abc import Callable
from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from functools import partial
from typing import Any

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor

from ..common.ranges import check_flag
from ..moe import RoutingStats
from ..moe.parallelism import Traffic
from ..moe.stats import active_share, load_max_over_mean, overflow

_MEANS = ("gate_loss", "z_loss")
COMBINE_CHOICES = ChoiceEnum(["sum", "average"])
_COUNTS = ("moe_load", "moe_dropped", "moe_entropy_sum", "moe_subtokens")  # the fields of RoutingStats


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


class GateLosses:
    """``loss + sample_size * (w_b * balance + w_z * z)``: what every criterion adds to its own loss.

    ``balance`` and ``z`` are the layers' values combined by sum or average; a dense model has neither.

    Args:
        moe_gate_loss_wt, moe_gate_loss_combine_method, mhmoe_z_loss_wt: as in :class:`GateLossConfig`.

    Raises:
        ValueError: if a weight is negative or not finite.
    """

    def __init__(self, moe_gate_loss_wt: float, moe_gate_loss_combine_method: str, mhmoe_z_loss_wt: float) -> None:
        check_flag("moe_gate_loss_wt", moe_gate_loss_wt)
        check_flag("mhmoe_z_loss_wt", mhmoe_z_loss_wt)
        self.gate_weight = moe_gate_loss_wt
        self.z_weight = mhmoe_z_loss_wt
        self.combine_by_sum = str(moe_gate_loss_combine_method) == "sum"

    def add_to(self, loss: Tensor, extra: dict[str, Any], sample_size: float) -> tuple[Tensor, dict[str, Any]]:
        """Add the auxiliary losses of one batch.

        Args:
            loss: the criterion's own, summed over what ``sample_size`` counts.
            extra: what the model returned beside its logits.
            sample_size: what the loss is later divided by.

        Returns:
            the whole loss, and what to log of the MoE layers, all of it additive; nothing for a dense model.
        """
        layers = [output for output in extra.get("moe", []) if output is not None]
        if not layers:
            return loss, {}
        balance = self._combine([layer.balance_loss for layer in layers])
        z = self._combine([layer.z_loss for layer in layers])
        log: dict[str, Any] = {"gate_loss": balance.detach() * sample_size, "z_loss": z.detach() * sample_size}
        log.update(_routing_log([layer.stats for layer in layers]))
        log.update(_traffic_log([layer.traffic for layer in layers if layer.traffic is not None]))
        return loss + sample_size * (self.gate_weight * balance + self.z_weight * z), log

    def add_all_to(
        self, loss: Tensor, extras: list[dict[str, Any]], sample_size: float, counted: list[bool] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """As ``add_to``, where a batch takes several calls of the model: the mean of their auxiliary losses.

        Args:
            extras: of the calls.
            counted: of each call, whether it enters the figures (default: all do). All enter the loss, and what is
                logged has the same keys, since ranks that add their logs up may count different calls.
        """
        flags = [True] * len(extras) if counted is None else counted
        total: dict[str, Any] = {}
        for extra, is_counted in zip(extras, flags):
            loss, log = self.add_to(loss, extra, sample_size / len(extras))
            for key in (key for key in _MEANS if key in log):  # of the calls that count
                log[key] = log[key] * len(extras) / max(sum(flags), 1)
            total = {key: total.get(key, 0) + value * is_counted for key, value in log.items()}
        return loss, total

    def _combine(self, losses: list[Tensor]) -> Tensor:
        """One loss of the layers'."""
        return torch.stack(losses).sum() if self.combine_by_sum else torch.stack(losses).mean()


def log_gate_losses(logging_outputs: list[dict[str, Any]], sample_size: float) -> None:
    """Log the auxiliary losses per target and the routing figures of the whole set; nothing for a dense model."""
    for key in _MEANS:
        if any(key in log for log in logging_outputs):
            value = sum(log.get(key, 0) for log in logging_outputs) / sample_size
            metrics.log_scalar(key, value, sample_size, round=4)
    if any("moe_load" in log for log in logging_outputs):
        _log_routing(logging_outputs)
    if any("a2a_rows" in log for log in logging_outputs):
        _log_traffic(logging_outputs)


def _routing_log(stats: list[RoutingStats]) -> dict[str, Tensor]:
    """Additive routing counts: loads ``(rows, E)``, the rest ``(rows,)``; every pool of every layer has a row."""
    return {key: torch.cat(counts) for key, counts in zip(_COUNTS, zip(*(layer.by_pool() for layer in stats)))}


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
    for key in _COUNTS:
        metrics.log_scalar(f"_{key}", sum(log[key] for log in logging_outputs if key in log), weight=1)
    for name, figure in (
        ("moe_active", lambda rows: active_share(rows.expert_load)),
        ("moe_load_max", lambda rows: load_max_over_mean(rows.expert_load)),
        ("moe_overflow", overflow),
        ("moe_entropy", lambda rows: rows.entropy / rows.num_subtokens.clamp(min=1)),
    ):
        metrics.log_derived(name, partial(_mean, figure))


def _mean(figure: Callable[[RoutingStats], Tensor], meters: Any) -> float:
    """Over all rows but those of pools that nothing was routed to, such as the text's where there are images only."""
    rows = RoutingStats(*(meters[f"_{key}"].sum for key in _COUNTS))
    used = rows.expert_load.sum(1) > 0
    if not used.any():
        return 0.0
    return round(float(figure(RoutingStats(*(count[used] for count in rows))).mean()), 4)
