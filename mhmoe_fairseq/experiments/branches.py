"""Branch-Train-MiX (arXiv 2403.07816) as trainings: what a model with branches spends its updates on.

A training of N updates is one of a dense seed, one on from there for each branch, on its domain's documents alone, and
one of their mix (:mod:`mhmoe_fairseq.checkpoints.mix`) on all: N updates together, all with one learning rate.
"""

from collections.abc import Iterable
from dataclasses import replace

from ..common.errors import UserError
from ..data.domains import domain_names
from .models import MODELS
from .run import Run
from .spec import parse_flags

SEED, BRANCHES = 35, 35  # percent of the updates: the seed's, all branches'; the mix has the rest
FOLDER = "parts"  # of the trainings of seeds and branches, beside the runs
_DENSE = "dense"


def require_domains(runs: Iterable[Run]) -> None:
    """Raises ``UserError`` if the data of models of domains do not tell them, or not those of the branches."""
    for run in runs:
        model = MODELS[run.model]
        routing = parse_flags(model.flags).get("--mhmoe-routing", ())
        if run.branches or "domain" in routing:  # not what starts from a mix
            lacking = sorted({*model.branches} - {*domain_names(run.data)})
            if lacking:
                raise UserError(f"--data ({run.data}) has no text of {', '.join(lacking)}, domains of {run.model}")


def in_parts(run: Run) -> Run:
    """Returns the run as the training of a mix after those that are mixed; one of a model without branches as it is."""
    domains = MODELS[run.model].branches
    if not domains or run.start is not None:
        return run
    if run.recipe.family != "lm":
        raise UserError(f"--models ({run.model}): must be another, since only language models are mixed of branches")

    flags = parse_flags(MODELS[run.model].flags) | run.choice.flags
    if flags["--moe-expert-count"] != (f"{len(domains) + 1}",):
        asked, rule = " ".join(flags["--moe-expert-count"]), "its experts are those of the branches and of the seed"
        raise UserError(f"--moe-expert-count ({asked}) must be {len(domains) + 1} for {run.model}: {rule}")
    out = run.folder.parents[run.name.count("/")]  # of the experiment

    def share(percent: int) -> Run:
        validations = -(-run.validations * percent // 100)
        return replace(run, updates=max(run.updates * percent // 100, 1), validations=validations)

    def part(of: str, percent: int, flags: str = "", start: Run | None = None) -> Run:
        model, last = run.name.rsplit("/", 1)
        name = f"{FOLDER}/{model}/{of}/{last}"
        return replace(
            share(percent), name=name, folder=out / name, recipe=run.recipe.variant(flags, run.recipe.scales),
            model=_DENSE, start=start, is_part=True, splits=(),
        )  # fmt: skip

    seed = part("seed", SEED)
    each = BRANCHES // len(domains)
    own = {of: f"--train-subset train_{of} --valid-subset valid_{of}" for of in domains}
    branches = tuple(part(of, each, flags, seed) for of, flags in own.items())
    left = run.updates - seed.updates - sum(branch.updates for branch in branches)
    mix = share(100 - SEED - each * len(domains))
    return replace(mix, updates=max(left, 1), start=seed, branches=branches)
