"""What a parser takes, and odd values for it: every option of every parser, so that a new one is tried unasked."""

import argparse
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HUGE, LARGE = "100000000000000000000", "1e9"
MISSING, FILE, FOLDER, LOOP, UNREADABLE, BELOW_FILE = (
    "missing", "a-file", "a-folder", "a-loop", "unreadable", "a-file/below"
)  # fmt: skip
# The administrator may read everything.
_FORBIDDEN = {UNREADABLE} if os.geteuid() else set()
# What no option of the kind may take; anything else is tried on every option, and may be right.
NEVER = {
    "whole": {"abc", "1.5", "nan", "inf", HUGE, ""},
    "real": {"abc", "nan", "inf", ""},
    "choice": {"nosuch", ""},
    "nonempty": {""},
    "plain_name": {"", BELOW_FILE},
    "existing_file": {"", MISSING, FOLDER, LOOP, BELOW_FILE, *_FORBIDDEN},
    "existing_folder": {"", MISSING, FILE, LOOP, BELOW_FILE, *_FORBIDDEN},
    "existing_path": {"", MISSING, LOOP, BELOW_FILE, *_FORBIDDEN},
    "output_file": {"", FOLDER, LOOP, BELOW_FILE},
    "output_folder": {"", FILE, LOOP, BELOW_FILE},
}
NUMBERS = ("abc", "-1", "-0.5", "0", "1", "1.5", "nan", "inf", "")
PATHS = (MISSING, FILE, FOLDER, LOOP, UNREADABLE, BELOW_FILE, "")
WORDS = ("nosuch", "0", "-1", FILE, FOLDER, BELOW_FILE, "")


@dataclass(frozen=True)
class Option:
    """An option or positional argument.

    Attributes:
        name: its longest flag, or its destination.
        kind: see ``NEVER``; or ``text``, ``switch``.
        excludes: flags that cannot stand beside it.
    """

    name: str
    kind: str
    shown: tuple[str, ...]
    excludes: frozenset[str] = frozenset()

    @property
    def is_flag(self) -> bool:
        return self.name.startswith("-")

    @property
    def values(self) -> tuple[str | None, ...]:
        if self.kind == "switch":
            return (None,)
        if self.kind in ("whole", "real"):
            return (*NUMBERS, HUGE if self.kind == "whole" else LARGE)
        return PATHS if self.kind.startswith(("existing", "output")) else WORDS


def furnish(folder: Path) -> None:
    """Make the files and folders that odd values name."""
    (folder / FILE).write_text("neither JSON nor a checkpoint\n", encoding="utf-8")
    (folder / FOLDER).mkdir()
    (folder / FOLDER / "inner").write_text("x\n", encoding="utf-8")
    (folder / LOOP).symlink_to(folder / LOOP)
    (folder / UNREADABLE).write_text("x\n", encoding="utf-8")
    (folder / UNREADABLE).chmod(0)


def leaves(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Every parser without sub-commands, with the words that lead to it."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield path, parser
    for action in inner:
        for name, sub in action.choices.items():
            yield from leaves(sub, (*path, name))


def options_of(parser: argparse.ArgumentParser) -> list[Option]:
    """Everything that a parser takes, but ``--help``."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        name = max(action.option_strings, key=len, default=action.dest)
        shown = tuple(action.option_strings) or (
            action.dest,
            *([action.metavar] if isinstance(action.metavar, str) else []),
        )
        beside = {
            flag for group in parser._mutually_exclusive_groups if action in group._group_actions
            for other in group._group_actions if other is not action for flag in other.option_strings
        }  # fmt: skip
        found.append(Option(name, kind_of(action), shown, frozenset(beside)))
    return found


def kind_of(action: argparse.Action) -> str:
    """What an action takes, from its type."""
    if action.nargs == 0:
        return "switch"
    if action.choices is not None:
        return "choice"
    kind = action.type.args[0] if isinstance(action.type, functools.partial) else action.type
    if kind in (int, float):
        return "whole" if kind is int else "real"
    name = getattr(action.type, "__qualname__", "text").split(".")[0]
    return name if name in NEVER else "text"
