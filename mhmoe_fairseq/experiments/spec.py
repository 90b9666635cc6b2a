"""What an experiment consists of: models, recipes (the settings of a training at two scales), stages, a paper's values.

Flags are written as on a command line and merged as there: of a flag that is given twice the last counts.
"""

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..analysis.reports.claims import Claim
from ..analysis.reports.tables import PaperTable
from ..common.errors import UserError

Flags = dict[str, tuple[str, ...]]


def parse_flags(text: str | Sequence[str]) -> Flags:
    """Returns each flag of a command line with its words; ``UserError`` if the first word is no flag."""
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


def flags_of(command: Sequence[str]) -> Flags:
    """Returns the flags behind a command's program and data."""
    return parse_flags(command[next((at for at, word in enumerate(command) if word.startswith("--")), len(command)) :])


@dataclass(frozen=True)
class Machine:
    """What belongs to a scale whatever is trained.

    Attributes:
        size: last word of the architectures' names.
        nproc: processes on a machine; more than one are connected by torchrun.
        device: one of :data:`DEVICES`, where the user chooses none.
    """

    size: str
    nproc: int
    device: str
    flags: str


DEVICES = ("cpu", "cuda")
MACHINES = {
    "cpu": Machine("tiny", 1, "cpu", "--clip-norm 1.0"),
    "paper": Machine("base", 8, "cuda", "--mhmoe-precision bf16"),
}


@dataclass(frozen=True)
class Scale:
    """A recipe's settings at one scale.

    Attributes:
        samples: of one update, however many processes share it.
        batch: samples per process and step; None: all of the process's share of an update.
        validations: how often a training is validated and saved.
        warmup: updates; None: a tenth, of long trainings 10,000.
        seeds: of the trainings; the first is the search's, whichever an experiment or the user has trained.
        lrs: learning rates of a search for every model before its trainings, which goes on beyond them where the best
            is at their edge; empty: no search.
        search_updates: updates of one training of the search.
        search_margin: bits of validation loss; the smallest rate whose loss is within it of the best is taken.
    """

    updates: int
    samples: int
    flags: str = ""
    batch: int | None = None
    validations: int = 4
    warmup: int | None = None
    seeds: tuple[int, ...] = (1,)
    lrs: tuple[str, ...] = ()
    search_updates: int = 100
    search_margin: float = 0.0


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

    def name_of(self, model: str) -> str:
        """Returns the name of a model's runs by this recipe, their folder's below the experiment's."""
        return f"{self.name}/{model}" if self.name else model

    def variant(self, flags: str, scales: Mapping[str, Scale], **changes: Any) -> "Recipe":
        """Returns a recipe with further flags, which win over this one's, and scales of its own."""
        return dataclasses.replace(self, flags=f"{self.flags} {flags}", scales=scales, **changes)

    def at_cpu(self, **changes: Any) -> "Recipe":
        """Returns a recipe whose CPU scale has these fields."""
        scale = dataclasses.replace(self.scales["cpu"], **changes)
        return dataclasses.replace(self, scales={**self.scales, "cpu": scale})


@dataclass(frozen=True)
class Model:
    """One row of a table: the architecture's kind (``dense``, ``smoe``, ``xmoe``, ``mhmoe``) and flags of the model.

    Attributes:
        branches: domains of the text; the training is then Branch-Train-MiX's (:mod:`.branches`).
        mixture: of a model that is told the domain of the text it reads: how it is tested once more, without being told
            (``mhmoe evaluate --domain-mixture``).
    """

    kind: str
    flags: str = ""
    paper_flags: str = ""
    branches: tuple[str, ...] = ()
    mixture: str = ""


@dataclass(frozen=True)
class Stage:
    """Trainings by one recipe of those of an experiment's models whose names match one of ``models``."""

    recipe: Recipe
    models: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class Experiment:
    """A table, a figure or a study: what is trained, evaluated and reported together.

    Attributes:
        folder: default folder of the runs below ``outputs``; experiments of one folder share their runs.
        stages: trainings, one after the other.
        models: names; of ``parts`` at CPU scale, where they take the place of theirs.
        paper_models: names at paper scale, where they are others.
        seeds, lrs, search_updates, updates, validations: other than the recipes'; a search tries these ``lrs`` alone.
        needs: words of ``mhmoe prepare`` for what else ``after`` reads, the folder last.
        after: commands that follow, with ``{runs}``, ``{checkpoints}``, ``{data}``, ``{out}`` and ``{xnli}`` filled in.
        measures: files of ``after`` that are kept: in every run, such as ``record-zero-shot-english.json``,
            or, with a folder, below ``{out}``.
        paper: the paper's own values of this experiment, the report's last table.
        reference: the model that the report compares the others with.
        parts: names of experiments that are all of this one.
        source: where it is from: ``P1 table 5``, ``rebuttal``, ``P2 table 1``, ``ours``.
        claims: what its runs are to show.
        alone: speed is measured, so that nothing may run at the same time.
    """

    name: str
    summary: str
    folder: str
    stages: tuple[Stage, ...] = ()
    models: tuple[str, ...] = ()
    paper_models: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    lrs: tuple[str, ...] = ()
    search_updates: int | None = None
    updates: int | None = None
    validations: int | None = None
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()
    paper: PaperTable | None = None
    reference: str | None = None
    parts: tuple[str, ...] = ()
    source: str = "ours"
    claims: tuple[Claim, ...] = ()
    alone: bool = False

    @property
    def report(self) -> str:
        """Name of the report's file; of experiments that share a folder each has its own."""
        return "report.md" if self.folder == self.name else f"{self.name}.md"
