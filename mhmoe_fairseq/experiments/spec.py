"""What an experiment consists of: models, recipes (the settings of a training at two scales), stages, a paper's values.

Everything here is data and what turns it into words of ``fairseq-train``; nothing is run. Flags are written as on a
command line and merged as there: of a flag that is given twice the last counts.
"""

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..analysis.reports import PaperTable
from ..common.errors import UserError

PACKAGE = Path(__file__).resolve().parent.parent
Flags = dict[str, tuple[str, ...]]


def parse_flags(text: str | Sequence[str]) -> Flags:
    """Returns each flag of a command line with its words, none for a switch.

    Raises:
        UserError: the first word is no flag.
    """
    flags: Flags = {}
    flag = ""
    for word in shlex.split(text) if isinstance(text, str) else text:
        if word.startswith("--"):
            flag, *value = word.split("=", 1)
            flags[flag] = tuple(value)
        elif not flag:
            raise UserError(f"-- {word}: must begin with a flag of fairseq-train, such as --lr")
        else:
            flags[flag] += (word,)
    return flags


@dataclass(frozen=True)
class Machine:
    """What belongs to a scale whatever is trained.

    Attributes:
        size: last word of the architectures' names.
        nproc: processes on a machine; more than one are connected by torchrun over ``backend``.
    """

    size: str
    nproc: int
    backend: str
    flags: str


MACHINES = {
    "cpu": Machine("tiny", 1, "gloo", "--cpu --clip-norm 1.0"),
    "paper": Machine("base", 8, "nccl", "--mhmoe-precision bf16"),
}


@dataclass(frozen=True)
class Scale:
    """A recipe's settings at one scale.

    Attributes:
        updates: of one training.
        samples: of one update, however many processes share it.
        flags: of ``fairseq-train``.
        batch: samples per process and step; None: all of the process's share of an update.
        validations: how often a training is validated and saved.
        warmup: updates; None: a tenth, of long trainings 10,000.
    """

    updates: int
    samples: int
    flags: str = ""
    batch: int | None = None
    validations: int = 4
    warmup: int | None = None


@dataclass(frozen=True)
class Recipe:
    """How one kind of model is trained, the same for every model of a comparison.

    Attributes:
        name: folder of its runs below the experiment's; empty for the training that others start from.
        family: ``lm`` or ``beit3``, second word of the architectures' names.
        data: default folder of the prepared data.
        prepare: words of ``mhmoe prepare`` that make it at CPU scale, with flags' values as ``{--img-size}``; empty
            where the user brings the data.
        start: by scale, the recipe whose checkpoints a training starts from.
        data_flags: flags that depend on the data, from its folder.
        evaluate: further words of ``mhmoe evaluate``; ``{predictions}`` is a file for them.
    """

    name: str
    family: str
    flags: str
    scales: Mapping[str, Scale]
    data: str
    prepare: str = ""
    start: "Mapping[str, Recipe]" = field(default_factory=dict)
    data_flags: Callable[[Path], str] | None = None
    evaluate: str = ""

    def variant(self, name: str, flags: str, scales: Mapping[str, Scale], **changes: Any) -> "Recipe":
        """Returns a recipe with further flags, which win over this one's, and scales of its own."""
        return dataclasses.replace(self, name=name, flags=f"{self.flags} {flags}", scales=scales, **changes)


@dataclass(frozen=True)
class Model:
    """One row of a table: the architecture's kind (``dense``, ``smoe``, ``xmoe``, ``mhmoe``) and flags of the model."""

    kind: str
    flags: str = ""
    paper_flags: str = ""


@dataclass(frozen=True)
class Stage:
    """Trainings by one recipe of those of an experiment's models whose names match one of ``models``."""

    recipe: Recipe
    models: tuple[str, ...] = ("*",)

    def choose(self, names: Sequence[str]) -> list[str]:
        """Returns the names that match, in their order."""
        return [name for name in names if any(fnmatch(name, pattern) for pattern in self.models)]


@dataclass(frozen=True)
class Experiment:
    """A table, a figure or a study: what is trained, evaluated and reported together.

    Attributes:
        folder: default folder of the runs below ``outputs``; experiments of one folder share their runs.
        stages: trainings, one after the other.
        models: names; of ``parts`` at CPU scale, where they take the place of theirs.
        paper_models: names at paper scale, where they are others.
        seeds: of the trainings; the first is the search's.
        lrs: learning rates of a search for every model; empty: the recipe's.
        search_updates: updates of one training of the search.
        updates, validations: other than the recipes'.
        after: commands that follow, with ``{runs}``, ``{checkpoints}``, ``{data}``, ``{out}`` and ``{xnli}`` filled in.
        paper: the paper's own values of this experiment, the report's last table.
        reference: the model that the report compares the others with.
        parts: names of experiments that are all of this one.
    """

    name: str
    summary: str
    folder: str
    stages: tuple[Stage, ...] = ()
    models: tuple[str, ...] = ()
    paper_models: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (1,)
    lrs: tuple[str, ...] = ()
    search_updates: int = 100
    updates: int | None = None
    validations: int | None = None
    after: tuple[str, ...] = ()
    paper: PaperTable | None = None
    reference: str | None = None
    parts: tuple[str, ...] = ()

    @property
    def report(self) -> str:
        """Name of the report's file; of experiments that share a folder each has its own."""
        return "report.md" if self.folder == self.name else f"{self.name}.md"

    @property
    def has_report(self) -> bool:
        """Whether there is one: not where the following commands say all."""
        return bool(self.stages) and (self.paper is not None or not self.after)


@dataclass(frozen=True)
class Processes:
    """The processes that share a training: ``nproc`` on each of ``nodes`` machines."""

    nproc: int = 1
    nodes: int = 1
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int = 29500

    def __post_init__(self) -> None:
        if self.nodes == 1:
            return
        if self.node_rank is None or not 0 <= self.node_rank < self.nodes:
            raise UserError(f"--node-rank ({self.node_rank}) must be this machine's number, 0 to {self.nodes - 1}")
        if not self.master_addr:
            raise UserError(f"--master-addr must be the name of machine 0 when --nnodes is {self.nodes}")

    @property
    def is_first(self) -> bool:
        """Whether this machine opens folders, evaluates and reports."""
        return not self.node_rank

    def launcher(self) -> list[str]:
        """Returns the words that start ``fairseq-train``."""
        if self.nproc * self.nodes == 1:
            return ["fairseq-train"]
        meeting = ["--standalone"]
        if self.nodes > 1:
            meeting = ["--nnodes", str(self.nodes), "--node_rank", str(self.node_rank)]
            meeting += ["--master_addr", str(self.master_addr), "--master_port", str(self.master_port)]
        return ["torchrun", *meeting, "--nproc_per_node", str(self.nproc), "-m", "fairseq_cli.train"]

    def share(self, samples: int, batch: int | None, backend: str) -> Flags:
        """Returns the flags that share an update of ``samples`` out, the same update for any number of processes.

        Raises:
            UserError: the processes and their batch do not divide it.
        """
        processes = self.nproc * self.nodes
        if samples % (processes * (batch or 1)):
            raise UserError(
                f"--nproc ({self.nproc}) x --nnodes ({self.nodes}) x --batch ({batch or 1}) must divide {samples}, the "
                "samples of an update"
            )
        own = batch or samples // processes
        flags = parse_flags(f"--batch-size {own} --update-freq {samples // (processes * own)}")
        if processes == 1:
            return flags | parse_flags("--distributed-world-size 1")  # not one process for each GPU, fairseq's default
        return flags | parse_flags(f"--ddp-backend legacy_ddp --distributed-backend {backend}")


@dataclass(frozen=True)
class Choice:
    """What the user chooses for all trainings; None: the recipe's.

    Attributes:
        flags: further flags of ``fairseq-train``, which win over the recipe's and the model's.
    """

    scale: str = "cpu"
    size: str | None = None
    updates: int | None = None
    validations: int | None = None
    batch: int | None = None
    processes: Processes = Processes()
    flags: Flags = field(default_factory=dict)


def training_command(
    recipe: Recipe, model: Model, choice: Choice, data: Path, folder: Path, more: Flags, alone: bool = False
) -> list[str]:
    """Returns the words of one training.

    Args:
        folder: gets checkpoints and log.
        more: such as ``--seed``; the user's flags win over them.
        alone: in one process, however many it is shared by: what a run is told from another by.
    """
    machine, scale = MACHINES[choice.scale], recipe.scales[choice.scale]
    processes = Processes() if alone else choice.processes
    updates = choice.updates or scale.updates
    interval = -(-updates // (choice.validations or scale.validations))
    warmup = scale.warmup or (updates // 10 if updates < 25_000 else 10_000)
    of_data = "" if recipe.data_flags is None else recipe.data_flags(data)
    flags = {
        "--arch": (f"{model.kind}_{recipe.family}_{choice.size or machine.size}",),
        **parse_flags(f"{machine.flags} {recipe.flags} {scale.flags} {of_data}"),
        **parse_flags(f"--warmup-updates {warmup} --max-update {updates} --log-interval {-(-interval // 5)}"),
        **parse_flags(f"--validate-interval-updates {interval} --save-interval-updates {interval}"),
        **parse_flags(f"{model.flags} {model.paper_flags if choice.scale == 'paper' else ''}"),
        **processes.share(scale.samples, choice.batch or scale.batch, machine.backend),
        **more,
        **choice.flags,
        "--save-dir": (str(folder),),
        "--log-file": (str(folder / "train.log"),),
    }
    if "polynomial_decay" in flags["--lr-scheduler"]:
        flags.setdefault("--total-num-update", flags["--max-update"])
    words = [word for flag, value in flags.items() for word in (flag, *value)]
    return [*processes.launcher(), str(data), "--user-dir", str(PACKAGE), *words]
