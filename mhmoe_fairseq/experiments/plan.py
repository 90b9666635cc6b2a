"""The runs of an experiment: which trainings, in which folders, by which commands, and how far they are."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.files import read_json, sha256_of, write_json
from .models import MODELS
from .spec import Choice, Experiment, Flags, Recipe, Stage, parse_flags, training_command

SPLITS = ("valid", "test")
BEST = "checkpoint_best.pt"
STATE = "run.json"


@dataclass(frozen=True)
class Run:
    """One training of one model with one seed, and its evaluations.

    Attributes:
        name: of the folder, below the experiment's.
        start: the run whose best checkpoint it starts from.
        splits: that are evaluated; none of a search's runs.
    """

    name: str
    folder: Path
    recipe: Recipe
    model: str
    seed: int
    data: Path
    choice: Choice
    lr: str | None = None
    start: "Run | None" = None
    splits: tuple[str, ...] = SPLITS

    @property
    def updates(self) -> int:
        """Updates of the training."""
        return self.choice.updates or self.recipe.scales[self.choice.scale].updates

    @property
    def checkpoint(self) -> Path:
        """The best one on the validation split."""
        return self.folder / BEST

    def training(self, alone: bool = False) -> list[str]:
        """Returns the words of the training; ``alone``: in one process."""
        more: Flags = {"--seed": (str(self.seed),)}
        if self.lr is not None:
            more["--lr"] = (self.lr,)
        if self.start is not None:
            more["--finetune-from-model"] = (str(self.start.checkpoint),)
        model = MODELS[self.model]
        return training_command(self.recipe, model, self.choice, self.data, self.folder, more, alone)

    def evaluation(self, split: str) -> list[str]:
        """Returns the words of the evaluation that writes :meth:`record`."""
        words = ["mhmoe", "evaluate", str(self.checkpoint), "--data", str(self.data), "--split", split]
        predictions = str(self.folder / f"predictions-{split}.txt")
        words += [word.format(predictions=predictions) for word in self.recipe.evaluate.split()]
        return [*words, *(["--cpu"] if self.choice.scale == "cpu" else [])]

    def record(self, split: str) -> Path:
        """The file of a split's results."""
        return self.folder / f"record-{split}.json"

    def identity(self) -> dict[str, Any]:
        """Returns what a run is told from another by: the command for one process, the data and the start."""
        manifest = self.data / "manifest.json"
        words = self.training(alone=True)
        user_dir = words.index("--user-dir")  # where this package lies does not matter
        return {
            "command": words[:user_dir] + words[user_dir + 2 :],
            "data": sha256_of(manifest) if manifest.is_file() else None,
            "start": sha256_of(self.start.checkpoint) if self.start and self.start.checkpoint.is_file() else None,
        }

    def kept(self) -> dict[str, Any] | None:
        """Returns the identity that the folder holds, and whether its training is ``finished``; None of a new folder.

        Raises:
            UserError: the folder holds something else.
        """
        if (self.folder / STATE).is_file():
            return read_json(self.folder / STATE)
        if self.folder.is_dir() and any(path.suffix == ".pt" for path in self.folder.iterdir()):
            raise UserError(f"{self.folder} holds checkpoints, but no {STATE} of mhmoe reproduce: take another --out")
        return None

    def keep(self, finished: bool) -> None:
        """Writes what :meth:`kept` reads, and the command for people."""
        write_json(self.folder / STATE, {**self.identity(), "finished": finished})
        command = f"#!/usr/bin/env bash\n{shlex.join(self.training())}\n"
        (self.folder / "command.sh").write_text(command, encoding="utf-8")

    def state(self) -> str:
        """Returns ``missing``, ``changed``, ``cut off``, ``trained`` or, evaluated too, ``finished``."""
        kept = self.kept()
        if kept is None:
            return "missing"
        is_finished = kept.pop("finished")
        if kept != self.identity():
            return "changed"
        if not is_finished:
            return "cut off"
        return "finished" if all(self.record(split).is_file() for split in self.splits) else "trained"

    def is_start(self) -> bool:
        """Whether others can start from it: finished, with whatever settings, or trained by other means."""
        kept = read_json(self.folder / STATE) if (self.folder / STATE).is_file() else {"finished": True}
        return kept["finished"] and self.checkpoint.is_file()


@dataclass(frozen=True)
class Plan:
    """An experiment with what the user chose.

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
    seeds: tuple[int, ...] = ()
    lrs: tuple[str, ...] = ()
    search_updates: int | None = None
    start: Recipe | None = None
    xnli: str | None = None
    best_lrs: dict[str, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Returns the models' names.

        Raises:
            UserError: a name or pattern fits no model.
        """
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

    def runs(self, stage: Stage) -> list[Run]:
        """Returns a stage's runs, all models of a seed before the next seed."""
        seeds = self.seeds or self.experiment.seeds
        return [self.run(stage.recipe, model, seed) for seed in seeds for model in stage.choose(self.names())]

    def run(self, recipe: Recipe, model: str, seed: int) -> Run:
        """Returns one run, and with it those that it starts from."""
        name = "/".join(filter(None, (recipe.name, model, f"seed-{seed}")))
        first = self.start_of(recipe)
        start = None if first is None else self.run(first, model, seed)
        lr = self.best_lrs.get(model, self.lrs[0] if len(self.lrs) == 1 else None) if self.is_own(recipe) else None
        return Run(name, self.out / name, recipe, model, seed, self.data_of(recipe), self.choice, lr, start)

    def start_of(self, recipe: Recipe) -> Recipe | None:
        """Returns the recipe whose runs a recipe's start from.

        Raises:
            UserError: it would be the recipe itself.
        """
        start = recipe.start.get(self.choice.scale)
        if start is None or self.start is None or not self.is_own(recipe):
            return start
        if self.start == recipe:
            raise UserError(f"--start ({recipe.name}) must not be what is trained itself")
        return self.start

    def search(self) -> dict[str, dict[str, Run]]:
        """Returns the search's runs by model and learning rate; empty where nothing is searched.

        Raises:
            UserError: the experiment has several kinds of trainings.
        """
        lrs = self.lrs or self.experiment.lrs
        if len(lrs) > 1 and len(self.experiment.stages) > 1:
            raise UserError(
                f"--lrs ({' '.join(lrs)}) must be one value where several kinds of trainings follow each other"
            )
        choice = replace(self.choice, updates=self.search_updates or self.experiment.search_updates)
        seed = (self.seeds or self.experiment.seeds)[0]
        runs: dict[str, dict[str, Run]] = {}
        for stage in self.experiment.stages if len(lrs) > 1 else ():
            for model in stage.choose(self.names()):
                for lr in lrs:
                    run = self.run(stage.recipe, model, seed)
                    name = "search/" + run.name.replace(f"seed-{seed}", f"lr-{lr}")
                    searched = replace(run, name=name, folder=self.out / name, choice=choice, lr=lr, splits=())
                    runs.setdefault(model, {})[lr] = searched
        return runs

    def preparations(self) -> Iterator[tuple[Path, list[str]]]:
        """Yields each folder of data and the command that makes it; no words where the user brings the data."""
        recipes = [stage.recipe for stage in self.experiment.stages]
        for recipe in {recipe.data: recipe for recipe in recipes}.values():
            words: list[str] = []
            if recipe.prepare and self.choice.scale == "cpu":
                flags = parse_flags(recipe.flags) | parse_flags(recipe.scales["cpu"].flags) | self.choice.flags
                values = {flag: " ".join(value) for flag, value in flags.items()}
                words = ["mhmoe", "prepare", *(word.format_map(values) for word in recipe.prepare.split())]
                words += ["--dest", str(self.data_of(recipe))]
            yield self.data_of(recipe), words

    def following(self) -> Iterator[list[str]]:
        """Yields the commands after the trainings.

        Raises:
            UserError: one needs ``--xnli``, which was not given.
        """
        runs = [run for stage in self.experiment.stages for run in self.runs(stage)]
        lists = {
            "{runs}": [str(run.folder) for run in runs],
            "{checkpoints}": [str(path) for run in runs for path in _kept_checkpoints(run.folder)],
        }
        for command in self.experiment.after:
            if "{xnli}" in command and self.xnli is None:
                raise UserError(f"--xnli must be the folder of your copy of XNLI for {self.experiment.name}")
            data = self.data_of(self.experiment.stages[0].recipe) if self.experiment.stages else ""
            fields = {"data": data, "out": self.out, "xnli": self.xnli}
            words: list[str] = []
            for word in command.split():
                words += lists[word] if word in lists else [word.format_map(fields)]
            yield words

    def reported(self) -> dict[str, list[Path]]:
        """Returns the folders of each model's runs, of all stages."""
        folders: dict[str, list[Path]] = {}
        for stage in self.experiment.stages:
            for run in self.runs(stage):
                folders.setdefault(run.model, []).append(run.folder)
        return folders


def with_starts(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Yields the runs, and before them what they start from and is not there yet; that is trained, not evaluated."""
    starts = {run.start.folder: run.start for run in runs if run.start is not None and not run.start.is_start()}
    if starts:
        yield from with_starts([replace(run, splits=()) for run in starts.values()])
    yield list(runs)


def _kept_checkpoints(folder: Path) -> Sequence[Path]:
    """Those of a training in the order of updates; before it a pattern, for a dry run."""
    found = sorted(folder.glob("checkpoint_*_*.pt"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))
    return found or [folder / "checkpoint_*_*.pt"]
