"""PyTorch's modes around a computation: who differentiates or casts it."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation, torch.func.jvp's too, may ask for tangents.

    >>> in_forward_mode()
    False
    """
    return forward_ad._current_level >= 0


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
