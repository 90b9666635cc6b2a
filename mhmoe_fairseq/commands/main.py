"""The ``mhmoe`` command: data preparation, analysis, planning and generation.

Every sub-command lives in a module with ``add_arguments(parser)`` and ``run(args) -> int``, imported only when it is
called, and with ``parse_rest(args, words)`` if it takes flags that only heavier imports know. At module level it
imports neither PyTorch nor fairseq, so that ``--help`` comes at once. Here is, too, how fairseq's commands show a
refusal of ours: as ``mhmoe`` does, in one line and with status 2.
"""

import argparse
import contextlib
import importlib
import logging
import os
import sys
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from .. import register
from ..common.arguments import ArgumentParser, add_action, shell_completion
from ..common.errors import USER_ERRORS, UserError

_PACKAGE = Path(__file__).resolve().parent.parent

# By name, beside ``user-dir``: what a command is for. Its module has the name with an underscore for the hyphen.
COMMANDS = {
    "prepare": "make a binarised corpus from a source or your text",
    "visual-tokenizer": "fit a visual tokenizer to training images, describe one, show ids",
    "plan": "count what a training needs: parameters, FLOPs, memory, traffic",
    "reproduce": "train, evaluate and report a table or figure of the papers, a study, or the demo",
    "evaluate": "measure a checkpoint on a split, by its task's own metrics",
    "zero-shot": "language models on the paper's English tasks, XNLI, lm-eval's tasks, or a cross-lingual probe",
    "report": "compare trained models by their records: tables and plots",
    "analyze": "measure which experts a checkpoint uses, by language, domain or modality, or for the patches of images",
    "checkpoint": "inspect, convert, average, pack, mix, import and export checkpoints",
    "generate": "continue a prompt with a trained language model, or caption images",
    "doctor": "describe this installation and machine, for reports of bugs",
}
# Former names, and the words that take their place. A call by a former name says the new one and then runs it.
ALIASES: dict[str, tuple[str, ...]] = {
    "caption": ("evaluate",),
    "classify": ("evaluate",),
    "predict": ("evaluate",),
    "lm-eval": ("zero-shot", "lm-eval"),
    "xnli": ("zero-shot", "xnli"),
    "probe": ("zero-shot", "probe"),
    "diversity": ("analyze", "--diversity"),
    "report-tasks": ("report",),
    "import-official": ("checkpoint", "import-official"),
}

# What needs neither fairseq nor our models; everything else finds them registered.
WITHOUT_FAIRSEQ = ("visual-tokenizer", "report", "reproduce", "doctor")


def build_parser(*commands: str | None) -> ArgumentParser:
    """The parser; only the modules of ``commands`` are imported, the others show their one-line help."""
    parser = ArgumentParser(prog="mhmoe", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--print-completion", action=_PrintCompletion, choices=("bash", "zsh"),
        help="print what makes the shell complete commands, flags and files: eval \"$(mhmoe --print-completion bash)\"",
    )  # fmt: skip
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    subparsers.add_parser("user-dir", help="print the path to give to fairseq's --user-dir")
    for name, summary in COMMANDS.items():
        sub = add_action(subparsers, name, summary)
        if name in commands:
            _module(name).add_arguments(sub)
    return parser


class _PrintCompletion(argparse.Action):
    """Prints the completion of all commands and ends, as ``--help`` does."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        print(shell_completion(build_parser(*COMMANDS), str(values)))
        parser.exit()


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{command.replace('-', '_')}")


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command; a user's error is one line on stderr and exit status 2.

    Where the output's reader goes (``mhmoe ... | head -1``) the command ends quietly, with the status of a program that
    SIGPIPE ended.
    """
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()  # what is still in the buffer, help texts too, must not fail at the interpreter's end
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # what a shell reports of a program that SIGPIPE ended


def _run(argv: list[str]) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if argv and argv[0] in ALIASES:
        new = ALIASES[argv[0]]
        print(f"mhmoe {argv[0]} is now: mhmoe {' '.join(new)}", file=sys.stderr)
        argv = [*new, *argv[1:]]
    command = next((word for word in argv if not word.startswith("-")), None)
    try:
        _require_text(argv)
        parser = build_parser(command)
        args, rest = parser.parse_known_args(argv)
        if args.command == "user-dir":
            print(_PACKAGE)
            return 0
        if args.command not in WITHOUT_FAIRSEQ:
            register()
        module = _module(args.command)
        if hasattr(module, "parse_rest"):
            module.parse_rest(args, rest)
        elif rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return module.run(args)
    except USER_ERRORS as error:
        print(f"mhmoe{f' {command}' if command in COMMANDS else ''}: error: {error}", file=sys.stderr)
        return 2


def _require_text(argv: list[str]) -> None:
    """``UserError`` if a word has bytes that are no text: neither tokenizers nor files of ours could take them."""
    for index, word in enumerate(argv):
        try:
            word.encode()
        except UnicodeEncodeError as error:
            before = argv[index - 1] if index and argv[index - 1].startswith("-") else "argument"
            raise UserError(
                f"{before} {ascii(word)}: must be UTF-8 text, byte 0x{ord(word[error.start]) & 0xFF:02x} is not"
            ) from error


def refuse_in_one_line() -> None:
    """Let fairseq's commands, and only they, end without a traceback where this package has refused something.

    fairseq has no place for it: its commands let every error through to the interpreter.
    """
    program = Path(sys.argv[0] if sys.argv else "")
    if not program.name.startswith("fairseq-") and program.parent.name != "fairseq_cli":
        return
    stock = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not is_refusal(error, trace):
            stock(kind, error, trace)
            return
        sys.stdout.flush()
        sys.stderr.write(f"{program.stem}: error: {error}\n")
        raise SystemExit(2)

    sys.excepthook = hook


def is_refusal(error: BaseException, trace: TracebackType | None) -> bool:
    """Whether this package raised an error itself (at the end of ``trace``), and the user can mend it."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_here = trace is not None and _PACKAGE in Path(trace.tb_frame.f_code.co_filename).parents
    return isinstance(error, UserError) or (raised_here and isinstance(error, USER_ERRORS))
