"""Put plausible bugs into a copy of the package, one at a time, and see whether the tests notice.

The bugs stand in tests/mutants/*.toml (format: tests/support/mutants.py), their outcomes in outcomes.json there, which
hold until the function that a mutant changes reads otherwise, or the test that noticed it. The report is written from
all that is known. Beside other work, some at a time until none is left: ``nice -n 19 scripts/mutate.py --most 20``.
"""

import argparse
import glob
import importlib.util
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "support"))

from mutants import LISTS, ListError, Mutant, read_mutants  # noqa: E402

OUTCOMES, REPORT, LOG = LISTS / "outcomes.json", Path("docs/mutants.md"), "pytest.txt"
KILLED, TIMED_OUT, SURVIVED, BROKEN, NOT_RUN = VERDICTS = ("killed", "timed out", "survived", "broken", "not run")
PRELOADED = ["torch", "fairseq", "torchscale.architecture.decoder"]  # slower to import than most tests; never our own
ENVIRONMENT = {
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # seconds of every start, for plugins that no test needs
    "PYTHONDONTWRITEBYTECODE": "1",  # a file that changes twice a second would be taken from its cache
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "400",
}
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?\.py(?:::.*?)?)(?: - .*)?$", re.MULTILINE)
_HEAD = """\
# Mutants

Plausible bugs that were put into the code one at a time, and whether the default tests noticed. Written by
`make mutate` (`scripts/mutate.py`) from the lists in `tests/mutants`; a mutant is described by its function and by
what it changes there, so that it can be carried over when code moves. An outcome holds until that function reads
otherwise, or the test that noticed it (of one that none noticed, its tests). A run that hung is noticed, too.
"""


class Outcome(TypedDict):
    """What the tests said: the verdict (broken: they could not be collected), the first test that failed, seconds."""

    verdict: str
    test: str
    seconds: float


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in (ROOT / LISTS).glob("*.toml"))
    parser.add_argument("--check", action="store_true", help="only see that every mutant is found")
    parser.add_argument("--only", default="", metavar="TEXT", help="those with TEXT in change, function or expression")
    parser.add_argument("--list", action="append", choices=names, help="only this list; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="copies at the same time (default: 1)")
    parser.add_argument("--most", type=int, metavar="N", help="run N at most; the same call goes on with the others")
    parser.add_argument("--again", action="store_true", help="run mutants with a valid outcome, too")
    parser.add_argument("--time-limit", type=float, default=600.0, metavar="S", help="seconds a run may take")
    arguments = parser.parse_args(words)
    for name in ("jobs", "most"):
        if (number := getattr(arguments, name)) is not None and number < 1:
            parser.error(f"--{name} ({number}) must be at least 1")
    return arguments


def copy_checkout(folder: Path) -> Path:
    """Copies what git knows and does not ignore, and the kernels, so that the working tree is only read."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in [*names, *glob.glob("mhmoe_fairseq/**/*.compiled", root_dir=ROOT, recursive=True)]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


class Trial:
    """Pytest at work in ``folder``, in a process forked from this one, which has imported ``PRELOADED``."""

    def __init__(self, folder: Path, arguments: Sequence[str], time_limit: float) -> None:
        self.folder, self._time_limit, self._start = folder, time_limit, time.monotonic()
        self._process = multiprocessing.get_context("fork").Process(target=_pytest, args=(folder, arguments))
        self._process.start()

    def outcome(self, patience: float) -> Outcome | None:
        """Returns what the tests said, or None if they go on for more than ``patience`` seconds."""
        self._process.join(patience)
        status, seconds = self._process.exitcode, round(time.monotonic() - self._start, 1)
        if status is None and seconds < self._time_limit:
            return None
        if status is None:
            self.end()
        if not status:
            return Outcome(verdict=TIMED_OUT if status is None else SURVIVED, test="", seconds=seconds)
        failed = [*_FAILED.findall((self.folder / LOG).read_text(errors="replace")), f"pytest ended with {status}"][0]
        return Outcome(verdict=KILLED if status == 1 and "::" in failed else BROKEN, test=failed, seconds=seconds)

    def end(self) -> None:
        """Ends the tests with all that they have started."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()


def _pytest(folder: Path, arguments: Sequence[str]) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path.insert(0, str(folder))
    logging.root.setLevel(logging.WARNING)  # fairseq leaves it at DEBUG
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
        os.dup2(os.open(LOG if descriptor else os.devnull, flags), descriptor)
    os.dup2(1, 2)
    import pytest

    status = pytest.main(["-q", "-p", "no:cacheprovider", "--tb=short", "-rfE", *arguments])
    sys.stdout.flush()
    os._exit(status)  # whatever threads the tests have left


def run(mutants: Sequence[Mutant], outcomes: dict[str, dict], jobs: int, time_limit: float) -> None:
    """Tries out ``mutants``, ``jobs`` at a time, each in a copy of its own, and keeps every outcome at once.

    Raises:
        ListError: a test fails without any mutant.
    """
    os.environ.update(ENVIRONMENT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in PRELOADED:
            importlib.import_module(module)
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        free = [copy_checkout(Path(scratch) / str(number)) for number in range(min(jobs, len(mutants)))]
        tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        limit = time_limit * len(tests)
        outcome = Trial(free[0], tests, limit).outcome(limit)
        if outcome["verdict"] != SURVIVED:
            raise ListError(f"without any mutant the tests {outcome['verdict']}: {outcome['test']}")
        print(f"mutate: the unchanged copy passes in {outcome['seconds']:.0f} s", flush=True)
        _run_all(mutants, free, outcomes, time_limit)


def _run_all(mutants: Sequence[Mutant], free: list[Path], outcomes: dict[str, dict], time_limit: float) -> None:
    waiting, running = [*reversed(mutants)], {}
    try:
        while waiting or running:
            while waiting and free:
                mutant, folder = waiting.pop(), free.pop()
                (folder / mutant.path).write_text(mutant.after, encoding="utf-8")
                running[mutant] = Trial(folder, ["-x", *mutant.tests], time_limit)
            for mutant, trial in list(running.items()):
                if (outcome := trial.outcome(patience=0.1)) is not None:
                    (trial.folder / mutant.path).write_text(mutant.before, encoding="utf-8")
                    free.append(running.pop(mutant).folder)
                    outcomes[mutant.change] = {"digest": _digest(mutant, outcome), **outcome}
                    _write(ROOT / OUTCOMES, json.dumps(outcomes, indent=0, sort_keys=True, ensure_ascii=False) + "\n")
                    by = f" by {outcome['test']}" if outcome["test"] else ""
                    print(f"{outcome['verdict']}{by} ({outcome['seconds']:.0f} s): {mutant.change}", flush=True)
    finally:
        for trial in running.values():
            trial.end()


def _digest(mutant: Mutant, outcome: Outcome) -> str:
    return mutant.digest(ROOT, outcome["test"] if outcome["verdict"] == KILLED else "")


def summary(told: Sequence[tuple[Mutant, Outcome]]) -> str:
    """Returns how many of the mutants that were run were noticed, in one line."""
    counts = Counter(outcome["verdict"] for _, outcome in told)
    run, noticed = len(told) - counts[NOT_RUN], counts[KILLED] + counts[TIMED_OUT]
    share = f" ({noticed / run:.1%})" if run else ""
    others = f"{counts[SURVIVED]} survived, {counts[BROKEN]} broken"
    return f"{len(told)} mutants, {run} run: {noticed} noticed{share}, {others}."


def report(told: Sequence[tuple[Mutant, Outcome]]) -> str:
    """Returns the report on all mutants, those without an outcome included."""
    lists = {mutant.list_name: [pair for pair in told if pair[0].list_name == mutant.list_name] for mutant, _ in told}
    lines = [_HEAD, summary(told), "", f"| list | mutants | {' | '.join(VERDICTS)} |", "|---" * 7 + "|"]
    for name, pairs in lists.items():
        counts = Counter(outcome["verdict"] for _, outcome in pairs)
        lines.append(f"| {name} | {len(pairs)} | {' | '.join(str(counts[verdict]) for verdict in VERDICTS)} |")
    for name, pairs in lists.items():
        lines += ["", f"## {name}", "| change | function | noticed by |", "|---|---|---|"]
        for mutant, outcome in pairs:
            test, verdict = f"`{outcome['test']}`", outcome["verdict"]
            noticed = test if verdict == KILLED else f"**{verdict}** {test if outcome['test'] else ''}"
            lines.append(f"| {mutant.change.replace('|', '&#124;')} | `{mutant.function or mutant.path}` | {noticed} |")
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main(words: Sequence[str] | None = None) -> int:
    """Returns 0 if every chosen mutant was noticed, 1 if not, 2 for a list that is wrong."""
    arguments = parse_arguments(words)
    try:
        mutants = read_mutants(ROOT)
        sought = [mutant for mutant in mutants if not arguments.list or mutant.list_name in arguments.list]
        chosen = [
            mutant for mutant in sought
            if arguments.only.lower() in "\n".join((mutant.change, mutant.function, mutant.expression)).lower()
        ]  # fmt: skip
        if arguments.check:
            print(f"{len(chosen)} mutants, all found")
            return 0
        kept = json.loads((ROOT / OUTCOMES).read_text(encoding="utf-8")) if (ROOT / OUTCOMES).exists() else {}
        outcomes = {
            mutant.change: of
            for mutant in mutants
            if (of := kept.get(mutant.change)) and of["digest"] == _digest(mutant, of)
        }
        waiting = [
            mutant for mutant in chosen
            if (arguments.again or mutant.change not in outcomes) and all(map(importlib.util.find_spec, mutant.needs))
        ][: arguments.most]  # fmt: skip
        if waiting:
            run(waiting, outcomes, arguments.jobs, arguments.time_limit)
    except ListError as error:
        print(f"mutate: error: {error}", file=sys.stderr)
        return 2
    not_run = Outcome(verdict=NOT_RUN, test="", seconds=0.0)
    told = [(mutant, outcomes.get(mutant.change, not_run)) for mutant in mutants]
    _write(ROOT / REPORT, report(told))
    of_chosen = [(mutant, outcome) for mutant, outcome in told if mutant in chosen]
    print(summary(of_chosen))
    return int(any(outcome["verdict"] in (SURVIVED, BROKEN) for _, outcome in of_chosen))


if __name__ == "__main__":
    sys.exit(main())
