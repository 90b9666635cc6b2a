"""Processes that train one model together, and a controller that asks them for one update at a time."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

PATIENCE = 300.0  # seconds for an answer


@dataclass(frozen=True)
class Sent:
    """What one rank sent through the all-to-all in one update; its sum over layers and directions.

    Attributes:
        rows: those to its own experts included.
        directions: transfers of rows: two forward and two backward for each layer and micro-batch.
        bytes: of rows to other ranks.
        count_bytes: of row counts to other ranks.
    """

    rows: int
    directions: int
    bytes: int
    count_bytes: int


class Team:
    """``size`` processes with ``threads`` threads each; a call is one update of all of them.

    Args:
        name, setting: the model and what it is trained on; see ``TrainingSetting``, whose batch the processes share.
        size: processes.
        threads: PyTorch threads of each.

    Raises:
        RuntimeError: from any call, with the traceback of a process that failed.
    """

    def __init__(self, name: str, setting: Any, size: int, threads: int) -> None:
        # Forked from a process that has imported what takes longest, and nothing else.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torchscale.architecture.decoder", "fairseq.trainer"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        self._pipes, self._processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            arguments = (theirs, name, setting, rank, size, threads, url)
            process = context.Process(target=_member, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)
        self.shape = self._answers()[0]

    def __call__(self) -> list[float]:
        """One update; each rank's mean cross entropy."""
        return self._ask("update")

    def profile(self) -> list[dict[str, float]]:
        """One update's seconds of each rank by what it did."""
        return self._ask("profile")

    def sent(self) -> list[Sent]:
        """What each rank sent in the latest update."""
        return self._ask("sent")

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # ends a process that waits for a word
        for process in self._processes:
            process.join(10)
            process.kill()

    def _ask(self, word: str) -> list[Any]:
        for pipe in self._pipes:
            pipe.send(word)
        return self._answers()

    def _answers(self) -> list[Any]:
        return [self._answer(rank, pipe) for rank, pipe in enumerate(self._pipes)]

    def _answer(self, rank: int, pipe: Connection) -> Any:
        if not pipe.poll(PATIENCE):
            raise RuntimeError(f"rank {rank} has not answered for {PATIENCE:.0f} s")
        try:
            answer = pipe.recv()
        except EOFError:
            raise RuntimeError(f"rank {rank} has ended") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _member(pipe: Connection, name: str, setting: Any, rank: int, size: int, threads: int, url: str) -> None:
    try:
        from .shared_training import SharedTraining, connect

        connect(rank, size, threads, url)
        training = SharedTraining(name, setting)
        pipe.send(training.shape())
        for word in _words(pipe):
            pipe.send(getattr(training, word)())
    except Exception:
        pipe.send(RuntimeError(f"rank {rank} failed:\n{traceback.format_exc()}"))


def _words(pipe: Connection) -> Iterator[str]:
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return
