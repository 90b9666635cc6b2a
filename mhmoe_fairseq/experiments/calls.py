"""Commands as processes of their own, whose lines are followed, until all are stopped."""

import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ..common.errors import UserError

# The same interpreter and its packages, whatever is on PATH.
_MODULES = {"fairseq-train": "fairseq_cli.train", "torchrun": "torch.distributed.run", "mhmoe": "mhmoe_fairseq"}
_ERROR = re.compile(r"(\[rank\d+\]: )?[\w.]+(Error|Exception|Interrupt)\b|[\w-]+( [\w-]+)?: error: ")
# Of several processes: another's end, and torchrun's summary of it.
_CONSEQUENCES = ("ChildFailedError", "by peer")


class Calls:
    """Calls commands, from any thread, until it is stopped."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._is_stopped = False

    def run(
        self, words: list[str], variables: Mapping[str, str], on_line: Callable[[str], None], output: Path | None = None
    ) -> None:
        """Runs a command with further variables of the environment; its lines go to ``on_line`` and ``output``.

        ``UserError`` if it fails, or may not begin any more.
        """
        lines: deque[str] = deque(maxlen=200)
        process = self._begin(words, variables)
        with process, open(output or os.devnull, "a", encoding="utf-8") as kept:
            try:
                for line in process.stdout or ():
                    kept.write(line)
                    kept.flush()
                    lines.append(line.rstrip("\n"))
                    on_line(lines[-1])
            except BaseException:
                process.terminate()
                process.wait()  # what it writes is written before the same command may start again
                raise
            finally:
                self._running.discard(process)
        if process.returncode:
            raise UserError(last_error(lines))

    def _begin(self, words: list[str], variables: Mapping[str, str]) -> "subprocess.Popen[str]":
        with self._lock:
            if self._is_stopped:
                raise UserError("was not begun, since all were stopped")
            process = subprocess.Popen(
                [sys.executable, "-m", _MODULES[words[0]], *words[1:]], stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace", env={**os.environ, **variables},
            )  # fmt: skip
            self._running.add(process)
        return process

    def stop(self) -> None:
        """Ends what runs, and lets nothing begin any more."""
        with self._lock:
            self._is_stopped = True
            for process in [*self._running]:
                process.terminate()


def last_error(lines: Iterable[str]) -> str:
    """Returns the last line that tells an error of a command's own, or its last line."""
    told = [line for line in lines if line.strip()]
    errors = [line for line in told if _ERROR.match(line) and not any(word in line for word in _CONSEQUENCES)]
    return (errors or told or ["it ended without a word"])[-1]
