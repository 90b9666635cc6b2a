"""The runs of an experiment: which trainings, in which folders, by which commands, and how far they are."""

import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..analysis.reports.runs import BEFORE
from ..common.errors import UserError
from ..common.files import read_json, sha256_of, write_json
from ..evaluation.records import read_record, record_file
from .branches import MIXED, in_parts, mixing
from .models import MODELS
from .spec import MACHINES, Experiment, Flags, Recipe, Scale, Stage, parse_flags

SPLITS = ("valid", "test")
PACKAGE = Path(__file__).resolve().parent.parent
STATE = "run.json"
SEARCH = "search.json"  # what a search of learning rates found, in the folder of the runs


@dataclass(frozen=True)
class Choice:
    """What the user chooses for all trainings; None: the recipe's.

    Attributes:
        batch: samples per process and step.
        nproc: processes on each of ``nnodes`` machines, which share a training.
        node_rank: this machine's number; machine 0 is reached at ``master_addr`` and ``master_port``.
        flags: further flags of ``fairseq-train``, which win over the recipe's and the model's.
    """

    scale: str = "cpu"
    size: str | None = None
    batch: int | None = None
    nproc: int = 1
    nnodes: int = 1
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int = 29500
    flags: Flags = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.nnodes > 1 and (self.node_rank is None or not 0 <= self.node_rank < self.nnodes):
            raise UserError(f"--node-rank ({self.node_rank}) must be this machine's number, 0 to {self.nnodes - 1}")
        if self.nnodes > 1 and not self.master_addr:
            raise UserError(f"--master-addr must be the name of machine 0 when --nnodes is {self.nnodes}")

    @property
    def is_first(self) -> bool:
        """Whether this machine opens folders, evaluates and reports."""
        return not self.node_rank

    def launcher(self) -> list[str]:
        """Returns the words that start ``fairseq-train``."""
        if self.nproc * self.nnodes == 1:
            return ["fairseq-train"]
        meeting = ["--standalone"]
        if self.nnodes > 1:
            meeting = ["--nnodes", str(self.nnodes), "--node_rank", str(self.node_rank)]
            meeting += ["--master_addr", str(self.master_addr), "--master_port", str(self.master_port)]
        return ["torchrun", *meeting, "--nproc_per_node", str(self.nproc), "-m", "fairseq_cli.train"]

    def share(self, scale: Scale) -> Flags:
        """Returns the flags that share an update out, always the same; ``UserError`` if its samples are not divided."""
        processes, batch = self.nproc * self.nnodes, self.batch or scale.batch
        if scale.samples % (processes * (batch or 1)):
            raise UserError(
                f"--nproc ({self.nproc}) x --nnodes ({self.nnodes}) x --batch ({batch or 1}) must divide "
                f"{scale.samples}, the samples of an update"
            )
        own = batch or scale.samples // processes
        flags = parse_flags(f"--batch-size {own} --update-freq {scale.samples // (processes * own)}")
        if processes == 1:
            return flags | parse_flags("--distributed-world-size 1")  # not one process for each GPU, fairseq's default
        backend = MACHINES[self.scale].backend
        return flags | parse_flags(f"--ddp-backend legacy_ddp --distributed-backend {backend}")


@dataclass(frozen=True)
class Run:
    """One training of one model with one seed, and its evaluations.

    Attributes:
        name: of the folder, below the experiment's.
        validations: how often it is validated and saved.
        start: the run whose best checkpoint it starts from.
        branches: runs that are mixed with the start, from which they were trained: it starts from the mix.
        is_part: whether it is trained for another run, as the same command says.
        splits: that are evaluated; none of a search's runs and of parts.
    """

    name: str
    folder: Path
    recipe: Recipe
    model: str
    seed: int
    data: Path
    choice: Choice
    updates: int
    validations: int
    lr: str | None = None
    start: "Run | None" = None
    branches: "tuple[Run, ...]" = ()
    is_part: bool = False
    splits: tuple[str, ...] = SPLITS

    @property
    def checkpoint(self) -> Path:
        """The best one on the validation split."""
        return self.folder / "checkpoint_best.pt"

    @property
    def starts(self) -> "tuple[Run, ...]":
        """What has to be trained before."""
        return self.branches if self.start is None else (self.start, *self.branches)

    @property
    def parts(self) -> "tuple[Run, ...]":
        """Those of :attr:`starts` that are trained for this run."""
        return tuple(start for start in self.starts if start.is_part)

    def first_checkpoint(self) -> Path | None:
        """The one that it starts from."""
        mixed = self.folder / MIXED if self.branches else None
        return mixed or (None if self.start is None else self.start.checkpoint)

    def commands(self) -> list[list[str]]:
        """Returns the words of all that is done for it from its start on: what mixes the branches, and the training."""
        return [*([mixing(self)] if self.branches else []), self.training()]

    def training(self, alone: bool = False) -> list[str]:
        """Returns the words of the training; ``alone``: in one process, however many it is shared by."""
        choice = replace(self.choice, nproc=1, nnodes=1) if alone else self.choice
        machine, scale, model = MACHINES[choice.scale], self.recipe.scales[choice.scale], MODELS[self.model]
        interval = -(-self.updates // self.validations)
        warmup = scale.warmup or (self.updates // 10 if self.updates < 25_000 else 10_000)
        of_data = "" if self.recipe.data_flags is None else self.recipe.data_flags(self.data)
        start = self.first_checkpoint()
        own = {"--seed": str(self.seed), "--lr": self.lr, "--finetune-from-model": start and str(start)}
        flags = {
            "--arch": (f"{model.kind}_{self.recipe.family}_{choice.size or machine.size}",),
            **parse_flags(f"{machine.flags} {self.recipe.flags} {scale.flags} {of_data}"),
            **parse_flags(f"--warmup-updates {warmup} --max-update {self.updates} --log-interval {-(-interval // 5)}"),
            **parse_flags(f"--validate-interval-updates {interval} --save-interval-updates {interval}"),
            **parse_flags(f"{model.flags} {model.paper_flags if choice.scale == 'paper' else ''}"),
            **choice.share(scale),
            **{flag: (value,) for flag, value in own.items() if value is not None},
            **choice.flags,
            "--save-dir": (str(self.folder),),
            "--log-file": (str(self.folder / "train.log"),),
        }
        if "polynomial_decay" in flags["--lr-scheduler"]:
            flags.setdefault("--total-num-update", flags["--max-update"])
        words = [word for flag, value in flags.items() for word in (flag, *value)]
        return [*choice.launcher(), str(self.data), "--user-dir", str(PACKAGE), *words]

    def evaluations(self, splits: Sequence[str]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
        """Yields splits that are evaluated together, and the words of the evaluation that writes their records.

        Predictions are a file of each split, so that each has an evaluation of its own.
        """
        one_by_one = "{predictions}" in self.recipe.evaluate
        for together in [(split,) for split in splits] if one_by_one else [tuple(splits)] if splits else []:
            words = ["mhmoe", "evaluate", str(self.checkpoint), "--data", str(self.data)]
            words += [word for split in together for word in ("--split", split)]
            predictions = str(self.folder / f"predictions-{together[0]}.txt")
            words += [word.format(predictions=predictions) for word in self.recipe.evaluate.split()]
            yield together, [*words, *(["--cpu"] if self.choice.scale == "cpu" else [])]

    def record(self, split: str) -> Path:
        """The file of a split's results."""
        return record_file(self.folder, split)

    def lacking(self) -> list[str]:
        """Returns the splits without a whole record: half a file is none."""

        def is_whole(split: str) -> bool:
            try:
                return read_record(self.record(split)).split == split
            except UserError:
                return False

        return [split for split in self.splits if not is_whole(split)]

    def identity(self) -> dict[str, Any]:
        """Returns what a run is told from another by: the command for one process, the data and the start."""
        manifest = self.data / "manifest.json"
        words = self.training(alone=True)
        user_dir = words.index("--user-dir")  # where this package lies does not matter
        return {
            "command": words[:user_dir] + words[user_dir + 2 :],
            "data": sha256_of(manifest) if manifest.is_file() else None,
            "start": None if self.start is None else self.start.fingerprint(),
            **({"branches": [branch.fingerprint() for branch in self.branches]} if self.branches else {}),
        }

    def fingerprint(self) -> str | None:
        """Returns what others that start from it know it by: its checkpoint, of a part how it is trained."""
        if self.is_part:
            return hashlib.sha256(json.dumps(self.identity()).encode()).hexdigest()
        return sha256_of(self.checkpoint) if self.checkpoint.is_file() else None

    def keep(self, finished: bool) -> None:
        """Writes what :meth:`state` reads, what was spent before, and for people the commands of all that it takes."""
        write_json(self.folder / STATE, {**self.identity(), "finished": finished})
        if self.parts:
            write_json(self.folder / BEFORE, {part.name.split("/")[-2]: part.updates for part in self.parts})
        commands = [words for run in (*self.parts, self) for words in run.commands()]
        text = "\n".join(["#!/usr/bin/env bash", *map(shlex.join, commands), ""])
        (self.folder / "command.sh").write_text(text, encoding="utf-8")

    def state(self) -> str:
        """Returns ``missing``, ``changed``, ``cut off``, ``trained`` or, evaluated too, ``finished``.

        A folder with checkpoints of something else is a ``UserError``.
        """
        if not (self.folder / STATE).is_file():
            if any(self.folder.glob("*.pt")):
                raise UserError(
                    f"{self.folder} holds checkpoints, but no {STATE} of mhmoe reproduce: take another --out"
                )
            return "missing"
        kept = read_json(self.folder / STATE)
        is_finished = kept.pop("finished")
        if kept != self.identity():
            return "changed"
        if not is_finished:
            return "cut off"
        return "trained" if self.lacking() else "finished"

    def is_start(self) -> bool:
        """Whether others can start from it: finished, unless it is a part with whatever settings or by other means."""
        if self.is_part:
            return self.state() == "finished" and self.checkpoint.is_file()
        kept = read_json(self.folder / STATE) if (self.folder / STATE).is_file() else {"finished": True}
        return kept["finished"] and self.checkpoint.is_file()


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
            run = replace(run, name=name, folder=self.out / name, updates=shorter, validations=1, lr=search, splits=())
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
        return self.experiment.seeds or recipe.scales[self.choice.scale].seeds

    def best_lr(self, recipe: Recipe, model: str) -> str | None:
        """Returns what the search found, now or earlier, if it is still one to choose from; None before a search."""
        file = self.out / SEARCH
        found = self.best_lrs or (read_json(file)["best_lr"] if file.is_file() else {})
        best = found.get(recipe.name_of(model))
        return best if best in self.lrs_of(recipe) else None

    def lrs_of(self, recipe: Recipe) -> tuple[str, ...]:
        """Returns the learning rates to choose from: the experiment's or the recipe's; none if ``--lr`` was given."""
        return () if "--lr" in self.choice.flags else self.experiment.lrs or recipe.scales[self.choice.scale].lrs

    def search(self) -> list[Run]:
        """Returns the search's runs, for each model and learning rate one; several kinds of training: ``UserError``."""
        lrs = self.experiment.lrs
        if len(lrs) > 1 and len(self.experiment.stages) > 1:
            raise UserError(
                f"--lrs ({' '.join(lrs)}) must be one value where several kinds of trainings follow each other"
            )
        first = [run for run in self.runs() if run.seed == self.seeds_of(run.recipe)[0]]
        lrs_of = [(run, self.lrs_of(run.recipe)) for run in first]
        return [
            self.run(run.recipe, run.model, run.seed, search=lr)
            for run, of_run in lrs_of if len(of_run) > 1 for lr in of_run
        ]  # fmt: skip

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
            yield _without_plots(words) if words[1] == "analyze" else words
        if experiment.stages and (experiment.paper is not None or not experiment.after):  # else those say all
            words = ["mhmoe", "report", *lists["{runs}"], "--out", str(self.out / experiment.report)]
            words += [] if experiment.paper is None else ["--paper", experiment.name]
            words += ["--reference", experiment.reference] if experiment.reference in self.names() else []
            yield _without_plots(words)


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
