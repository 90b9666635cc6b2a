"""How a configuration declares its fields: ``Literal``, or ``Annotated`` with a registry or range; and their check."""

import functools
import re
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from ..common.errors import UserError
from ..common.ranges import BELOW_ONE, COUNT, POSITIVE, SIZE

Size = Annotated[int, SIZE]
Count = Annotated[int, COUNT]
Rate = Annotated[float, BELOW_ONE]
Positive = Annotated[float, POSITIVE]


class ConfigError(UserError):
    """A field whose value breaks a rule: ``field (value) rule``.

    Args:
        rule: what the value has to be. Other fields stand in it in braces, for :meth:`message` to call them otherwise.

    >>> error = ConfigError("num_heads", 5, "must divide {embed_dim} (64)")
    >>> str(error)
    'num_heads (5) must divide embed_dim (64)'
    >>> error.message(lambda field: "--" + field)
    '--num_heads (5) must divide --embed_dim (64)'
    """

    def __init__(self, field: str, value: Any, rule: str) -> None:
        super().__init__(field, value, rule)
        self.field, self.value, self.rule = field, value, rule

    def message(self, name_of: Callable[[str], str]) -> str:
        """The error with every field called ``name_of(field)``, such as by its flag."""
        rule = re.sub(r"\{(\w+)\}", lambda match: name_of(match[1]), self.rule)
        return f"{name_of(self.field)} ({self.value!r}) {rule}"

    def __str__(self) -> str:
        return self.message(str)


@functools.cache
def _declared(config: type) -> dict[str, Any]:
    return typing.get_type_hints(config, include_extras=True)


def declared_choices(config: type, field: str) -> tuple[str, ...]:
    """The values that a field may have, by a ``Literal`` or the registry that it is annotated with; else none."""
    declared = _declared(config)[field]
    if typing.get_origin(declared) is Literal:
        return typing.get_args(declared)
    allowed = getattr(declared, "__metadata__", (None,))[0]
    return tuple(allowed) if isinstance(allowed, dict) else ()


def require_fields(config: Any, needed: Mapping[str, Any], rule: str) -> None:
    """Raise a ConfigError, with ``rule``, for the first of some fields that has another value than it needs."""
    for field, value in needed.items():
        if getattr(config, field) != value:
            raise ConfigError(field, getattr(config, field), rule)


def check_fields(config: Any) -> None:
    """Raise a ConfigError for the first field whose value its declaration does not allow."""
    cls: Any = type(config)
    for name, declared in _declared(cls).items():
        value, names, problem = getattr(config, name), declared_choices(cls, name), None
        if names:
            problem = None if value in names else f"must be one of {', '.join(names)}"
        elif typing.get_origin(declared) is Annotated:
            base, allowed = typing.get_args(declared)
            optional = type(None) in typing.get_args(base)
            problem = None if value is None and optional else allowed.problem(value)
        if problem is not None:
            raise ConfigError(name, value, problem)
