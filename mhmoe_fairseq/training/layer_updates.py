"""What modules of MoE layers do after an update of the parameters, with the loads that it had on all ranks."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from fairseq.optim.amp_optimizer import AMPOptimizer
from torch import Tensor, nn

from ..moe import MHMoELayer
from ..moe.updates import ActsAfterUpdate, ActsAfterUpdates, UpdateSums

_ACTS = (ActsAfterUpdate, ActsAfterUpdates)


class LayerUpdates:
    """Adds up what layers do in an update's batches, and tells their modules that act after one.

    That is every module of a layer with a method ``after_update``, see :class:`~..moe.updates.ActsAfterUpdate`, or
    ``after_updates``. Nothing is done, and no process waits for another, where there is none.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, MHMoELayer)]
        acting = [[module for module in layer.modules() if isinstance(module, _ACTS)] for layer in layers]
        self._acting = [modules for modules in acting if modules]
        self._parameters = list(model.parameters()) if self._acting else []
        self._sums: list[UpdateSums | None] = [None] * len(self._acting)
        for index, layer in enumerate(layer for layer, modules in zip(layers, acting) if modules):
            layer.register_forward_hook(functools.partial(self._add, index))

    def begin_batch(self) -> None:
        """Before a batch, count anew if no gradient is there yet, so that an update that was skipped is forgotten."""
        if all(parameter.grad is None for parameter in self._parameters):
            self._sums = [None] * len(self._acting)

    def _add(self, index: int, layer: MHMoELayer, inputs: Any, output: Any) -> None:
        # Within a backward pass a layer is only computed once more, for its activations.
        if layer.training and torch._C._current_graph_task_id() == -1:
            before, new = self._sums[index], UpdateSums(output.stats, output.evidence)
            self._sums[index] = new if before is None else before.plus(new)

    @contextlib.contextmanager
    def after(self, optimizer: Any) -> Iterator[None]:
        """Return a context for a step of the optimizer: modules act at its end, unless ``--amp`` left the step out."""
        uses_amp = bool(self._acting) and isinstance(optimizer, AMPOptimizer)
        scale = optimizer.scaler.get_scale() if uses_amp else 1.0  # it gets smaller where a step is left out
        yield
        if uses_amp and optimizer.scaler.get_scale() < scale:
            return
        with torch.no_grad():
            counted = [(modules, sums) for modules, sums in zip(self._acting, self._sums) if sums is not None]
            totals = [sums.over(_over_ranks) for _, sums in counted]
            for (modules, _), total in zip(counted, totals):
                for module in modules:
                    if isinstance(module, ActsAfterUpdates):
                        module.after_updates(totals)
                    else:
                        module.after_update(total)


def _over_ranks(vector: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(vector)
    return vector
