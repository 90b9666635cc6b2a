"""Calls of a model that are made only because other processes wait for them: nothing of them counts."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def taken_for_padding(model: nn.Module, applies: bool = True) -> Iterator[None]:
    """While open, every module of ``model`` that tells padding from tokens takes all of its input for padding.

    So no row is routed, and none enters a balance loss, a load or a running mean, whether of this process or of all;
    the processes' transfers take place as ever.

    Args:
        model: whose modules with a true ``tells_padding`` are called as ``(x, padding_mask)``, with ``x (..., D)``
            and the mask, bool, of its leading dimensions.
        applies: False to change nothing.

    >>> layer = MHMoELayer(MHMoEConfig(embed_dim=8, num_experts=4, expert_ffn_dim=16))
    >>> with taken_for_padding(layer):
    ...     layer(torch.randn(2, 8)).stats.num_subtokens
    tensor(0.)
    """
    modules = [module for module in model.modules() if getattr(module, "tells_padding", False)] if applies else []
    hooks = [module.register_forward_pre_hook(_all_padded, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _all_padded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
    x: Tensor = args[0]
    return (x, x.new_ones(x.shape[:-1], dtype=torch.bool)), {}
