"""The names of a task's classes, which its checkpoints keep."""

from __future__ import annotations

from ..common.errors import UserError

_MOST_LISTED = 8


def require_same_classes(source: str, classes: list[str], saved: list[str]) -> None:
    """The data's classes are those that a checkpoint was trained with.

    Args:
        source: the file that names the data's.

    Raises:
        UserError: if they differ or come in another order.
    """
    if saved != classes:
        raise UserError(
            f"{source} has the classes {_listed(classes)}; the checkpoint's are {_listed(saved)}, in this order"
        )


def _listed(names: list[str]) -> str:
    if len(names) <= _MOST_LISTED:
        return ", ".join(names)
    return f"{', '.join(names[:_MOST_LISTED])}, ... ({len(names):,})"
