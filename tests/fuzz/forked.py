"""Many short calls of a command, each in a process of its own that costs a fork.

One worker, forked from the server of ``console``, imports the command; from it every call is forked, with bounds on
time and memory, so that a call can neither stay for ever nor take the machine with it.
"""

import importlib
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from console import SERVER

CPU_SECONDS, SECONDS, MEMORY = 40, 240, 3 << 30


@dataclass(frozen=True)
class Outcome:
    """How a call ended: its exit status (below 0: the signal that ended it), what it wrote, and what it changed.

    Attributes:
        harmed: paths of the fixtures that it changed, removed or added.
        left: paths in its working folder that it changed, removed or added.
        seconds: of CPU time.
    """

    status: int
    out: str
    err: str
    harmed: tuple[str, ...]
    left: tuple[str, ...]
    seconds: float


def run_forked(
    entry: str, calls: Sequence[Sequence[str]], fixtures: Path, work: Path, furnish: Callable[[Path], None]
) -> list[Outcome]:
    """The outcomes of ``entry`` (``module:function`` of a list of words) for every call.

    Args:
        fixtures: a folder that no call may change.
        work: the folder in which each call starts, made anew for it.
        furnish: puts files into ``work``.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "outcomes"
        process = SERVER.Process(target=_work, args=(entry, calls, fixtures, work, furnish, result))
        process.start()
        process.join()
        assert process.exitcode == 0, f"the worker ended with status {process.exitcode}"
        return pickle.loads(result.read_bytes())


def _work(
    entry: str, calls: Sequence[Sequence[str]], fixtures: Path, work: Path, furnish: Callable, result: Path
) -> None:
    import torch

    torch.set_num_threads(1)
    module, name = entry.split(":")
    function = getattr(importlib.import_module(module), name)
    before = _state(fixtures)
    outcomes = []
    for words in calls:
        work.mkdir()
        furnish(work)
        empty = _state(work)
        with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
            used = _cpu_of_children()
            child = os.fork()
            if child == 0:
                _call(function, list(words), work, out.fileno(), err.fileno())
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = [Path(file.name).read_text(errors="replace") for file in (out, err)]
        changed = [tuple(sorted({path for path, _ in old ^ _state(folder)}))
                   for old, folder in ((before, fixtures), (empty, work))]  # fmt: skip
        outcomes.append(Outcome(status, *texts, *changed, seconds=_cpu_of_children() - used))
        shutil.rmtree(work)
    result.write_bytes(pickle.dumps(outcomes))


def _call(function: Callable, words: list[str], work: Path, out: int, err: int) -> None:
    """Never returns."""
    status = 1
    try:
        signal.alarm(SECONDS)
        spent = int(sum(os.times()[:2]))
        resource.setrlimit(resource.RLIMIT_CPU, (spent + CPU_SECONDS, spent + CPU_SECONDS))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.chdir(work)
        status = function(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)


def _state(folder: Path) -> set[tuple[str, tuple[int, ...]]]:
    """Every file and folder with what changes when it is written to."""
    found = set()
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            stat = os.lstat(path)
            content = () if name in folders else (stat.st_size, stat.st_mtime_ns)
            found.add((os.path.relpath(path, folder), (stat.st_ino, stat.st_mode, *content)))
    return found


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
