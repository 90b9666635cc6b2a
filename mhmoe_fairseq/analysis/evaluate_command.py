"""``mhmoe evaluate``: a checkpoint's perplexity on a split, every language and the total in one launch."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data.files import sha256_of
from ..errors import UserError
from ..evaluation.perplexity import score_split
from ..evaluation.split_scores import SplitScores, write_scores
from .activation import load_for_evaluation
from .console import quiet, say
from .data_identity import identify_data
from .runs import read_settings
from .tables import markdown_table, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``mhmoe evaluate``."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint file of a language model")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with dict.txt and the text")
    parser.add_argument("--split", default="test", help="valid, test, or one language's, such as test_de")
    parser.add_argument("--langs", metavar="CODES", help="evaluate on these of the languages, with commas in between")
    parser.add_argument("--max-tokens", type=int, default=36000, metavar="N", help="most tokens per batch")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="most blocks per batch")
    parser.add_argument(
        "--json", type=Path, metavar="FILE",
        help="write the figures there, too; mhmoe report reads eval-SPLIT.json in a run's folder",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Evaluate, print and write.

    Raises:
        ValueError, OSError: for a bad flag, checkpoint or data folder, before the evaluation.
    """
    settings = read_settings(args.checkpoint)
    overrides = {}
    if args.langs is not None:
        if "langs" not in settings["task"]:
            raise UserError(f"--langs: {args.checkpoint} was trained on one text, not on several languages")
        overrides["langs"] = args.langs
    identity = identify_data(args.data)
    with quiet():
        model, task = load_for_evaluation(args.checkpoint, args.data, overrides)
        scores = score_split(model, task, args.split, args.max_tokens, args.batch_size)
    say(describe(scores))
    if args.json is not None:
        provenance = {
            "checkpoint": args.checkpoint.name,
            "checkpoint_sha256": sha256_of(args.checkpoint),
            "data_digest": identity.digest,
            "split": args.split,
        }
        write_scores(args.json, scores, provenance)
        say(f"written: {args.json}")
    return 0


def describe(scores: SplitScores) -> str:
    """A row for every language and one for the total."""
    rows = [
        [
            name,
            f"{score.tokens:,}",
            number(score.loss, 4),
            number(score.perplexity),
            number(score.bits_per_character, 4),
        ]
        for name, score in {**scores.languages, "total": scores.total}.items()
    ]
    return markdown_table(["language", "tokens", "loss (bits/token)", "perplexity", "bits/character"], rows)
