"""Large CPU buffers that are used again and again.

The system hands out fresh memory page by page, zeroed, at the first touch; for the pre-activations that a layer keeps
for its backward, hundreds of megabytes in every step, that costs more than computing the activation. Buffers from
``empty`` go back to a pool when the last tensor over them is gone, and the next request takes them from there, or a
part of one: gradients come where the pre-activations of later layers were. The pool holds little more than was in use
at one time.
"""

import collections
import math
import mmap
import operator
import threading
import weakref
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_HUGE_PAGE = 2**21
# Of the most ever in use: what may be held, as free parts that are too small are held, too. (At a 290-million-parameter
# model's experts 1 had the system clear a third of all pages anew in every step, 1.06 none.)
_LIMIT = 1.0625


@dataclass(frozen=True)
class _Span:
    """Bytes of a region that the system gave; the region is unmapped when no span and no tensor knows it any more."""

    region: mmap.mmap
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def touches(self, other: "_Span") -> bool:
        return self.stop == other.start or self.start == other.stop


_size = operator.attrgetter("size")


class _Pool:
    """Free spans, the longest unused first; with those in use at most ``_LIMIT`` times the most ever in use."""

    def __init__(self) -> None:
        self._free: list[_Span] = []
        self._in_use = 0
        self._peak = 0
        self._lock = threading.Lock()
        # Finalizers run anywhere, in the middle of `take` too: they write down here what it then joins to the rest.
        self.returned: collections.deque[_Span] = collections.deque()

    def take(self, size: int) -> _Span:
        """The beginning of the smallest free span that is large enough, or of a new region."""
        with self._lock:
            while self.returned:
                self._join(self.returned.popleft())
            found = min((span for span in self._free if size <= span.size), key=_size, default=None)
            if found is None:
                found = self._map(size)
            else:
                at = self._free.index(found)
                self._free[at : at + 1] = [replace(found, start=found.start + size)] if size < found.size else []
            self._in_use += size
            self._peak = max(self._peak, self._in_use)
            return replace(found, stop=found.start + size)

    def _join(self, span: _Span) -> None:
        self._in_use -= span.size
        beside = [free for free in self._free if free.region is span.region and free.touches(span)]
        self._free = [free for free in self._free if free not in beside]
        start, stop = min(s.start for s in (span, *beside)), max(s.stop for s in (span, *beside))
        self._free.append(_Span(span.region, start, stop))

    def _map(self, size: int) -> _Span:
        while self._free and self._in_use + sum(map(_size, self._free)) + size > _LIMIT * self._peak:
            unused = self._free.pop(0)
            if hasattr(mmap, "MADV_DONTNEED"):  # the rest of the region may be in use
                unused.region.madvise(mmap.MADV_DONTNEED, unused.start, unused.size)
        # Private: Python's default is memory that forked processes, such as data loading workers, would share.
        region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            region.madvise(mmap.MADV_HUGEPAGE)
        return _Span(region, 0, size)


_pool = _Pool()


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor with the dtype of ``like``; large ones come from the pool."""
    count = math.prod(shape)
    size = count * like.element_size()
    if size < _HUGE_PAGE or not hasattr(mmap, "MAP_PRIVATE"):
        return like.new_empty(shape)
    span = _pool.take(-(-size // _HUGE_PAGE) * _HUGE_PAGE)
    view = memoryview(span.region)[span.start : span.stop]  # what the tensor holds on to
    weakref.finalize(view, _pool.returned.append, span)  # the last tensor over it is gone
    return torch.frombuffer(view, dtype=like.dtype, count=count).view(shape)
