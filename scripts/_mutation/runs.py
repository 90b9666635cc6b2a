"""Tests on a copy of the checkout with one mutant in it."""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import server
from .mutants import Mutation
from .server import LOG

KILLED, SURVIVED, TIMED_OUT, BROKEN = "killed", "survived", "timed out", "broken"
PRELOADED = ("torch", "fairseq", "torchscale.architecture.decoder")  # never the package itself
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?\.py(?:::.*?)?)(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """What the tests said.

    Attributes:
        verdict: ``killed``, ``survived``, ``timed out``, or ``broken`` if the tests could not even be collected.
        test: the first test that failed.
        seconds: of the run.
    """

    verdict: str
    test: str
    seconds: float


class Checkout:
    """A copy that mutants are put into, one at a time; the working tree is only read. Close it at the end."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        self._server: subprocess.Popen[bytes] | None = None
        listing = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split("\0")
        for name in filter(None, names):
            if (root / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, folder / name)

    def try_out(self, mutation: Mutation, time_limit: float) -> Outcome:
        """Run the mutant's tests up to the first that fails."""
        path = self.folder / mutation.path
        path.write_text(mutation.after, encoding="utf-8")
        try:
            return self.test(["-x", *mutation.mutant.tests], time_limit)
        finally:
            path.write_text(mutation.before, encoding="utf-8")

    def test(self, arguments: Sequence[str], time_limit: float) -> Outcome:
        """Run pytest."""
        start = time.monotonic()
        status = self._ask(["-q", "-p", "no:cacheprovider", "--tb=short", "-rfE", *arguments], time_limit)
        seconds = time.monotonic() - start
        if status is None:
            return Outcome(TIMED_OUT, "", seconds)
        if status == 0:
            return Outcome(SURVIVED, "", seconds)
        failed = _FAILED.findall((self.folder / LOG).read_text(errors="replace"))
        is_test = status == 1 and bool(failed) and "::" in failed[0]
        return Outcome(KILLED if is_test else BROKEN, failed[0] if failed else f"pytest ended with {status}", seconds)

    def close(self) -> None:
        """End the server with everything that tests started."""
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.communicate()
            self._server = None

    def _ask(self, arguments: list[str], time_limit: float) -> int | None:
        """Pytest's exit status; None after ``time_limit``."""
        if self._server is None:
            self._server = self._start()
        given, answers = self._server.stdin, self._server.stdout
        given.write(json.dumps(arguments).encode() + b"\n")
        if select.select([answers], [], [], time_limit)[0]:
            answer = answers.readline()
            if not answer:
                raise RuntimeError(f"the process that runs the tests ended:\n{(self.folder / LOG).read_text()[-2000:]}")
            return int(answer)
        self.close()
        return None

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.folder),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # seconds of every start, for plugins that no test needs
            "PYTHONDONTWRITEBYTECODE": "1",  # a file that changes twice a second would be taken from its cache
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "400",
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0, "start_new_session": True}
        command = [sys.executable, server.__file__, *PRELOADED]
        with (self.folder / LOG).open("w") as log:
            return subprocess.Popen(command, cwd=self.folder, env=environment, stderr=log, **pipes)
