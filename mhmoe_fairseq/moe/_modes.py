"""PyTorch's modes around a computation: who traces, transforms or casts it."""

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def is_traced() -> bool:
    """Whether operations are recorded, to be run later with other values: torch.compile, torch.export, make_fx, jit."""
    # The first is a constant to torch.compile, which could not trace what follows.
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or get_proxy_mode() is not None


def is_transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) is active."""
    return torch._C._are_functorch_transforms_active()  # what autograd.Function itself asks


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation, torch.func.jvp's too, may ask for tangents."""
    return forward_ad._current_level >= 0


def without_autocast(device: str) -> torch.autocast:
    """A context without autocast on a type of device."""
    # Autocast has no "meta" device; the CPU's switch is as good there, since nothing runs on it.
    return torch.autocast("cpu" if device == "meta" else device, enabled=False)
