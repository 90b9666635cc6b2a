"""PyTorch's modes around a computation: who differentiates or casts it; and what is wider than half precision."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation, torch.func.jvp's too, may ask for tangents.

    >>> in_forward_mode()
    False
    """
    return forward_ad._current_level >= 0


def eager_obstacle(tensors: Iterable[Tensor | None]) -> str | None:
    """Says why values cannot be read here and a hand-written backward not be called; None where they can.

    The reason stands behind "cannot be used".

    >>> eager_obstacle([torch.ones(1), None]) is None
    True
    """
    # The first is a constant to torch.compile, which could not trace what follows.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or get_proxy_mode() is not None:
        return "where operations are traced (torch.compile, torch.export, torch.jit.trace, make_fx)"
    if torch._C._are_functorch_transforms_active():  # what autograd.Function itself asks
        return "under a transform of torch.func (grad, jvp, vmap, ...)"
    if in_forward_mode():
        return "in forward-mode differentiation (torch.autograd.forward_ad)"
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter, type(None)):
            return f"on a {type(tensor).__name__}, which is no plain tensor"
        if tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor):
            return "on a batch of gradients (is_grads_batched)"
    return None


def without_autocast(device: str) -> torch.autocast:
    """A context without autocast on a type of device.

    >>> with torch.autocast("cpu"), without_autocast("cpu"):
    ...     compute_dtype(torch.ones(1))
    torch.float32
    """
    # Autocast has no "meta" device; the CPU's switch is as good there, since nothing runs on it.
    return torch.autocast("cpu" if device == "meta" else device, enabled=False)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What linear maps of ``x`` compute in: autocast's type where it is on and applies, else that of ``x``.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16):
    ...     compute_dtype(torch.ones(1)), compute_dtype(torch.ones(1, dtype=torch.float64))
    (torch.bfloat16, torch.float64)
    """
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def widened(x: Tensor) -> Tensor:
    """In float32 at least.

    >>> widened(torch.ones(1, dtype=torch.float16)).dtype, widened(torch.ones(1, dtype=torch.float64)).dtype
    (torch.float32, torch.float64)
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))
