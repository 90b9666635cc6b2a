"""How much memory a training has taken so far, in its log."""

import re
import resource
import sys
from pathlib import Path

import torch
from fairseq.logging import metrics

# Of Linux; getrusage begins there with the peak of the process that started this one.
_STATUS = Path("/proc/self/status")
_IN_BYTES = sys.platform == "darwin"  # there getrusage counts bytes, elsewhere kibibytes


def peak_memory() -> float:
    """The most that this process has held until now, in GB (10^9 bytes).

    On a GPU it is the memory of tensors there, as PyTorch's allocator counts it; else all resident memory, of data,
    libraries and interpreter, too.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text()) if _STATUS.is_file() else None
    if found:
        return int(found[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if _IN_BYTES else 1024) / 1e9


def log_peak_memory() -> None:
    """Log it as ``peak_gb``, of rank 0's process where there are several."""
    metrics.log_scalar("peak_gb", peak_memory(), weight=0, priority=1500, round=2)
