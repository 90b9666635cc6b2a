"""What an optimizer has to know of a parameter besides its values.

fairseq gives optimizers bare parameters. ``param_group`` is the only attribute besides ``expert`` that both fairseq
versions hand on to the fp32 copies that ``FP16Optimizer`` steps on. Its own reader is the composite optimizer, which
is refused wherever notes are taken.
"""

from typing import Any, NamedTuple

from torch import nn

from ..parallel import ShardedParameter


class ParameterNotes(NamedTuple):
    """What the parameter is a part of, if experts are shared out over ranks, and the factor of its learning rate."""

    shard: ShardedParameter | None = None
    lr_scale: float = 1.0


def notes_of(parameter: nn.Parameter) -> ParameterNotes:
    """A parameter's notes, empty ones if it has none."""
    notes = getattr(parameter, "param_group", None)
    return notes if isinstance(notes, ParameterNotes) else ParameterNotes()


def take_note(parameter: nn.Parameter, **changes: Any) -> None:
    """Change some of a parameter's notes."""
    parameter.param_group = notes_of(parameter)._replace(**changes)  # type: ignore[attr-defined]
