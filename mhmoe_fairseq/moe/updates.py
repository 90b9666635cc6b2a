"""What acts after an update of the parameters, and what it goes by.

A module of a layer that changes by itself, without a gradient, has a method ``after_update``: a router, a gate, a
selection bias. Whoever trains adds up the :class:`UpdateSums` of all calls of the layer in an update's batches, of all
processes, and calls it once after the optimizer's step: ``training/layer_updates.py`` for fairseq.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .stats import RoutingStats


class UpdateSums(NamedTuple):
    """Of one layer, over the batches of an update.

    Attributes:
        stats: the counts: loads of the experts, sub-tokens, ...
        evidence: what the layer's balancing counts beside them; None for nothing.

    >>> sums = UpdateSums(RoutingStats(torch.tensor([3.0, 1.0]), *torch.tensor([0.0, 2.0, 4.0])), None)
    >>> sums.plus(sums).stats.expert_load, sums.over(lambda vector: 3 * vector).stats.num_subtokens
    (tensor([6., 2.]), tensor(12., dtype=torch.float64))
    """

    stats: RoutingStats
    evidence: Tensor | None

    def plus(self, other: "UpdateSums") -> "UpdateSums":
        """With those of another batch."""
        stats = RoutingStats(*(one + more for one, more in zip(self.stats, other.stats)))
        if self.evidence is None or other.evidence is None:
            return UpdateSums(stats, None)
        return UpdateSums(stats, self.evidence + other.evidence)

    def over(self, add: Callable[[Tensor], Tensor]) -> "UpdateSums":
        """The sums of all processes, in float64, whose vectors ``add`` adds up in one message."""
        parts = [*self.stats] if self.evidence is None else [*self.stats, self.evidence]
        total = add(torch.cat([part.double().reshape(-1) for part in parts]))
        stats = [flat.view_as(part) for flat, part in zip(total.split([part.numel() for part in parts]), parts)]
        evidence = None if self.evidence is None else stats.pop()
        return UpdateSums(RoutingStats(*stats), evidence)


@runtime_checkable
class ActsAfterUpdate(Protocol):
    """A module of a layer that changes by itself after each update, in training.

    >>> isinstance(torch.nn.Linear(1, 1), ActsAfterUpdate)
    False
    """

    def after_update(self, sums: UpdateSums) -> None:
        """Called once after each update of the parameters with what the layer did in the update's batches, of all
        processes together, but for padding, and batches that are only there because other processes wait."""


@runtime_checkable
class ActsAfterUpdates(Protocol):
    """The same for a module that goes by all layers of the model.

    >>> isinstance(torch.nn.Linear(1, 1), ActsAfterUpdates)
    False
    """

    def after_updates(self, layers: Sequence[UpdateSums]) -> None:
        """Called in place of ``after_update`` with the sums of every layer that has a module which acts."""


class ExactState(nn.Module):
    """A module whose buffers stay in float32 or wider: half precision does not tell 0.5 from 0.5 and a small step.

    >>> state = ExactState()
    >>> state.register_buffer("bias", torch.zeros(2))
    >>> state.half().bias.dtype, state.double().bias.dtype
    (torch.float32, torch.float64)
    """

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "ExactState":
        """As every module is moved and cast, but not to half precision."""
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = self.get_buffer(name)
            if moved.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, value.to(moved.device))
        return self
