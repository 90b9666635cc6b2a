"""One training of a model, and its evaluations: in which folder, by which commands, and how far it is."""

import hashlib
import json
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..analysis.reports.runs import BEFORE, read_training_log
from ..common.errors import UserError
from ..common.files import read_json, sha256_of, write_json
from ..common.provenance import commit
from ..evaluation.records import read_record, record_file
from .models import MODELS
from .spec import MACHINES, Flags, Recipe, Scale, parse_flags

SPLITS = ("valid", "test")
PACKAGE = Path(__file__).resolve().parent.parent
STATE = "run.json"
MIXED = "checkpoint_mixed.pt"  # what a run with branches starts from, in its folder


@dataclass(frozen=True)
class Choice:
    """What the user chooses for all trainings; None: the recipe's.

    Attributes:
        device: where models are trained and evaluated.
        batch: samples per process and step.
        nproc: processes on each of ``nnodes`` machines, which share a training.
        node_rank: this machine's number; machine 0 is reached at ``master_addr`` and ``master_port``.
        flags: further flags of ``fairseq-train``, which win over the recipe's and the model's.
    """

    scale: str = "cpu"
    size: str | None = None
    device: str | None = None
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

    @property
    def on_cpu(self) -> bool:
        """Whether models are trained and evaluated without a GPU, even where there is one."""
        return "--cpu" in self.flags or (self.device or MACHINES[self.scale].device) == "cpu"

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
        backend = "gloo" if self.on_cpu else "nccl"
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
        is_trial: whether it is a search's, of a learning rate with which it may diverge.
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
    is_trial: bool = False
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
        return [*([self._mixing()] if self.branches else []), self.training()]

    def _mixing(self) -> list[str]:
        """The words that mix what it starts from; the seed is the last expert."""
        flags = parse_flags(MODELS[self.model].flags) | self.choice.flags
        seed, *branches = (str(start.checkpoint) for start in self.starts)
        words = ["mhmoe", "checkpoint", "mix", "--seed", seed]
        words += [word for branch in branches for word in ("--branch", branch)]
        words += [word for flag in ("--moe-freq", "--moe-top-k") for word in (flag, *flags[flag])]
        words += ["--include-seed", "--router-seed", str(self.seed)]
        return [*words, "--output", str(self.folder / MIXED), "--overwrite"]

    def training(self, alone: bool = False) -> list[str]:
        """Returns the words of the training; ``alone``: in one process, however many it is shared by."""
        choice = replace(self.choice, nproc=1, nnodes=1) if alone else self.choice
        machine, scale, model = MACHINES[choice.scale], self.recipe.scales[choice.scale], MODELS[self.model]
        interval = -(-self.updates // self.validations)
        warmup = scale.warmup or (self.updates // 10 if self.updates < 25_000 else 10_000)
        of_data = "" if self.recipe.data_flags is None else self.recipe.data_flags(self.data)
        start = self.first_checkpoint()
        own = {
            "--seed": str(self.seed),
            "--lr": self.lr,
            "--finetune-from-model": None if start is None else str(start),
        }
        flags = {
            "--arch": (f"{model.kind}_{self.recipe.family}_{choice.size or machine.size}",),
            **parse_flags(
                f"{'--cpu ' if choice.on_cpu else ''}{machine.flags} {self.recipe.flags} {scale.flags} {of_data}"
            ),
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

    def measures(self) -> list[str]:
        """The names of its records: its splits, and ``test-MIXTURE`` of a model that has a ``mixture``."""
        mixture = MODELS[self.model].mixture
        return [*self.splits, *([f"test-{mixture}"] if mixture and "test" in self.splits else [])]

    def evaluations(self, names: Sequence[str]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
        """Yields records that are written together, and the words of the evaluation that writes them.

        Predictions are a file of each split, so that each has an evaluation of its own.
        """
        splits = tuple(name for name in names if name in self.splits)
        one_by_one = "{predictions}" in self.recipe.evaluate
        for together in [(split,) for split in splits] if one_by_one else [splits] if splits else []:
            predictions = str(self.folder / f"predictions-{together[0]}.txt")
            own = [word.format(predictions=predictions) for word in self.recipe.evaluate.split()]
            yield together, self._evaluation(together, own)
        for name in (name for name in names if name not in splits):
            split, _, mixture = name.partition("-")
            yield (name,), self._evaluation([split], ["--domain-mixture", mixture])

    def _evaluation(self, splits: Sequence[str], own: list[str]) -> list[str]:
        words = ["mhmoe", "evaluate", str(self.checkpoint), "--data", str(self.data)]
        words += [word for split in splits for word in ("--split", split)]
        return [*words, *own, *(["--cpu"] if self.choice.on_cpu else [])]

    def record(self, name: str) -> Path:
        """The file of a split's results, or of another of :meth:`measures`."""
        return record_file(self.folder, name)

    def lacking(self) -> list[str]:
        """Returns those of :meth:`measures` without a whole record: half a file is none."""

        def is_whole(name: str) -> bool:
            try:
                return read_record(self.record(name)).split == name.partition("-")[0]
            except UserError:
                return False

        return [name for name in self.measures() if not is_whole(name)]

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

    def keep(self, finished: bool, diverged: bool = False) -> None:
        """Writes what :meth:`state` reads, what was spent before, and for people the commands of all that it takes.

        With them, in ``trained_at``, the commits of the code that it was begun and resumed with.
        """
        before = self._kept().get("trained_at", []) if (self.folder / STATE).is_file() else []
        trained_at = [of for of in dict.fromkeys([*before, commit()]) if of is not None]
        outcome = {"finished": finished, **({"diverged": True} if diverged else {}), "trained_at": trained_at}
        write_json(self.folder / STATE, {**self.identity(), **outcome})
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
        kept, own = self._kept(), self.identity()
        is_finished = kept.pop("finished")
        kept = {name: value for name, value in kept.items() if name not in ("diverged", "trained_at")}
        if self.start is not None and own["start"] is None and not self.is_part:
            own["start"] = kept.get("start")  # nothing is there to compare with
        if kept != own or (is_finished and self.is_part and not self.checkpoint.is_file()):
            return "changed"
        if not is_finished:
            return "cut off"
        return "trained" if self.lacking() else "finished"

    def has_diverged(self) -> bool:
        """Whether a trial's gradients, or those of what it starts from, became no numbers."""
        return (self.folder / STATE).is_file() and bool(self._kept().get("diverged"))

    def final_loss(self) -> float | None:
        """Returns the last validation loss, in bits; None of a training that diverged."""
        loss = math.nan
        if not self.has_diverged():
            loss = read_training_log(self.folder / "train.log").valid[-1]["valid_loss"]
        return loss if math.isfinite(loss) else None

    def is_start(self) -> bool:
        """Whether others can start from it: finished, unless it is a part with whatever settings or by other means.

        ``UserError`` if its checkpoint is gone, but for a part, which is trained again: what was measured of it is not.
        """
        if self.is_part:
            return self.state() == "finished"
        is_finished, is_there = (self.folder / STATE).is_file() and self._kept()["finished"], self.checkpoint.is_file()
        if is_finished and not is_there:
            rule = "others start from it: put it back, or delete the folder to train it again"
            raise UserError(f"{self.checkpoint} is gone, and {rule}")
        return is_there and (is_finished or not (self.folder / STATE).is_file())

    def _kept(self) -> dict[str, Any]:
        """What :meth:`keep` wrote; ``UserError`` for something else."""
        kept = read_json(self.folder / STATE)
        if not isinstance(kept, dict) or "finished" not in kept:
            raise UserError(f"{self.folder / STATE} is not of mhmoe reproduce: take another --out")
        return kept
