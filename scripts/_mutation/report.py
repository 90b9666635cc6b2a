"""Outcomes that are kept, and the report that is written from them."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from .mutants import LISTS, Mutant, Mutation
from .runs import BROKEN, KILLED, SURVIVED, TIMED_OUT, Outcome

REPORT = Path("docs/mutants.md")
NOT_RUN = "not run"
_HEAD = """\
# Mutants

Plausible bugs that were put into the code one at a time, and whether the default tests noticed. Written by
`make mutate` (`scripts/mutate.py`) from the lists in `scripts/mutants`; a mutant is described by its function and by
what it changes there, so that it can be carried over when code moves. A run that hung is noticed, too.
"""


class Results:
    """Outcomes of one list, in a file beside it; one counts while the file, the mutant and its tests are the same."""

    def __init__(self, root: Path, list_name: str) -> None:
        self._root = root
        self._path = root / LISTS / f"{list_name}.json"
        self._kept = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}

    def get(self, mutation: Mutation) -> Outcome | None:
        """The outcome of an earlier run that still counts."""
        kept = self._kept.get(mutation.mutant.change)
        if kept is None or kept["digest"] != mutation.digest(self._root):
            return None
        return Outcome(kept["verdict"], kept["test"], kept["seconds"])

    def put(self, mutation: Mutation, outcome: Outcome) -> None:
        """Keep an outcome, in the file at once."""
        rounded = {**asdict(outcome), "seconds": round(outcome.seconds, 1)}
        self._kept[mutation.mutant.change] = {"digest": mutation.digest(self._root), **rounded}
        _write(self._path, json.dumps(dict(sorted(self._kept.items())), indent=0, ensure_ascii=False) + "\n")

    def keep_only(self, changes: Iterable[str]) -> None:
        """Forget mutants that the list no longer has."""
        gone = set(self._kept) - set(changes)
        if gone:
            self._kept = {change: kept for change, kept in self._kept.items() if change not in gone}
            _write(self._path, json.dumps(self._kept, indent=0, ensure_ascii=False) + "\n")


def write_report(path: Path, outcomes: Sequence[tuple[Mutant, Outcome | None]]) -> None:
    """The report on all mutants, those without an outcome included."""
    lists: dict[str, list[tuple[Mutant, Outcome | None]]] = {}
    for mutant, outcome in outcomes:
        lists.setdefault(mutant.list_name, []).append((mutant, outcome))
    verdicts = (KILLED, TIMED_OUT, SURVIVED, BROKEN, NOT_RUN)
    lines = [_HEAD, summary(outcomes), "", f"| list | mutants | {' | '.join(verdicts)} |", "|---" * 7 + "|"]
    for name, entries in lists.items():
        counts = Counter(_verdict(outcome) for _, outcome in entries)
        lines.append(f"| {name} | {len(entries)} | {' | '.join(str(counts[verdict]) for verdict in verdicts)} |")
    for name, entries in lists.items():
        lines += ["", f"## {name}", "| change | function | from | to | noticed by |", "|---|---|---|---|---|"]
        lines += [_row(mutant, outcome) for mutant, outcome in entries]
    _write(path, "\n".join(lines) + "\n")


def summary(outcomes: Sequence[tuple[Mutant, Outcome | None]]) -> str:
    """How many of the mutants that were run were noticed, in one line."""
    counts = Counter(_verdict(outcome) for _, outcome in outcomes)
    run, noticed = len(outcomes) - counts[NOT_RUN], counts[KILLED] + counts[TIMED_OUT]
    share = f" ({noticed / run:.1%})" if run else ""
    explained = sum(bool(m.survives) for m, outcome in outcomes if _verdict(outcome) == SURVIVED)
    return (
        f"{len(outcomes)} mutants, {run} run: {noticed} noticed{share}, {counts[SURVIVED]} survived "
        f"({explained} explained), {counts[BROKEN]} broken."
    )


def _verdict(outcome: Outcome | None) -> str:
    return NOT_RUN if outcome is None else outcome.verdict


def _row(mutant: Mutant, outcome: Outcome | None) -> str:
    verdict = _verdict(outcome)
    if outcome is not None and verdict in (KILLED, BROKEN):
        noticed = _code(outcome.test) if verdict == KILLED else f"**broken**: {_code(outcome.test)}"
    else:
        noticed = f"**{verdict}**" + (f": {mutant.survives}" if verdict == SURVIVED and mutant.survives else "")
    place = f"{mutant.module}: {mutant.function or 'module'}" if mutant.module else mutant.function
    cells = (mutant.change, _code(place), _code(mutant.expression), _code(mutant.becomes), noticed)
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _code(text: str) -> str:
    """Inline code on one line."""
    line = " ⏎ ".join(part.strip() for part in text.strip().splitlines())
    return f"`` {line} ``" if "`" in line else f"`{line}`"


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
