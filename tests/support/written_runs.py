"""Run folders as a training and ``mhmoe evaluate`` leave them, with metrics chosen by hand."""

import json
from pathlib import Path
from typing import Any

from mhmoe_fairseq.evaluation.records import ExpertLoads, LayerLoads, Metric, Record, record_file, write_record

COUNTS = {
    "dense": {"parameters": 2_000_000, "active": 2_000_000, "flops_per_token": 4_100_000, "context": 32},
    "mhmoe": {
        "parameters": 3_500_000, "active": 2_500_000, "flops_per_token": 5_250_000, "context": 32, "heads": 2,
        "experts": 4, "expert_width": 1024, "top_k": 2,
    },
}  # fmt: skip


def text_metrics(perplexity: float, **more: float) -> dict[str, Metric]:
    """``bits_per_byte=1.5`` for the metric bits/byte, and so on."""
    named = {name.replace("_per_", "/"): Metric(value, name) for name, value in more.items()}
    return {"perplexity": Metric(perplexity, "perplexity", count=1000), **named}


def make_record(metrics: dict[str, Metric], what: str = "perplexity", model: str = "dense", **fields: Any) -> Record:
    """A record of the test split, of a corpus with digest 0."""
    settings = {"optimization": {"lr": [0.002]}, "common": {"seed": 1}}
    defaults = {
        "split": "test", "model": {"counts": COUNTS[model], "settings": settings},
        "data": {"source": "sentences", "digest": "0" * 64}, "provenance": {"commit": "c0ffee"},
    }  # fmt: skip
    return Record(what, metrics=metrics, **{**defaults, **fields})


def loads(*rows: tuple[int, str | None, list[float]]) -> ExpertLoads:
    """Expert loads of rows (layer, part, loads)."""
    return ExpertLoads([LayerLoads(layer, load, part, entropy=0.5) for layer, part, load in rows])


def write_run(folder: Path, *records: Record, updates: int = 8, command: str | None = None) -> Path:
    """A run that logged two intervals and a validation."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"num_updates": n, "loss": "9.5", "wps": str(100 * n), "gate_loss": "1.1"} for n in (updates // 2, updates)
    ]
    lines.append({"valid_num_updates": updates, "valid_loss": "5.0", "valid_ppl": "32.0"})
    (folder / "train.log").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    if command is not None:
        (folder / "command.sh").write_text(f"#!/bin/sh\n{command}\n", encoding="utf-8")
    for record in records:
        write_record(record_file(folder, record.split), record)
    return folder
