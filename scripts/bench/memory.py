"""Peak memory of one call beyond what exists before it, in MiB by two measures (docs/benchmarks/README.md).

- ``tensors``: the largest sum of live tensor storages, followed operator by operator. Exact and the same in every
  run. Storages that an operator allocates and frees inside itself are not seen, those that come from elsewhere than
  PyTorch's allocator (a mapped file, anonymous pages) are; PyTorch's profiler has it the other way round.
- ``resident``: the growth of the process's peak resident set, as the kernel counted it; differs a little by run.
"""

import contextlib
import ctypes
import gc
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mhmoe_fairseq.common.provenance import proc

Peak = dict[str, float | None]


class StorageTally(TorchDispatchMode):
    """Adds up the storages of every tensor that operators take or return, until they are freed; ``peak`` in bytes."""

    def __init__(self, existing: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        # Held, not just remembered: a freed storage's address may return as another's.
        self._existing = [tensor.untyped_storage() for tensor in existing]
        self._known = {storage._cdata for storage in self._existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs or {}, result)):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


def tensor_peak(call: Callable[[], object], existing: Iterable[torch.Tensor]) -> int:
    """Peak bytes of tensor memory that ``call`` needs beyond the tensors in ``existing``."""
    with StorageTally(existing) as tally:
        call()
    return tally.peak


def status(field: str) -> float | None:
    """Returns a size of this process in MiB, such as ``VmRSS`` or ``VmHWM``; None where Linux's /proc is missing."""
    size = proc("self/status", field + ":")
    return int(size.split()[0]) / 1024 if size else None


def measure(call: Callable[[], object], clear: Callable[[], None], existing: Iterable[torch.Tensor]) -> Peak:
    """Returns both measures; ``clear`` drops what a call leaves behind (gradients)."""
    clear()
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library than glibc: its free pages count for all alike
        ctypes.CDLL(None).malloc_trim(0)
    before, resident = status("VmRSS"), None
    if before is not None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the kernel's code: forget the peak so far
        call()
        resident = status("VmHWM") - before
    clear()
    return {"tensors": tensor_peak(call, existing) / 2**20, "resident": resident}


def ratios_text(ours: Peak, theirs: Peak) -> tuple[str, float]:
    """Returns both measures of two peaks in words, and the larger ratio."""
    ratios = {what: ours[what] / size for what, size in theirs.items() if ours[what] and size}
    texts = [f"{what} {ours[what]:.0f} / {theirs[what]:.0f} MiB = {of:.2f}x" for what, of in ratios.items()]
    return ", ".join(texts), max(ratios.values())
