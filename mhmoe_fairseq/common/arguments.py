"""The parser of ``mhmoe``, and its types of arguments: numbers with their range, files and folders.

A value that breaks its rule is refused while the command line is read, before any work. The message has the flag in
front, so a type says only the value and the rule: ``--beam (0) must be at least 1, an integer below 2**31``.
"""

import argparse
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .errors import UserError
from .ranges import SEED, Range, flag


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose complaints are a :class:`UserError` of one line; usage and flags are left to ``--help``.

    Attributes:
        rest: name of the argument that gets the words after ``--``; None: argparse's own meaning.
    """

    rest: str | None = None

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """As argparse, but for :attr:`rest`."""
        if self.rest is None or args is None:
            return super().parse_known_args(args, namespace)
        end = args.index("--") if "--" in args else len(args)
        namespace, unknown = super().parse_known_args(args[:end], namespace)
        setattr(namespace, self.rest, args[end + 1 :])
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        """Raise what ``argparse`` would print with its usage."""
        raise UserError(message.removeprefix("argument ").replace(": (", " (", 1))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written; defaults behind the help of what has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or "(default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def add_action(actions: Any, name: str, summary: str, examples: str = "") -> argparse.ArgumentParser:
    """The parser of one more sub-command of ``actions``; its help ends with ``examples`` as they are written."""
    text = f"{summary[0].upper()}{summary[1:]}.\n\n{examples}".strip()
    return actions.add_parser(name, help=summary, description=text, formatter_class=HelpFormatter)


def add_fields(parser: Any, defaults: Any, *rows: tuple[str, Any, str | None, str]) -> None:
    """Adds a flag for each row: a field of ``defaults``, a type or a tuple of choices, metavar and help."""
    for name, kind, metavar, text in rows:
        allowed = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        parser.add_argument(flag(name), default=getattr(defaults, name), metavar=metavar, help=text, **allowed)


def shell_completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Returns a script that makes ``bash`` or ``zsh`` complete what ``parser`` takes, files and folders by their type.

    Raises:
        UserError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise UserError("--print-completion needs shtab: pip install 'mhmoe-fairseq[completion]'") from error
    parsers = [parser]
    for each in parsers:  # grows
        for action in each._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += dict.fromkeys(action.choices.values())
            elif action.type in (existing_folder, output_folder):
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.type in (existing_path, existing_file, output_file):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell)


PRECISIONS = ("fp32", "bf16", "auto")  # in which a trained model may be asked to compute


def add_device_arguments(parser: Any) -> None:
    """Adds ``--cpu`` and ``--precision``: where, and in what type of numbers, a trained model computes."""
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even if there is a GPU")
    parser.add_argument(
        "--precision", choices=PRECISIONS,
        help="compute in float32, in bf16, or (auto) in bf16 where this machine multiplies it itself; the training's "
        "if not given",
    )  # fmt: skip


def number(kind: Callable[[str], Any], allowed: Range, text: str) -> Any:
    """The number that ``text`` stands for, refused outside its range."""
    try:
        value = kind(text)
    except ValueError:
        value = text  # no number: outside every range
    if problem := allowed.problem(value):
        raise _refused(text, problem)
    return value


def whole(at_least: int = 1, at_most: float = math.inf) -> Callable[[str], int]:
    """A type of whole numbers in a range."""
    return functools.partial(number, int, Range(at_least, at_most, integer=True))


seed = functools.partial(number, int, SEED)


def real(
    at_least: float = -math.inf, at_most: float = math.inf, above: float | None = None, below: float | None = None
) -> Callable[[str], float]:
    """A type of finite numbers in a range; ``above`` and ``below`` are bounds that lie outside."""
    low, high = (at_least if above is None else above), (at_most if below is None else below)
    return functools.partial(number, float, Range(low, high, open_low=above is not None, open_high=below is not None))


def nonempty(text: str) -> str:
    """A text that is not empty."""
    if not text.strip():
        raise _refused(text, "must not be empty")
    return text


def plain_name(text: str) -> str:
    """A name that becomes a part of file names."""
    if os.sep in nonempty(text):
        raise _refused(text, "must be a name, not a path")
    return text


def existing_path(text: str) -> Path:
    """A file, pipe or folder that can be read."""
    path = _path(text)
    if not _exists(text, path):
        raise _refused(text, "does not exist")
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise _refused(text, "must be readable: permission denied")
    return path


def existing_file(text: str) -> Path:
    """A file, or a pipe, that can be read."""
    if (path := existing_path(text)).is_dir():
        raise _refused(text, "must be a file, not a folder")
    return path


def existing_folder(text: str) -> Path:
    """A folder that can be read."""
    if not (path := existing_path(text)).is_dir():
        raise _refused(text, "must be a folder, not a file")
    return path


def output_file(text: str) -> Path:
    """A file to write, there or not; its folder may be missing, too."""
    path = _path(text)
    if _exists(text, path) and not path.is_file():
        raise _refused(text, f"must be a file to write, not {'a folder' if path.is_dir() else 'a device'}")
    _require_writable(text, path.parent)
    return path


def output_folder(text: str) -> Path:
    """A folder to write into, there or not."""
    path = _path(text)
    if _exists(text, path) and not path.is_dir():
        raise _refused(text, "must be a folder to write into, not a file")
    _require_writable(text, path)
    return path


def _path(text: str) -> Path:
    if not text:
        raise _refused(text, "must be a path")
    return Path(text)


def _exists(text: str, path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        if path.is_symlink():  # one that leads nowhere would be followed by some writers and replaced by others
            raise _refused(text, "does not exist") from None
        return False
    except OSError as error:
        raise _refused(text, f"cannot be used: {error.strerror}") from None
    return True


def _require_writable(text: str, folder: Path) -> None:
    """Refuse a folder that can be neither made nor written to."""
    while not _exists(text, folder):
        folder = folder.parent
    if not folder.is_dir():
        raise _refused(text, f"cannot be made: {folder} is a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _refused(text, f"cannot be made: no permission to write into {folder}")


def _refused(text: str, rule: str) -> argparse.ArgumentTypeError:
    shown = text if len(text) <= 200 else f"{text[:200]}..."
    return argparse.ArgumentTypeError(f"({shown}) {rule}")
