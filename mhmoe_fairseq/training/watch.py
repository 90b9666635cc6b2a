"""Ranks that watch each other, so that a dead or frozen one ends the training instead of holding it up.

A process that is killed closes its connections, and over gloo the others notice at the next exchange. One that is
frozen, or whose machine is gone, closes nothing; and over NCCL nobody notices either. So every rank has a thread that
writes a sign of life into the process group's key-value store and reads the others': rank 0 everybody's, the others
rank 0's and what it has found. A step may take as long as it likes, for the thread is alive while the rank computes,
waits or writes a checkpoint.
"""

import atexit
import logging
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed import distributed_c10d

logger = logging.getLogger(__name__)

_SIGNS_PER_LIMIT = 20  # a rank that is late once or twice, on a busy machine, is not silent


class Board:
    """What ranks write down for each other: signs of life, and why one failed.

    Args:
        store: a connection to the group's key-value store that nobody else uses: its owner may wait in it.
        rank, size: this process's number, and how many there are.

    Every method raises RuntimeError when the store cannot be reached.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store = dist.PrefixStore("mhmoe_watch", store)
        self._signs = 0
        self._store.set(f"who{rank}", f"rank {rank} ({socket.gethostname()}, process {os.getpid()})")
        self.sign()
        self.first_rank = self.who(0)

    def sign(self) -> None:
        """Give a sign of life."""
        self._signs += 1
        self._store.set(f"sign{self.rank}", str(self._signs))

    def sign_of(self, rank: int) -> str:
        """The latest sign of a rank, empty if it has given none."""
        return self._read(f"sign{rank}")

    def who(self, rank: int) -> str:
        """A rank with its machine and process."""
        return self._read(f"who{rank}") or f"rank {rank}"

    def fail(self, reason: str) -> None:
        """Tell the others why the training ends; the first reason stays."""
        self._store.compare_set("failure", "", reason)

    def failure(self) -> str:
        """The first reason, or nothing."""
        return self._read("failure")

    def _read(self, key: str) -> str:
        return self._store.get(key).decode(errors="replace") if self._store.check([key]) else ""


class Watch(threading.Thread):
    """The thread.

    Args:
        board: this rank's.
        limit: seconds without a sign of life after which a rank counts as lost; half as many are given to this
            process to end by itself once it was told.
        is_over: whether the ranks have parted, after which the thread ends.
    """

    def __init__(self, board: Board, limit: float, is_over: Callable[[], bool]) -> None:
        super().__init__(name="mhmoe-watch", daemon=True)
        self.board, self.limit = board, limit
        self._has_parted = is_over
        self._left = threading.Event()
        self._looked = time.monotonic()
        watched = range(1, board.size) if board.rank == 0 else [0]
        self._seen = {rank: ("", self._looked) for rank in watched}

    def leave(self) -> None:
        """End the thread: this process ends, in its own time."""
        self._left.set()

    def run(self) -> None:
        while not self._left.wait(self.limit / _SIGNS_PER_LIMIT):
            if self._is_over():
                return
            try:
                self.board.sign()
                reason = self.board.failure() or self.lost()
            except RuntimeError:
                reason = f"{self.board.first_rank} cannot be reached any more"
            if reason:
                self._end(reason)
                return

    def lost(self) -> str:
        """Who has given no new sign of life for too long; nothing if all have."""
        now = time.monotonic()
        # Long without a look, this process was stopped (Ctrl-Z, a scheduler), and the others may have been with it.
        was_stopped = now - self._looked > self.limit / 4
        self._looked = now
        for rank, (last, since) in self._seen.items():
            sign = self.board.sign_of(rank)
            if sign != last or was_stopped:
                self._seen[rank] = (sign, now)
            elif now - since > self.limit:
                self.board.fail(f"{self.board.who(rank)} has given no sign of life for {self.limit:.0f} s")
                return self.board.failure()
        return ""

    def _is_over(self) -> bool:
        return self._left.is_set() or self._has_parted()

    def _end(self, reason: str) -> None:
        logger.error(f"rank {self.board.rank}: the training ends, because {reason}")
        if self._left.wait(self.limit / 2) or self._is_over():
            return
        logger.error(f"rank {self.board.rank} waits for a rank that is lost: ending it")
        logging.shutdown()
        sys.stdout.flush()
        os._exit(1)  # the main thread stands in a call that nothing interrupts


def start_watch(limit: float) -> Watch | None:
    """Start watching in this process; every rank must call it. None if there is one rank only, or the limit is 0."""
    if not dist.is_initialized() or dist.get_world_size() == 1 or limit == 0:
        return None
    group = weakref.ref(dist.group.WORLD)
    store = distributed_c10d._get_default_store().clone()
    watch = Watch(Board(store, dist.get_rank(), dist.get_world_size()), limit, lambda: dist.group.WORLD is not group())
    watch.start()
    atexit.register(watch.leave)
    return watch
