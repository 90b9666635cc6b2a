"""Ranks that fail. One rank's failure ends all of them, soon and with the reason:

======================================  ==============================================================
What happens to a rank                  How the others end
======================================  ==============================================================
It is killed, or raises                 gloo's connections break; the message below names the rank and
                                        its error. Under torchrun its agent ends them, and tells why.
It is frozen, its machine is gone,      :class:`Watch` notices after ``MHMOE_WATCH_SECONDS`` (60) and ends
or NCCL does not notice                 a rank that has not ended by itself after half of that again.
It runs, but waits in another           a transfer fails after ``MHMOE_TRANSFER_SECONDS`` (600).
exchange than the others
It has too little GPU memory            it fails; fairseq would skip its batch and go on, while the
                                        others wait for its part (:func:`no_lone_recovery`).
======================================  ==============================================================

A process that is killed closes its connections, and over gloo the others notice at the next exchange. One that is
frozen, or whose machine is gone, closes nothing; and over NCCL nobody notices either. So every rank has a thread that
writes a sign of life into the process group's key-value store and reads the others': rank 0 everybody's, the others
rank 0's and what it has found. A step may take as long as it likes, for the thread is alive while the rank computes,
waits or writes a checkpoint.
"""

import atexit
import contextlib
import datetime
import logging
import os
import re
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..common.errors import UserError

logger = logging.getLogger(__name__)

WATCH_VARIABLE, TRANSFER_VARIABLE = "MHMOE_WATCH_SECONDS", "MHMOE_TRANSFER_SECONDS"
_SIGNS_PER_LIMIT = 20  # a rank that is late once or twice, on a busy machine, is not silent
# What torch says when the process at the other end is the one to blame.
_BROKEN_CONNECTION = re.compile(r"by peer|Broken pipe|[Tt]imed? ?out|ncclRemoteError|Connection refused")


class AnsweringStore:
    """A key-value store each of whose calls ends: the connection to one whose process is frozen waits for good.

    Args:
        store: a connection that nobody else uses: its owner may wait in it.
        limit: seconds that a call may take; after one that took longer none is begun any more.
    """

    def __init__(self, store: dist.Store, limit: float) -> None:
        self._store, self._limit, self._is_lost = store, limit, False

    def call(self, name: str, *words: Any) -> Any:
        """Call a method of the store; RuntimeError if it cannot be reached."""
        answers: list[Any] = []
        errors: list[RuntimeError] = []

        def ask() -> None:
            try:
                answers.append(getattr(self._store, name)(*words))
            except RuntimeError as error:
                errors.append(error)

        if not self._is_lost:
            asking = threading.Thread(target=ask, daemon=True)
            asking.start()
            asking.join(self._limit)
            asking.join(self._limit / _SIGNS_PER_LIMIT)  # this process may have been stopped meanwhile
            self._is_lost = asking.is_alive()
        if self._is_lost:
            raise RuntimeError(f"the key-value store has not answered for {self._limit:g} s")
        if errors:
            raise errors[0]
        return answers[0]


class Board:
    """What ranks write down for each other: signs of life, and why one failed.

    Args:
        store: a connection to the group's key-value store that nobody else uses.
        rank, size: this process's number, and how many there are.
        limit: seconds after which a store that does not answer counts as lost.

    Attributes:
        watched: the ranks whose signs this one reads.

    Every method raises RuntimeError when the store cannot be reached.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, limit: float) -> None:
        self.rank = rank
        self.watched = range(1, size) if rank == 0 else range(1)
        self._store = AnsweringStore(dist.PrefixStore("mhmoe_watch", store), limit)
        self._signs = 0
        self._store.call("set", f"who{rank}", f"rank {rank} ({socket.gethostname()}, process {os.getpid()})")
        self.sign()
        self.first_rank = self.who(0)

    def sign(self) -> None:
        """Give a sign of life."""
        self._signs += 1
        self._store.call("set", f"sign{self.rank}", str(self._signs))

    def signs(self) -> dict[int, str]:
        """Return the latest sign of each watched rank, empty if it has given none."""
        return {rank: self._read(f"sign{rank}") for rank in self.watched}

    def who(self, rank: int) -> str:
        """Return a rank with its machine and process."""
        return self._read(f"who{rank}") or f"rank {rank}"

    def fail(self, reason: str) -> None:
        """Tell the others why the training ends; the first reason stays."""
        self._store.call("compare_set", "failure", "", reason)

    def failure(self) -> str:
        """Return the first reason, or nothing."""
        return self._read("failure")

    def _read(self, key: str) -> str:
        return self._store.call("get", key).decode(errors="replace") if self._store.call("check", [key]) else ""


class Watch(threading.Thread):
    """The thread.

    Args:
        board: this rank's.
        limit: seconds without a sign of life after which a rank counts as lost; half as many are given to this
            process to end by itself once it was told.
        has_parted: whether the ranks have parted, after which the thread ends.

    Attributes:
        left: to be set when this process ends, in its own time: the thread ends.
    """

    def __init__(self, board: Board, limit: float, has_parted: Callable[[], bool]) -> None:
        super().__init__(name="mhmoe-watch", daemon=True)
        self.board, self.limit = board, limit
        self.left = threading.Event()
        self._has_parted = has_parted
        self._looked = time.monotonic()
        self._seen = {rank: ("", self._looked) for rank in board.watched}

    def run(self) -> None:
        while not self.left.wait(self.limit / _SIGNS_PER_LIMIT) and not self._has_parted():
            try:
                self.board.sign()
                reason = self.board.failure() or self.lost()
            except RuntimeError:
                reason = f"{self.board.first_rank} cannot be reached any more"
            if reason:
                self._end(reason)
                return

    def lost(self) -> str:
        """Return who has given no new sign of life for too long; nothing if all have."""
        now = time.monotonic()
        # Long without a look, this process was stopped (Ctrl-Z, a scheduler), and the others may have been with it.
        was_stopped = now - self._looked > self.limit / 4
        self._looked = now
        for rank, sign in self.board.signs().items():
            last, since = self._seen[rank]
            if sign != last or was_stopped:
                self._seen[rank] = (sign, now)
            elif now - since > self.limit:
                self.board.fail(f"{self.board.who(rank)} has given no sign of life for {self.limit:.0f} s")
                return self.board.failure()
        return ""

    def _end(self, reason: str) -> None:
        logger.error(f"rank {self.board.rank}: the training ends, because {reason}")
        if self.left.wait(self.limit / 2) or self._has_parted():
            return
        logger.error(f"rank {self.board.rank} waits for a rank that is lost: ending it")
        logging.shutdown()
        sys.stdout.flush()
        os._exit(1)  # the main thread stands in a call that nothing interrupts

    def explain(self, error: BaseException) -> None:
        """Write an error of this process on the board, or, if another rank has caused it, log which and why."""
        board = self.board
        if _BROKEN_CONNECTION.search(str(error)):
            culprit = self._culprit() or "its output says why"
            logger.error(f"rank {board.rank} lost the connection to another rank: {culprit}")
        else:
            board.fail(f"{board.who(board.rank)} failed: {type(error).__name__}: {error}")

    def _culprit(self) -> str:
        """Who broke the connection: one that has said so itself, or one that gives no more signs of life."""
        board = self.board
        before = board.signs()
        # Two signs' time; the other ranks also wait for what rank 0 finds.
        deadline = time.monotonic() + self.limit / (10 if board.rank == 0 else 6)
        while not board.failure() and time.monotonic() < deadline:
            time.sleep(0.1)
        silent = [rank for rank, sign in board.signs().items() if before[rank] == sign]
        if silent:
            board.fail(f"{board.who(silent[0])} was killed, or its machine is gone")
        return board.failure()


def guard_ranks(groups: Iterable[dist.ProcessGroup]) -> None:
    """Bound every wait of this rank for another, in ``groups`` and the default one; every rank must call it."""
    limit, transfer = _seconds(WATCH_VARIABLE, 60), _seconds(TRANSFER_VARIABLE, 600)
    if transfer == 0:
        raise UserError(f"{TRANSFER_VARIABLE} (0) must be more than 0")
    if not dist.is_initialized():
        return
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout  # torch before 2.14
    for group in (dist.group.WORLD, *groups):
        set_timeout(datetime.timedelta(seconds=transfer), group)
    if limit == 0 or dist.get_world_size() == 1:
        return
    world = weakref.ref(dist.group.WORLD)
    board = Board(distributed_c10d._get_default_store().clone(), dist.get_rank(), dist.get_world_size(), limit)
    watch = Watch(board, limit, lambda: dist.group.WORLD is not world())
    watch.start()
    atexit.register(watch.left.set)
    _tell_the_others(watch)


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable, str(default))
    if not re.fullmatch(r"\d+(\.\d*)?", text):
        raise UserError(f"{variable} ({text}) must be a number of seconds, 0 or more")
    return float(text)


def _tell_the_others(watch: Watch) -> None:
    """Let an error that ends this process end the others too, and say here which rank broke a connection."""
    stock = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            stock(kind, error, trace)  # may end this process with a status of its own
        finally:
            # A board that cannot be reached has nothing to add to the error.
            with contextlib.suppress(RuntimeError):
                watch.explain(error)

    sys.excepthook = hook


@contextlib.contextmanager
def no_lone_recovery(spreads_experts: bool) -> Iterator[None]:
    """Make a GPU that runs out of memory an error that ends the training, where experts are spread over ranks.

    fairseq drops the batch on this rank and goes on, while the others wait in the middle of theirs for its experts. The
    RuntimeError in place of the error does not have the words by which fairseq knows it.
    """
    try:
        yield
    except RuntimeError as error:
        if spreads_experts and "out of memory" in str(error):
            raise RuntimeError(
                f"rank {dist.get_rank()} has too little GPU memory for this batch, and the others wait for its "
                "experts: lower --batch-size or --max-tokens and raise --update-freq (in a validation: lower "
                "--batch-size-valid or --max-tokens-valid)"
            ) from error
        raise
