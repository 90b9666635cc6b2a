"""Several processes that work on one thing: a function, or a fairseq command, on every rank of a process group.

Each call forks fresh processes from the server of ``console`` that has imported torch, fairseq and TorchScale, so a
process costs about a tenth of a second and nothing is left over from the call before::

    def total(number):                      # at the top of a test module: it travels by name
        tensor = torch.tensor(number + dist.get_rank())
        dist.all_reduce(tensor)
        return tensor

    workers2.run(total, 5)                  # [tensor(11), tensor(11)]: the results by rank
    workers2.fairseq("fairseq-train", ...)  # the logs by rank
"""

import contextlib
import datetime
import faulthandler
import importlib
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from console import ENTRY_POINTS, SERVER, USER_DIR

# After one rank has failed the others get this long to notice by themselves.
_GRACE_SECONDS = 20


@dataclass(frozen=True)
class Place:
    """Where a process stands among the workers of one call.

    Attributes:
        rank, world_size: its number, and how many there are.
        folder: a folder of this call, for all ranks.
    """

    rank: int
    world_size: int
    folder: Path

    @property
    def init_method(self) -> str:
        """For ``torch.distributed.init_process_group``."""
        return f"file://{self.folder / 'store'}"

    @property
    def output(self) -> Path:
        """The file that this rank's standard output and error go to."""
        return self.folder / f"output-{self.rank}.txt"


class WorkerError(AssertionError):
    """A rank raised, ended early or ran out of time; the message has every rank's traceback."""


class Workers:
    """``size`` ranks.

    Args:
        size: processes of one call.
        timeout: seconds that a call may take, unless it says otherwise.
    """

    def __init__(self, size: int, timeout: float = 120.0) -> None:
        self.size = size
        self.timeout = timeout

    def run(self, function: Callable, *args: Any, group: bool = True, timeout: float | None = None) -> list[Any]:
        """Call ``function(*args)`` on every rank.

        Args:
            function: found by its name in an importable module; also ``functools.partial`` of one.
            args: anything that pickles.
            group: start a gloo process group around the call.
            timeout: seconds.

        Returns:
            the results, by rank.

        Raises:
            WorkerError: with the remote tracebacks, the rank that failed first in front.
        """
        seconds = timeout or self.timeout
        with tempfile.TemporaryDirectory(prefix="workers-") as folder:
            places = [Place(rank, self.size, Path(folder)) for rank in range(self.size)]
            processes = [SERVER.Process(target=_main, args=(p, group, seconds, function, args)) for p in places]
            for process in processes:
                process.start()
            failed = _join(processes, seconds)
            if failed:
                raise WorkerError("\n".join(_story(places[rank], processes[rank]) for rank in failed))
            return [pickle.loads((place.folder / f"result-{place.rank}").read_bytes()) for place in places]

    def fairseq(self, command: str, *words: object, timeout: float | None = None) -> list[str]:
        """Run a fairseq command on all ranks together, as ``fairseq-train --distributed-world-size N`` would.

        Returns:
            standard output and error, by rank.
        """
        return self.run(fairseq_command, command, list(map(str, words)), group=False, timeout=timeout)


def here() -> Place:
    """The place of this process; to be asked inside a function that ``Workers.run`` calls."""
    return _place


def fairseq_command(command: str, words: Sequence[str]) -> str:
    """One rank of a fairseq command; what it wrote.

    In a single process no distributed flag is added.
    """
    from fairseq.logging import progress_bar

    place = here()
    if place.world_size > 1:
        words = [
            *words, "--distributed-world-size", str(place.world_size), "--distributed-rank", str(place.rank),
            "--distributed-init-method", place.init_method, "--distributed-no-spawn",
            "--distributed-backend", "gloo",
        ]  # fmt: skip
        if "--ddp-backend" not in words:
            words = [*words, "--ddp-backend", "legacy_ddp"]
    sys.argv = [command, *words]
    importlib.import_module(ENTRY_POINTS[command]).cli_main()
    progress_bar._close_writers()  # as a process does that ends by itself
    sys.stdout.flush()
    return place.output.read_text(errors="replace")


TRAIN_FLAGS = (
    "--user-dir", str(USER_DIR), "--task", "mhmoe_language_modeling", "--criterion", "moe_cross_entropy",
    "--lr-scheduler", "fixed", "--dropout", "0", "--cpu", "--num-workers", "0", "--log-format", "json",
    "--log-interval", "1", "--no-epoch-checkpoints",
)  # fmt: skip

_place: Place


def _main(place: Place, group: bool, timeout: float, function: Callable, args: tuple) -> None:
    global _place
    _place = place
    file = os.open(place.output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    import torch

    torch.set_num_threads(1)
    try:
        with _group(place, timeout) if group else contextlib.nullcontext():
            result = pickle.dumps(function(*args))
    except BaseException:
        (place.folder / f"error-{place.rank}").write_text(f"{time.time()}\n{traceback.format_exc()}")
        # Not a normal exit: threads of a half-closed process group would hold it up.
        os._exit(1)
    (place.folder / f"result-{place.rank}").write_bytes(result)
    sys.stdout.flush()
    os._exit(0)


@contextlib.contextmanager
def _group(place: Place, timeout: float):
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=place.init_method,
        rank=place.rank,
        world_size=place.world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    yield
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()


def _join(processes: list, timeout: float) -> list[int]:
    """Wait for all; the ranks that failed, in that order."""
    failed: list[int] = []
    running = dict(enumerate(processes))
    deadline = time.monotonic() + timeout
    while running:
        wait([process.sentinel for process in running.values()], max(deadline - time.monotonic(), 0))
        ended = [rank for rank, process in running.items() if process.exitcode is not None]
        if not ended and time.monotonic() >= deadline:
            failed += _kill(running)
            break
        for rank in ended:
            if running.pop(rank).exitcode:
                failed.append(rank)
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    return failed


def _kill(running: dict) -> list[int]:
    for process in running.values():
        os.kill(process.pid, signal.SIGUSR1)  # writes where it stands
    time.sleep(0.5)
    for process in running.values():
        process.kill()
        process.join()
    return list(running)


def _story(place: Place, process: Any) -> str:
    error = place.folder / f"error-{place.rank}"
    text = error.read_text() if error.exists() else f"ended with status {process.exitcode}"
    output = place.output.read_text(errors="replace")[-3000:] if place.output.exists() else ""
    return f"--- rank {place.rank} of {place.world_size}: {text}\n{output}"
