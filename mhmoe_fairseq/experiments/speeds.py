"""How long trainings take on this machine, by what those before them took."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from ..analysis.reports.runs import read_training_log
from ..common.errors import UserError
from ..common.files import read_json
from .run import STATE, Run
from .spec import Flags, flags_of

HOURS = (
    "hours: of the trainings still to do, one at a time, by the median seconds per sample of trainings in outputs/ "
    "and results/: of the same model, else of its architecture, else of any of its size; ?: none of its task and size"
)

_SIZES = ("--task", "--tokens-per-sample", "--img-size", "--decoder-embed-dim", "--cpu")


def _kind(flags: Flags) -> tuple[object, ...]:
    """What a training's speed depends on beside its model: family and size, task, how long a sample is, device."""
    _, family = _split(flags)
    return family, *(flags.get(name) for name in _SIZES)


def _split(flags: Flags) -> tuple[str, str]:
    """``mhmoe`` and ``lm_tiny`` of an architecture's name."""
    kind, _, family = flags["--arch"][0].partition("_")
    return kind, family


def samples_of(flags: Flags) -> int:
    """Samples of an update in one process."""
    return int(flags["--batch-size"][0]) * int(flags.get("--update-freq", ("1",))[0])


@dataclass
class Speeds:
    """Seconds that a sample took in trainings of this machine: by kind of training, then by architecture and model."""

    seconds: dict[tuple[object, ...], dict[tuple[str, str], list[float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, *trees: Path) -> "Speeds":
        """Returns the speeds that the logs below some folders tell."""
        found = cls()
        for state in (path for tree in trees if tree.is_dir() for path in sorted(tree.rglob(STATE))):
            try:
                log, flags = read_training_log(state.parent / "train.log"), flags_of(read_json(state)["command"])
                speed, tokens = log.tokens_per_second(), log.tokens()
                if speed and tokens:
                    of_sample = tokens / log.num_updates / speed / samples_of(flags)
                    by_model = found.seconds.setdefault(_kind(flags), {})
                    by_model.setdefault((_split(flags)[0], state.parent.parent.name), []).append(of_sample)
            except (UserError, KeyError, ValueError, TypeError):
                continue  # begun, or of another time
        return found

    def hours(self, run: Run) -> float | None:
        """Returns the time of a run's training by the rule of :data:`HOURS`; None where nothing like it was trained."""
        flags = flags_of(run.training(alone=True))
        by_model, kind = self.seconds.get(_kind(flags), {}), _split(flags)[0]
        alike = [of for (name, _), several in by_model.items() if name == kind for of in several]
        known = by_model.get((kind, run.model)) or alike or [of for several in by_model.values() for of in several]
        return run.updates * samples_of(flags) * statistics.median(known) / 3600 if known else None
