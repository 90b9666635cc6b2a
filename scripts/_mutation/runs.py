"""Tests on a copy of the checkout with one mutant in it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .mutants import Mutation

KILLED, SURVIVED, TIMED_OUT, BROKEN = "killed", "survived", "timed out", "broken"
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
    """A copy that mutants are put into, one at a time; the working tree is only read."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
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
        """Run pytest; what it wrote is in pytest.txt of the copy's folder."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rfE", *arguments]
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.folder),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # seconds of every start, for plugins that no test needs
            "PYTHONDONTWRITEBYTECODE": "1",  # a file that changes twice a second would be taken from its cache
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "400",
        }
        log, start = self.folder / "pytest.txt", time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=output, stderr=output, start_new_session=True
            )
            try:
                status = process.wait(time_limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _end(process)
        seconds = time.monotonic() - start
        failed = _FAILED.findall(log.read_text(errors="replace"))
        if status is None:
            return Outcome(TIMED_OUT, "", seconds)
        if status == 0:
            return Outcome(SURVIVED, "", seconds)
        is_test = status == 1 and bool(failed) and "::" in failed[0]
        return Outcome(KILLED if is_test else BROKEN, failed[0] if failed else f"pytest ended with {status}", seconds)


def _end(process: subprocess.Popen) -> None:
    """With everything that the tests started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
