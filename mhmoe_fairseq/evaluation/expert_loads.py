"""Count which experts a model uses while it is evaluated."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..moe import RoutingStats
from ..torchscale_ext.feed_forward import SeparateExperts
from .records import ExpertLoads, LayerLoads

POOLS = SeparateExperts.pools  # where a layer has experts of its own for each modality, in their order


class LoadCounter:
    """Sums of what the MoE layers of a model return, for the whole split and for each part of it.

    Counts are float64: float32 stops counting at 16 million.

    Args:
        layers: of a decoder or encoder; ``layer.moe_layer`` returns ``stats`` where ``layer.is_moe_layer``.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        found = {index: layer for index, layer in enumerate(layers) if layer.is_moe_layer}
        self._layers = {index: layer.get_submodule("moe_layer") for index, layer in found.items()}
        self._sums: dict[tuple[str | None, int], RoutingStats] = {}
        self.part: str | None = None

    @contextlib.contextmanager
    def counting(self, part: str | None = None) -> Iterator[None]:
        """Count the forward passes inside this context, as those of ``part``, which may be set anew inside."""
        self.part = part
        hooks = [
            module.register_forward_hook(functools.partial(self._add, index)) for index, module in self._layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _add(self, index: int, module: nn.Module, inputs: Any, output: Any) -> None:
        new = RoutingStats(*(count.double() for count in output.stats.by_pool()))
        old = self._sums.get((self.part, index))
        self._sums[self.part, index] = new if old is None else _sum([old, new])

    @property
    def loads(self) -> ExpertLoads | None:
        """What was counted: rows of the whole split, then of each part; None of a dense model."""
        parts = list(dict.fromkeys(part for part, _ in self._sums))
        groups = [(None, parts), *((part, [part]) for part in parts if parts != [None])]
        rows: list[LayerLoads] = []
        for name, members in groups:
            for index in self._layers:
                counted = [self._sums[part, index] for part in members if (part, index) in self._sums]
                rows += _rows(name, index, counted)
        return ExpertLoads(rows) if rows else None


def _sum(counted: list[RoutingStats]) -> RoutingStats:
    return RoutingStats(*(torch.stack(counts).sum(0) for counts in zip(*counted)))


def _rows(part: str | None, index: int, counted: list[RoutingStats]) -> Iterator[LayerLoads]:
    """A row for each pool of a layer's experts that sub-tokens were routed to."""
    if not counted:
        return
    total = _sum(counted)
    names = POOLS if len(total.dropped) == len(POOLS) else (None,)
    for pool, load, dropped, entropy, subtokens in zip(names, *(count.tolist() for count in total), strict=True):
        if subtokens:
            yield LayerLoads(index, load, part, pool, dropped, entropy / subtokens)
