"""After each update of the parameters, routers that act then learn how many sub-tokens of it their experts got."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from fairseq.optim.amp_optimizer import AMPOptimizer
from torch import Tensor, nn

from ..moe import MHMoELayer


class RouterUpdates:
    """Adds up the loads of an update's batches, and calls ``Router.after_update`` with those of all ranks.

    Nothing is done, and no process waits for another, where no router of the model has such a method of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = (layer for layer in model.modules() if isinstance(layer, MHMoELayer))
        self._layers = [layer for layer in layers if layer.router.acts_after_updates]
        self._parameters = list(model.parameters()) if self._layers else []
        self._loads: list[Tensor] = []
        for index, layer in enumerate(self._layers):
            layer.register_forward_hook(functools.partial(self._add, index))

    def begin_batch(self) -> None:
        """Before a batch, count anew if no gradient is there yet, so that an update that was skipped is forgotten."""
        if all(parameter.grad is None for parameter in self._parameters):
            sizes = [(layer.config.total_experts, next(layer.parameters()).device) for layer in self._layers]
            self._loads = [torch.zeros(experts, device=device) for experts, device in sizes]

    def _add(self, index: int, layer: MHMoELayer, inputs: Any, output: Any) -> None:
        # Within a backward pass a layer is only computed once more, for its activations.
        if layer.training and self._loads and torch._C._current_graph_task_id() == -1:
            self._loads[index] += output.stats.expert_load.detach()

    @contextlib.contextmanager
    def after(self, optimizer: Any) -> Iterator[None]:
        """Return a context for a step of the optimizer: routers act at its end, unless ``--amp`` left the step out."""
        uses_amp = bool(self._layers) and isinstance(optimizer, AMPOptimizer)
        scale = optimizer.scaler.get_scale() if uses_amp else 1.0  # it gets smaller where a step is left out
        yield
        if uses_amp and optimizer.scaler.get_scale() < scale:
            return
        for layer, load in zip(self._layers, self._loads):
            if dist.is_initialized():
                dist.all_reduce(load)
            layer.router.after_update(load)
