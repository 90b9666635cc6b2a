"""What criterions with one loss for each row log alike."""

from __future__ import annotations

import math
from typing import Any

from fairseq.logging import metrics

from .gate_losses import log_gate_losses


def row_log(sample: dict[str, Any], rows: int) -> dict[str, Any]:
    """The counts of a batch, additive; fairseq divides the loss by ``sample_size``."""
    replaced = sample.get("num_replaced", 0)  # samples that stand for one with a bad image
    return {"ntokens": sample["ntokens"], "nsentences": rows, "sample_size": rows, "num_replaced": replaced}


def log_rows(logging_outputs: list[dict[str, Any]], **percentages: str) -> None:
    """Log what the batches have summed up, so that a validation set's figures are exact.

    ``loss`` becomes bits per row; the number of samples that stand for one with a bad image is ``replaced``, where
    there are such; the routing figures are those of ``log_gate_losses``.

    Args:
        percentages: name -> key of a sum, whose mean over rows is logged times 100; left out where no batch has it.
    """
    rows = _total(logging_outputs, "sample_size")
    metrics.log_scalar("loss", _total(logging_outputs, "loss") / rows / math.log(2), rows, round=3)
    for name, key in percentages.items():
        if any(key in log for log in logging_outputs):
            metrics.log_scalar(name, 100 * _total(logging_outputs, key) / rows, rows, round=2)
    replaced = _total(logging_outputs, "num_replaced")
    if replaced:
        metrics.log_scalar_sum("replaced", float(replaced))
    log_gate_losses(logging_outputs, rows)


def _total(logging_outputs: list[dict[str, Any]], key: str) -> Any:
    return sum(log.get(key, 0) for log in logging_outputs)
