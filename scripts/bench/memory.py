"""Peak memory of one call, measured in a process that does nothing else.

Two measures, both counted from the state just before the call (weights, optimiser state and inputs exist already,
gradients do not), after a small warm-up call and with free memory given back:

- ``tensors``: the largest sum of live tensor storages, followed operator by operator. Exact and the same in every
  run. Storages that an operator allocates and frees inside itself are not seen, those that come from elsewhere than
  PyTorch's allocator (a mapped file, anonymous pages) are; PyTorch's profiler has it the other way round, and cannot
  be used for a layer that maps its own pages.
- ``resident``: the growth of the process's peak resident set, as the kernel counted it. Includes what the C library
  keeps, and the maths library's buffers; differs a little from run to run.
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

MIB = 2**20
Peak = dict[str, float | None]


class StorageTally(TorchDispatchMode):
    """Adds up the storages of every tensor that operators take or return, until they are freed.

    Args:
        existing: tensors whose storages do not count.

    Attributes:
        peak: the largest sum so far, in bytes.
    """

    def __init__(self, existing: Iterable[torch.Tensor] = ()) -> None:
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
        if storage._cdata in self._known:
            return
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


def status(field: str) -> int | None:
    """Returns a size of this process in bytes, such as ``VmRSS`` or ``VmHWM``; None where Linux's /proc is missing."""
    path = Path("/proc/self/status")
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def resident_peak(call: Callable[[], object]) -> int | None:
    """Growth of the peak resident set during ``call`` in bytes; None where Linux's /proc is missing."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library than glibc: its free pages count for all alike
        ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    reset.write_text("5", encoding="ascii")  # the kernel's code for "forget the peak so far"
    call()
    return status("VmHWM") - before


def measure(call: Callable[[], object], clear: Callable[[], None], existing: Iterable[torch.Tensor]) -> Peak:
    """Returns both measures in MiB; ``clear`` drops what a call leaves behind (gradients)."""
    clear()
    resident = resident_peak(call)
    clear()
    return {"tensors": tensor_peak(call, existing) / MIB, "resident": None if resident is None else resident / MIB}
