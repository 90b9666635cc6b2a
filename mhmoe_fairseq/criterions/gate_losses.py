"""The MoE layers' balance loss and z-loss, and their routing metrics: the part that all criterions share."""

from collections.abc import Callable
from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from functools import partial
from typing import Any

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor

from ..common.ranges import check_flags
from ..moe import RoutingStats
from ..moe.parallelism import Traffic
from ..moe.stats import active_share, load_max_over_mean, overflow

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
        cfg: the weights, and how layers are combined.

    Raises:
        UserError: if a weight is negative or not finite.
    """

    def __init__(self, cfg: GateLossConfig) -> None:
        check_flags(cfg)
        self.gate_weight, self.z_weight = cfg.moe_gate_loss_wt, cfg.mhmoe_z_loss_wt
        self.combine_by_sum = str(cfg.moe_gate_loss_combine_method) == "sum"

    def add_to(
        self, loss: Tensor, calls: list[dict[str, Any]], sample_size: float, counted: list[bool] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Add the auxiliary losses of one batch, the mean of those of the model's calls.

        Args:
            loss: the criterion's own, summed over what ``sample_size`` counts.
            calls: what the model returned beside its logits, in each call that the batch took.
            sample_size: what the loss is later divided by.
            counted: of each call, whether it enters the metrics (default: all do). All enter the loss, and what is
                logged has the same keys, since ranks that add their logs up may count different calls.

        Returns:
            the whole loss, and what to log of the MoE layers, all of it additive; nothing for a dense model.
        """
        counted = [True] * len(calls) if counted is None else counted
        share, logged_share = sample_size / len(calls), sample_size / max(sum(counted), 1)
        log: dict[str, Any] = {}
        for extra, is_counted in zip(calls, counted):
            layers = [output for output in extra.get("moe", []) if output is not None]
            if not layers:
                continue
            balance = self._combine([layer.balance_loss for layer in layers])
            z = self._combine([layer.z_loss for layer in layers])
            loss = loss + share * (self.gate_weight * balance + self.z_weight * z)
            new = {
                "gate_loss": balance.detach() * logged_share,
                "z_loss": z.detach() * logged_share,
                **_routing_log([layer.stats for layer in layers]),
                **_traffic_log([layer.traffic for layer in layers if layer.traffic is not None]),
            }
            log = {key: log.get(key, 0) + value * is_counted for key, value in new.items()}
        return loss, log

    def _combine(self, losses: list[Tensor]) -> Tensor:
        """One loss of the layers'."""
        return torch.stack(losses).sum() if self.combine_by_sum else torch.stack(losses).mean()


def log_gate_losses(logging_outputs: list[dict[str, Any]], sample_size: float) -> None:
    """Log the auxiliary losses per target and the routing metrics of the whole set; nothing for a dense model."""
    logs = [log for log in logging_outputs if "moe_load" in log]
    if not logs:
        return
    for key in ("gate_loss", "z_loss"):
        metrics.log_scalar(key, sum(log[key] for log in logs) / sample_size, sample_size, round=4)
    _log_routing(logs)
    _log_traffic([log for log in logs if "a2a_rows" in log])


def _routing_log(stats: list[RoutingStats]) -> dict[str, Tensor]:
    """Additive routing counts: loads ``(rows, E)``, the rest ``(rows,)``; every pool of every layer has a row."""
    return {key: torch.cat(counts) for key, counts in zip(_COUNTS, zip(*(layer.by_pool() for layer in stats)))}


def _traffic_log(traffic: list[Traffic]) -> dict[str, Tensor]:
    """Additive counts of what went to the experts, ``(layers,)``; nothing without expert parallelism."""
    keys = {"a2a_rows": "rows", "a2a_bytes": "bytes"} if traffic else {}
    return {
        key: torch.tensor([getattr(layer, name) for layer in traffic], dtype=torch.float64)
        for key, name in keys.items()
    }


def _log_traffic(logs: list[dict[str, Any]]) -> None:
    """Of an average layer and an average update (in validation, batch), over all processes, in one direction."""
    for key, name, unit in (("a2a_rows", "a2a_rows", 1), ("a2a_bytes", "a2a_mb", 1e6)) if logs else ():
        total = sum(log[key] for log in logs)
        metrics.log_scalar(name, float(total.mean()) / unit, weight=1, round=6)


def _log_routing(logs: list[dict[str, Any]]) -> None:
    # Hidden meters (leading underscore) add the counts up; the metrics come from the sums, so that a validation set's
    # are exact and not means over batches.
    for key in _COUNTS:
        metrics.log_scalar(f"_{key}", sum(log[key] for log in logs), weight=1)
    for name, metric in (
        ("moe_active", lambda rows: active_share(rows.expert_load)),
        ("moe_load_max", lambda rows: load_max_over_mean(rows.expert_load)),
        ("moe_overflow", overflow),
        ("moe_entropy", lambda rows: rows.entropy / rows.num_subtokens.clamp(min=1)),
    ):
        metrics.log_derived(name, partial(_mean, metric))


def _mean(metric: Callable[[RoutingStats], Tensor], meters: Any) -> float:
    """Over all rows but those of pools that nothing was routed to, such as the text's where there are images only."""
    rows = RoutingStats(*(meters[f"_{key}"].sum for key in _COUNTS))
    used = rows.expert_load.sum(1) > 0
    if not used.any():
        return 0.0
    return round(float(metric(RoutingStats(*(count[used] for count in rows))).mean()), 4)
