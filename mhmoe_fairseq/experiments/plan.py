"""The runs of an experiment: which trainings, one after the other, what they start from, and what follows them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.files import read_json
from .branches import in_parts
from .models import MODELS
from .run import Choice, Run
from .spec import Experiment, Recipe, Stage, parse_flags

SEARCH = "search.json"  # what a search of learning rates found, in the folder of the runs
FURTHER = 2  # learning rates that are tried beyond a recipe's where the best of a model is at their edge

_COMPUTE = ("analyze", "evaluate", "zero-shot")  # commands that take a GPU where there is one


@dataclass(frozen=True)
class Plan:
    """An experiment, some of whose fields the user chose, and what else the user chose.

    Attributes:
        models: names or patterns; empty: the experiment's.
        start: the recipe whose runs to start from, other than the recipes' own.
        xnli: the user's copy of XNLI.
    """

    experiment: Experiment
    out: Path
    choice: Choice = Choice()
    data: Path | None = None
    models: tuple[str, ...] = ()
    start: Recipe | None = None
    xnli: str | None = None
    best_lrs: dict[str, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Returns the models' names; ``UserError`` if what the user chose fits no model."""
        own = self.experiment.models
        if not self.models:
            return list(self.choice.scale == "paper" and self.experiment.paper_models or own)
        chosen: list[str] = []
        for pattern in self.models:
            fitting = [name for name in dict.fromkeys([*own, *MODELS]) if fnmatch(name, pattern)]
            if not fitting:
                known = ", ".join(dict.fromkeys([*own, *list(MODELS)[:6]]))
                raise UserError(f"--models ({pattern}) must be a model's name ({known}, ...) or a pattern of names")
            chosen += fitting
        return list(dict.fromkeys(chosen))

    def is_own(self, recipe: Recipe) -> bool:
        """Whether the experiment itself trains by this recipe, and not only what its trainings start from."""
        return any(stage.recipe == recipe for stage in self.experiment.stages)

    def data_of(self, recipe: Recipe) -> Path:
        """Returns the folder of prepared data; the user's is that of the experiment's own recipes."""
        is_own = any(recipe.data == stage.recipe.data for stage in self.experiment.stages)
        return self.data if self.data is not None and is_own else Path(recipe.data)

    def stages(self) -> Iterator[list[Run]]:
        """Yields the runs that may go on at the same time, what others start from first."""
        for stage in self.experiment.stages:
            yield from with_starts(self.runs(stage))

    def runs(self, *stages: Stage) -> list[Run]:
        """Returns the runs of some stages, or of all: all models of a seed before the next seed."""
        return [
            self.run(stage.recipe, model, seed)
            for stage in stages or self.experiment.stages
            for seed in self.seeds_of(stage.recipe)
            for model in self.names()
            if any(fnmatch(model, pattern) for pattern in stage.models)
        ]

    def run(self, recipe: Recipe, model: str, seed: int, search: str | None = None) -> Run:
        """Returns one run, and with it those that it starts from; ``search``: the search's with this learning rate."""
        name = f"{recipe.name_of(model)}/seed-{seed}"
        first = self.start_of(recipe)
        start = None if first is None else self.run(first, model, seed)
        scale, lrs = recipe.scales[self.choice.scale], self.lrs_of(recipe)
        lr = (lrs[0] if len(lrs) == 1 else self.best_lr(recipe, model)) if self.is_own(recipe) else None
        run = Run(
            name, self.out / name, recipe, model, seed, self.data_of(recipe), self.choice,
            self.experiment.updates or scale.updates, self.experiment.validations or scale.validations, lr, start,
        )  # fmt: skip
        if search is not None:
            name = f"search/{recipe.name_of(model)}/lr-{search}"
            shorter = min(self.experiment.search_updates or scale.search_updates, run.updates)
            run = replace(
                run, name=name, folder=self.out / name, updates=shorter, validations=1, lr=search, is_trial=True,
                splits=(),
            )  # fmt: skip
        return in_parts(run)

    def start_of(self, recipe: Recipe) -> Recipe | None:
        """Returns the recipe whose runs a recipe's start from; ``UserError`` if the user chose the recipe itself."""
        start = recipe.start.get(self.choice.scale)
        if start is None or self.start is None or not self.is_own(recipe):
            return start
        if self.start == recipe:
            raise UserError(f"--start ({recipe.name}) must not be what is trained itself")
        return self.start

    def seeds_of(self, recipe: Recipe) -> tuple[int, ...]:
        """Returns the seeds of its trainings: the experiment's or the recipe's at this scale."""
        return tuple(dict.fromkeys(self.experiment.seeds or recipe.scales[self.choice.scale].seeds))

    def best_lr(self, recipe: Recipe, model: str) -> str | None:
        """Returns what the search found, now or earlier, if it is still one to choose from; None before a search."""
        name, found = recipe.name_of(model), read_search(self.out)
        best = (self.best_lrs or found.get("best_lr", {})).get(name)
        return best if best in self._rates(recipe, found.get("valid_loss_bits", {}).get(name, {})) else None

    def lrs_of(self, recipe: Recipe) -> tuple[str, ...]:
        """Returns the learning rates to choose from: the experiment's or the recipe's; none if ``--lr`` was given."""
        lrs = self.experiment.lrs or recipe.scales[self.choice.scale].lrs
        return () if "--lr" in self.choice.flags else tuple(dict.fromkeys(lrs))

    def search(self, losses: Mapping[str, Mapping[str, float | None]] | None = None) -> list[Run]:
        """Returns the search's runs, for each model and learning rate one, as far as the losses tell which are tried.

        Args:
            losses: model -> learning rate -> validation loss (None: not finite); by default those of an earlier search.

        Raises:
            UserError: several rates for several kinds of training.
        """
        lrs = self.experiment.lrs
        if len(lrs) > 1 and len(self.experiment.stages) > 1:
            raise UserError(
                f"--lrs ({' '.join(lrs)}) must be one value where several kinds of trainings follow each other"
            )
        known = read_search(self.out).get("valid_loss_bits", {}) if losses is None else losses
        of_models = {run.recipe.name_of(run.model): run for run in self.runs()}
        return [
            # Of the recipe's own seed, whichever are trained: a model's later seeds have the first one's rate.
            self.run(run.recipe, run.model, run.recipe.scales[self.choice.scale].seeds[0], search=lr)
            for name, run in of_models.items()
            if len(self.lrs_of(run.recipe)) > 1 for lr in self._rates(run.recipe, known.get(name, {}))
        ]  # fmt: skip

    def _rates(self, recipe: Recipe, losses: Mapping[str, float | None]) -> list[str]:
        """The learning rates that a search with these losses tries: the recipe's, or the user's, which are all then.

        Beyond a recipe's at most ``FURTHER``, one by one, where the best of those tried is at their edge.
        """
        own = self.lrs_of(recipe)
        rates, most = [*own], len(own) + (0 if self.experiment.lrs or len(own) < 2 else FURTHER)
        while len(rates) < most and {*rates} <= {*losses} and (lr := further_lr({lr: losses[lr] for lr in rates})):
            rates.append(lr)
        return rates

    def preparations(self) -> Iterator[tuple[Path, list[str]]]:
        """Yields each folder of data and the command that makes it; no words where the user brings the data."""
        for recipe in {stage.recipe.data: stage.recipe for stage in self.experiment.stages}.values():
            words: list[str] = []
            if recipe.prepare and self.choice.scale == "cpu":
                flags = parse_flags(recipe.flags) | parse_flags(recipe.scales["cpu"].flags) | self.choice.flags
                values = {flag: " ".join(value) for flag, value in flags.items()}
                words = ["mhmoe", "prepare", *(word.format_map(values) for word in recipe.prepare.split())]
                words += ["--dest", str(self.data_of(recipe))]
            yield self.data_of(recipe), words
        for command in self.experiment.needs:
            words = ["mhmoe", "prepare", *command.split()]
            yield Path(words[-1]), words

    def following(self) -> Iterator[list[str]]:
        """Yields the commands after the trainings, the report's last; ``UserError`` if one lacks ``--xnli``."""
        experiment, folders = self.experiment, [run.folder for run in self.runs()]
        lists = {
            "{runs}": [str(folder) for folder in folders],
            "{checkpoints}": [str(path) for folder in folders for path in _kept_checkpoints(folder)],
        }
        for command in experiment.after:
            if "{xnli}" in command and self.xnli is None:
                raise UserError(f"--xnli must be the folder of your copy of XNLI for {experiment.name}")
            data = self.data_of(experiment.stages[0].recipe) if experiment.stages else ""
            fields = {"data": data, "out": self.out, "xnli": self.xnli}
            words: list[str] = []
            for word in command.split():
                words += lists[word] if word in lists else [word.format_map(fields)]
            words += ["--cpu"] if words[1] in _COMPUTE and self.choice.on_cpu else []
            yield _without_plots(words) if words[1] == "analyze" else words
        if experiment.stages and (experiment.paper is not None or not experiment.after):  # else those say all
            words = ["mhmoe", "report", *lists["{runs}"], "--out", str(self.out / experiment.report)]
            words += [] if experiment.paper is None else ["--paper", experiment.name]
            words += ["--reference", experiment.reference] if experiment.reference in self.names() else []
            yield _without_plots(words)


def read_search(folder: Path) -> dict[str, Any]:
    """Returns what a search of learning rates found, of the runs, or kept results, in a folder; nothing before one."""
    found = read_json(folder / SEARCH) if (folder / SEARCH).is_file() else {}
    if not isinstance(found, dict) or not all(isinstance(of, dict) for of in found.values()):
        raise UserError(f"{folder / SEARCH} is not of mhmoe reproduce: take another folder, or delete it")
    return found


def chosen_lr(losses: Mapping[str, float | None], margin: float = 0.0) -> str | None:
    """Returns the smallest learning rate whose loss is within a margin of the best's; None if no loss is finite."""
    finite = {lr: loss for lr, loss in losses.items() if loss is not None}
    near = [lr for lr, loss in finite.items() if loss <= min(finite.values()) + margin]
    return min(near, key=float, default=None)


def further_lr(losses: Mapping[str, float | None]) -> str | None:
    """Returns the next learning rate beyond the best, in the step that led there; None if the best has neighbours."""
    tried, best = sorted(losses, key=float), chosen_lr(losses)
    if best is None or best not in (tried[0], tried[-1]):
        return None
    beside = tried[1] if best == tried[0] else tried[-2]
    mantissa, exponent = f"{float(best) ** 2 / float(beside):.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _without_plots(words: list[str]) -> list[str]:
    """The command, with a flag where there is nothing to draw with."""
    return words if find_spec("matplotlib") else [*words, "--no-plots"]


def with_starts(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Yields the runs, and before them what they start from and is not there yet; that is trained, not evaluated."""
    starts = {
        start.folder: replace(start, splits=())
        for run in runs if run.starts and run.state() not in ("trained", "finished")
        for start in run.starts if not start.is_start()
    }  # fmt: skip
    earlier = {start.folder for of in starts.values() for start in of.starts}
    if together := [start for folder, start in starts.items() if folder not in earlier]:
        yield from with_starts(together)
    yield list(runs)


def _kept_checkpoints(folder: Path) -> Sequence[Path]:
    """Those of a training in the order of updates; before it a pattern, for a dry run."""
    found = sorted(folder.glob("checkpoint_*_*.pt"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))
    return found or [folder / "checkpoint_*_*.pt"]
