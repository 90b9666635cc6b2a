"""Large CPU buffers that are used again and again.

The system hands out fresh memory page by page, zeroed, at the first touch; for the pre-activations that a layer keeps
for its backward, hundreds of megabytes in every step, that costs more than computing the activation. Buffers from
``empty`` go back to a pool when the last tensor over them is gone, and the next request takes them from there. The pool
never holds more than was in use at one time.
"""

import math
import mmap
import threading
import weakref

import torch
from torch import Tensor

_HUGE_PAGE = 2**21


class _Pool:
    """Free buffers, the longest unused first. Together with those in use they never exceed the most ever in use."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._in_use = 0
        self._peak = 0
        self._lock = threading.RLock()  # a finalizer may run while this thread holds it

    def take(self, size: int) -> mmap.mmap:
        """The smallest free buffer that fits without wasting more than half, or a new one."""
        with self._lock:
            fitting = [buffer for buffer in self._free if size <= len(buffer) <= 2 * size]
            buffer = min(fitting, key=len) if fitting else self._allocate(size)
            self._free = [other for other in self._free if other is not buffer]
            self._in_use += len(buffer)
            self._peak = max(self._peak, self._in_use)
            return buffer

    def give_back(self, buffer: mmap.mmap) -> None:
        """The last tensor over ``buffer`` is gone."""
        with self._lock:
            self._free.append(buffer)
            self._in_use -= len(buffer)

    def _allocate(self, size: int) -> mmap.mmap:
        while self._free and self._in_use + sum(map(len, self._free)) + size > self._peak:
            self._free.pop(0)
        # Private: Python's default is memory that forked processes, such as data loading workers, would share.
        buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            buffer.madvise(mmap.MADV_HUGEPAGE)
        return buffer


_pool = _Pool()


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor with the dtype of ``like``; large ones come from the pool."""
    count = math.prod(shape)
    size = count * like.element_size()
    if size < _HUGE_PAGE or not hasattr(mmap, "MAP_PRIVATE"):
        return like.new_empty(shape)
    buffer = _pool.take(-(-size // _HUGE_PAGE) * _HUGE_PAGE)
    view = memoryview(buffer)  # what the tensor holds on to; its end is the tensor's
    weakref.finalize(view, _pool.give_back, buffer)
    return torch.frombuffer(view, dtype=like.dtype, count=count).view(shape)
