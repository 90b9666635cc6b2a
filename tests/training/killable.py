"""A training on several ranks that a test can watch, kill and resume."""

import importlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

from console import ENTRY_POINTS, SERVER


class Ranks:
    """``fairseq-train`` on ``size`` ranks, each in a process of its own without torchrun, which would end the others.

    Args:
        folder: where the ranks' output and their meeting place go.
        size: number of ranks.
        words: the command's flags, without the distributed ones.
        beforehand: called with the rank in each process before the command, as to make one fail later.
        watch: ``MHMOE_WATCH_SECONDS``.
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        *words: object,
        beforehand: Callable[[int], None] | None = None,
        watch: float = 20,
    ) -> None:
        folder.mkdir(parents=True)
        self.outputs = [folder / f"rank-{rank}.txt" for rank in range(size)]
        together = [
            "--distributed-world-size", size, "--distributed-init-method", f"file://{folder / 'store'}",
            "--distributed-no-spawn", "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp",
        ]  # fmt: skip
        command = list(map(str, ("fairseq-train", *words, *together)))
        self.processes = [
            SERVER.Process(target=_main, args=(command, rank, output, watch, beforehand))
            for rank, output in enumerate(self.outputs)
        ]
        for process in self.processes:
            process.start()

    def output(self, rank: int = 0) -> str:
        path = self.outputs[rank]
        return path.read_text(errors="replace") if path.exists() else ""

    def until(self, happened: Callable[[], bool], seconds: float = 120) -> None:
        """Wait for something, a millisecond at a time, while all ranks live."""
        deadline = time.monotonic() + seconds
        while not happened():
            ended = [rank for rank, process in enumerate(self.processes) if process.exitcode is not None]
            assert not ended, f"rank {ended[0]} has ended:\n{self.output(ended[0])[-4000:]}"
            assert time.monotonic() < deadline, f"nothing for {seconds} s:\n{self.output()[-4000:]}"
            time.sleep(0.001)

    def kill(self, rank: int, how: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.processes[rank].pid, how)

    def end(self, seconds: float = 120, but: int | None = None) -> list[int | None]:
        """Every rank's status, None for one that was still there after so long, and is killed then.

        Args:
            seconds: for all of them.
            but: a rank that is not waited for.
        """
        deadline = time.monotonic() + seconds
        running = {process.sentinel: process for rank, process in enumerate(self.processes) if rank != but}
        while running and time.monotonic() < deadline:
            for sentinel in wait(list(running), deadline - time.monotonic()):
                running.pop(sentinel).join()
        statuses = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return statuses

    def updates(self) -> int:
        """How many updates rank 0 has logged."""
        return len(re.findall(r"train_inner\b", self.output()))


def _main(command: list[str], rank: int, output: Path, watch: float, beforehand: Callable[[int], None] | None) -> None:
    os.environ["MHMOE_WATCH_SECONDS"] = str(watch)
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    import torch

    torch.set_num_threads(1)
    sys.argv = [*command, "--distributed-rank", str(rank)]
    try:
        if beforehand is not None:
            beforehand(rank)
        importlib.import_module(ENTRY_POINTS[command[0]]).cli_main()
    except Exception:
        # As a script's interpreter does; multiprocessing would not ask the hook.
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
