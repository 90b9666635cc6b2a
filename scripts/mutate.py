"""Put plausible bugs into a copy of the package, one at a time, and see whether the tests notice.

The bugs stand in scripts/mutants/*.toml (format: scripts/_mutation/mutants.py). Outcomes are kept beside the lists; a
mutant runs again only when its file, its tests or the mutant itself has changed. The report is written from all that is
known.
"""

import argparse
import contextlib
import queue
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from _mutation.mutants import ListError, Mutant, Mutation, locate_all, read_lists
from _mutation.report import REPORT, Results, summary, write_report
from _mutation.runs import BROKEN, SURVIVED, Checkout, Outcome

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only see that every mutant has its place")
    parser.add_argument("--only", metavar="TEXT", help="mutants whose change, function or expression has TEXT in it")
    parser.add_argument("--list", action="append", default=[], metavar="NAME", help="only this list; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="copies at the same time (default: 1)")
    parser.add_argument("--again", action="store_true", help="run mutants with a valid outcome, too")
    parser.add_argument("--time-limit", type=float, default=600.0, metavar="S", help="seconds a run may take")
    parser.add_argument("--report", type=Path, default=ROOT / REPORT, metavar="FILE", help=f"default: {REPORT}")
    arguments = parser.parse_args(words)
    if arguments.jobs < 1:
        parser.error(f"--jobs ({arguments.jobs}) must be at least 1")
    return arguments


def wanted(mutants: Sequence[Mutant], text: str | None) -> list[Mutant]:
    """Those with ``text`` in their words, function or expression."""
    if text is None:
        return list(mutants)
    return [m for m in mutants if any(text.lower() in part.lower() for part in (m.change, m.function, m.expression))]


def check_unmutated(checkout: Checkout, mutations: Sequence[Mutation], time_limit: float) -> None:
    """The copy must pass what the mutants are to fail.

    Raises:
        ListError: naming a test that fails without any mutant.
    """
    tests = list(dict.fromkeys(test for mutation in mutations for test in mutation.mutant.tests))
    outcome = checkout.test(tests, time_limit * len(tests))
    if outcome.verdict != SURVIVED:
        raise ListError(f"without any mutant the tests {outcome.verdict}: {outcome.test}")
    print(f"mutate: the unchanged copy passes in {outcome.seconds:.0f} s", flush=True)


def run(mutations: Sequence[Mutation], results: dict[str, Results], jobs: int, time_limit: float) -> None:
    """Try out ``mutations``, ``jobs`` at a time, each in a copy that it has for itself."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, contextlib.ExitStack() as opened:
        copies: queue.SimpleQueue[Checkout] = queue.SimpleQueue()
        for number in range(min(jobs, len(mutations))):
            copies.put(opened.enter_context(contextlib.closing(Checkout(ROOT, Path(folder) / str(number)))))
        with _lent(copies) as checkout:
            check_unmutated(checkout, mutations, time_limit)

        def try_out(mutation: Mutation) -> tuple[Mutation, Outcome]:
            with _lent(copies) as checkout:
                return mutation, checkout.try_out(mutation, time_limit)

        with ThreadPoolExecutor(jobs) as pool:
            for done in as_completed([pool.submit(try_out, mutation) for mutation in mutations]):
                mutation, outcome = done.result()
                results[mutation.mutant.list_name].put(mutation, outcome)
                by = f" by {outcome.test}" if outcome.test else ""
                print(f"{outcome.verdict}{by} ({outcome.seconds:.0f} s): {mutation.mutant.change}", flush=True)


@contextlib.contextmanager
def _lent(copies: queue.SimpleQueue[Checkout]) -> Iterator[Checkout]:
    checkout = copies.get()
    try:
        yield checkout
    finally:
        copies.put(checkout)


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 0 if every mutant was noticed or its survival is explained, 1 if not, 2 for a list that is wrong."""
    arguments = parse_arguments(words)
    try:
        everything = locate_all(read_lists(ROOT), ROOT)
        chosen = wanted(read_lists(ROOT, arguments.list), arguments.only)
        if arguments.check:
            print(f"{len(chosen)} mutants, each with its place")
            return 0
        results = {name: Results(ROOT, name) for name in {mutation.mutant.list_name for mutation in everything}}
        for name, kept in results.items():
            kept.keep_only(mutation.mutant.change for mutation in everything if mutation.mutant.list_name == name)
        waiting = [mutation for mutation in everything if mutation.mutant in chosen]
        if not arguments.again:
            waiting = [mutation for mutation in waiting if results[mutation.mutant.list_name].get(mutation) is None]
        if waiting:
            run(waiting, results, arguments.jobs, arguments.time_limit)
    except ListError as error:
        print(f"mutate: error: {error}", file=sys.stderr)
        return 2
    outcomes = [(mutation.mutant, results[mutation.mutant.list_name].get(mutation)) for mutation in everything]
    write_report(arguments.report, outcomes)
    of_chosen = [(mutant, outcome) for mutant, outcome in outcomes if mutant in chosen]
    print(summary(of_chosen))
    verdicts = [(outcome.verdict, mutant.survives) for mutant, outcome in of_chosen if outcome is not None]
    return int(any(verdict == BROKEN or verdict == SURVIVED and not reason for verdict, reason in verdicts))


if __name__ == "__main__":
    sys.exit(main())
