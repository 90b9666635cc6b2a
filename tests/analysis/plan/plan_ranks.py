"""What one rank of a real model sends and keeps, for comparison with the plan."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from kept_tensors import kept_bytes_of
from language_models import SMALL, small_dictionary

from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.language_model import build_language_model
from mhmoe_fairseq.parallel import TrafficCounter, expert_parallelism

ROWS, LENGTH = 3, 24


@dataclass(frozen=True)
class Measured:
    """One rank's forward and backward pass.

    Attributes:
        counter: what really passed between processes.
        traffic: rows and bytes that each MoE layer logged, for one direction.
        load: rows per expert of every MoE layer.
        kept: bytes that autograd held at the end of the forward pass.
    """

    counter: TrafficCounter
    traffic: list[tuple[int, int]]
    load: list[torch.Tensor]
    kept: int


def options_of(arch: str, flags: dict[str, Any]):
    return architecture_options(arch, **{**SMALL, "dropout": 0.0, **flags})


def measure(arch: str, size: int, flags: dict[str, Any], by: str = "experts") -> Measured:
    """On every rank: a model whose experts ``size`` ranks share, one micro-batch of its own."""
    parallel = expert_parallelism(size, by)
    torch.manual_seed(0)
    model = build_language_model(options_of(arch, flags), small_dictionary(), parallel).train()
    parallel.counter = TrafficCounter()
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(4, 44, (ROWS, LENGTH), generator=generator)
    layers = [layer.moe_layer for layer in model.decoder.layers if layer.is_moe_layer]
    latest = {}  # a layer's latest call may be a recomputation
    for layer in layers:
        layer.register_forward_hook(lambda layer, x, output: latest.update({layer: output}))
    kept = kept_bytes_of(model, tokens, backward=True)
    outputs = [latest[layer] for layer in layers]
    return Measured(parallel.counter, [tuple(o.traffic) for o in outputs], [o.stats.expert_load for o in outputs], kept)
