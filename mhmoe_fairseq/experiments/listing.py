"""What experiments there are: what each trains, for about how long on this machine, how far it is, and its verdicts."""

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..analysis.reports.claims import NOT_RUN
from ..common.errors import UserError
from ..common.tables import MISSING
from .plan import Plan
from .results import read_page
from .run import Run
from .spec import Experiment, flags_of
from .speeds import Speeds, samples_of


def default_plan(experiment: Experiment) -> Plan:
    """Returns the plan of ``mhmoe reproduce NAME`` without flags."""
    return Plan(experiment, Path("outputs") / experiment.folder)


def _runs(experiment: Experiment) -> list[Run]:
    """All trainings, those of the parts of others before them."""
    plan = default_plan(experiment)
    runs = [*plan.search(), *plan.runs()] if experiment.stages else []
    return [each for run in runs for each in (*run.parts, run)]


def _state(run: Run) -> str:
    try:
        return run.state()
    except UserError:
        return "another's"


def tokens_of(runs: list[Run]) -> float | None:
    """Returns the tokens of language models' trainings, all together; None of others, whose samples vary."""
    total = 0.0
    for run in runs:
        flags = flags_of(run.training(alone=True))
        if flags.get("--sample-break-mode") != ("none",):
            return None
        total += run.updates * samples_of(flags) * int(flags["--tokens-per-sample"][0])
    return total or None


def _trains(runs: list[Run]) -> str:
    """``3 x 3 x 1,000``: models, seeds, updates."""
    trained = [run for run in runs if run.splits]
    if not trained:
        return MISSING
    models = dict.fromkeys(run.recipe.name_of(run.model) for run in trained)
    seeds = dict.fromkeys(run.seed for run in trained)
    updates = dict.fromkeys(f"{sum(part.updates for part in (*run.parts, run)):,}" for run in trained)
    return f"{len(models)} x {len(seeds)} x {' / '.join(updates)}"


def _verdicts(experiment: Experiment, tree: Path) -> str:
    """How many claims have each verdict, of the kept records."""
    if not experiment.claims:
        return MISSING
    counted = Counter(finding.verdict for finding in read_page(experiment, tree).findings)
    return ", ".join(
        name if len(counted) == 1 and number == 1 else f"{number} {name}" for name, number in counted.items()
    )


def rows(experiments: Mapping[str, Experiment], tree: Path) -> Iterator[list[str]]:
    """Yields a row for each experiment at CPU scale: name, source, trainings, tokens, hours, state, verdict."""
    speeds = Speeds.of(Path("outputs"), tree)
    for experiment in experiments.values():
        runs = _runs(experiment)
        states = [_state(run) for run in runs]
        yield [
            experiment.name,
            experiment.source,
            _trains(runs),
            MISSING if (tokens := tokens_of(runs)) is None else f"{tokens / 1e6:,.1f}M",
            _hours([speeds.hours(run) for run, state in zip(runs, states) if state not in ("trained", "finished")]),
            _how_far(states),
            _verdicts(experiment, tree),
        ]


def _hours(each: list[float | None]) -> str:
    known = [hours for hours in each if hours is not None]
    return "?" if len(known) < len(each) else f"{sum(known):.1f}" if each else MISSING


def _how_far(states: list[str]) -> str:
    done = sum(state == "finished" for state in states)
    if not states:
        return MISSING
    return "finished" if done == len(states) else "missing" if {*states} == {"missing"} else f"{done} of {len(states)}"


def details(experiment: Experiment, tree: Path) -> Iterator[tuple[str, str]]:
    """Yields what there is to say of one experiment: a title and a value each."""
    row = dict(
        zip(("source", "trains", "tokens", "hours", "state"), next(rows({experiment.name: experiment}, tree))[1:])
    )
    yield "", f"{experiment.name}: {experiment.summary}"
    yield "source", row["source"]
    yield "command", f"mhmoe reproduce {experiment.name}   (paper scale: --scale paper)"
    if experiment.parts:
        yield "parts", ", ".join(experiment.parts)
    if runs := _runs(experiment):
        trained = [run for run in runs if run.splits]
        yield "models", ", ".join(dict.fromkeys(run.model for run in trained))  # as --models takes them
        yield "models x seeds x updates", row["trains"]
        if search := default_plan(experiment).search():
            updates = {sum(part.updates for part in (*run.parts, run)) for run in search}
            margin = max(run.recipe.scales["cpu"].search_margin for run in search)
            rule = f"; of rates within {margin:g} bits the smallest" if margin else ""
            yield (
                "search",
                f"{len(search)} trainings of {min(updates):,} updates, more where the best rate is at the edge{rule}",
            )
        yield "tokens", row["tokens"]
        yield "hours", row["hours"]
        yield "state", row["state"]
        for data, words in default_plan(experiment).preparations():
            yield "data", f"{data}: {shlex.join(words) if words else 'yours'}"
    for claim, finding in zip(experiment.claims, read_page(experiment, tree).findings):
        told = "" if finding.verdict == NOT_RUN else f" ({finding.change}, n = {len(finding.changes)})"
        yield "claim", f"{claim.text}: {finding.verdict}{told}"
