"""What fairseq and ``mhmoe`` read from a command line."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from fairseq import options

from mhmoe_fairseq.commands.main import build_parser
from mhmoe_fairseq.common.arguments import existing_file, existing_folder, existing_path


def parse_words(words: Sequence[str]) -> Namespace:
    """The arguments of a ``fairseq-train`` or ``fairseq-eval-lm`` command; an unknown flag ends the test."""
    get_parser = {"fairseq-train": options.get_training_parser, "fairseq-eval-lm": options.get_eval_lm_parser}[words[0]]
    sys_argv, sys.argv = sys.argv, list(words)  # the parser looks for --user-dir there
    try:
        return options.parse_args_and_arch(get_parser(), input_args=list(words[1:]))
    finally:
        sys.argv = sys_argv


def parse_mhmoe(words: Sequence[str]) -> Namespace:
    """The arguments of an ``mhmoe`` command whose input files are yet to be written by another."""
    assert words[0] == "mhmoe"
    parser = build_parser(words[1])
    _let_files_be_missing(parser)
    return parser.parse_args(words[1:])


def _let_files_be_missing(parser: ArgumentParser) -> None:
    for action in parser._actions:
        if action.type in (existing_file, existing_folder, existing_path):
            action.type = Path
        for inner in action.choices.values() if isinstance(action.choices, dict) else ():
            _let_files_be_missing(inner)
