"""``mhmoe lm-eval``: lm-evaluation-harness's own command line, with our models registered as ``mhmoe``."""

from __future__ import annotations

import argparse
import sys

from ..evaluation.lm_eval_support import require_lm_eval

_MODEL_FLAGS = ("--model", "-M")
_OTHER_COMMANDS = ("ls", "validate")
_HELP = """mhmoe lm-eval: lm-eval's command line with the model mhmoe, which --model need not name.

  mhmoe lm-eval --tasks arc_easy,piqa --model_args checkpoint=DIR,data=DIR --batch_size auto [lm-eval's flags]

--model_args of mhmoe, as key=value,key=value:
  checkpoint        a checkpoint, or the folder that holds one
  data              folder with dict.txt and the tokenizer's model (default: the checkpoint's, or its training data)
  lang              language code whose symbol leads every text (models trained with --mhmoe-language-token)
  max_length        most tokens read at once (default: the model's positions)
  max_gen_toks      most new tokens where a task does not say (256)
  max_batch_tokens  most tokens per batch, for --batch_size auto (8192)
  clean             false: take text as it is, without mhmoe prepare's clean-up

"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every word is lm-eval's, ``--help`` too."""
    parser.prefix_chars = "\0"  # no word is a flag of ours
    parser.add_argument("words", nargs="*", help="lm-eval's own arguments; --model mhmoe is added")


def run(args: argparse.Namespace) -> int:
    """Hands over to lm-eval.

    Raises:
        UserError: lm-eval is not installed.
        ValueError, OSError: whatever lm-eval or the model finds wrong.
    """
    if {"-h", "--help"} & set(args.words) and not set(args.words) & set(_OTHER_COMMANDS):
        sys.stdout.write(_HELP)
    require_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    from ..evaluation import lm_eval_adapter  # noqa: F401  (registers the model)

    before = sys.argv
    sys.argv = ["lm-eval", *complete(args.words)]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0


def complete(words: list[str]) -> list[str]:
    """lm-eval's arguments with our model, unless they name one or do not run a model."""
    named = any(word.split("=")[0] in _MODEL_FLAGS for word in words)
    if named or not words or words[0] in _OTHER_COMMANDS:
        return words
    return [*words, "--model", "mhmoe"]
