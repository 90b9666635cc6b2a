"""What fairseq reads from a command line."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from fairseq import options


def parse_words(words: Sequence[str]) -> Namespace:
    """The arguments of a ``fairseq-train`` or ``fairseq-eval-lm`` command; an unknown flag ends the test."""
    get_parser = {"fairseq-train": options.get_training_parser, "fairseq-eval-lm": options.get_eval_lm_parser}[words[0]]
    sys_argv, sys.argv = sys.argv, list(words)  # the parser looks for --user-dir there
    try:
        return options.parse_args_and_arch(get_parser(), input_args=list(words[1:]))
    finally:
        sys.argv = sys_argv
