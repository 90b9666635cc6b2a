"""``mhmoe evaluate``: a checkpoint's perplexity on a split, by language or by what is masked, and the total."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoints.open import open_model, read_settings
from ..common.arguments import existing_file, existing_folder, nonempty, output_file, plain_name, whole
from ..common.console import quiet, say
from ..common.errors import UserError
from ..common.files import sha256_of
from ..common.tables import markdown_table, number, percent
from ..data.identity import identify_data
from ..evaluation.modality_scores import ModalityScores, score_modalities, together, write_modality_scores
from ..evaluation.perplexity import score_split
from ..evaluation.split_scores import SplitScores, write_scores
from ..tasks.masked_multimodal import MaskedMultimodalTask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``mhmoe evaluate``."""
    parser.add_argument(
        "checkpoint", type=existing_file, metavar="CHECKPOINT", help="checkpoint file of a pre-trained model"
    )
    parser.add_argument("--data", type=existing_folder, required=True, metavar="DIR", help="folder of mhmoe prepare")
    parser.add_argument(
        "--split", type=plain_name, default="test", help="valid, test, or one language's, such as test_de"
    )
    parser.add_argument(
        "--langs", type=nonempty, metavar="CODES", help="evaluate on these of the languages, with commas in between"
    )
    parser.add_argument(
        "--visual-tokenizer", type=existing_file, metavar="FILE",
        help="that of the training, where it is no longer where it was then",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=whole(), default=36000, metavar="N", help="most tokens per batch of text")
    parser.add_argument(
        "--batch-size",
        type=whole(),
        default=32,
        metavar="N",
        help="most blocks, or samples of each modality, per batch",
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE",
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
    if args.visual_tokenizer is not None:
        if "visual_tokenizer" not in settings["task"]:
            raise UserError(f"--visual-tokenizer: {args.checkpoint} predicts no visual tokens")
        overrides["visual_tokenizer"] = str(args.visual_tokenizer.resolve())
    identity = identify_data(args.data)
    with quiet():
        opened = open_model(args.checkpoint, args.data, overrides=overrides)
        table, write = _score(args, opened.model, opened.task)
    say(table)
    if args.json is not None:
        write(args.json, {
            "checkpoint": args.checkpoint.name,
            "checkpoint_sha256": sha256_of(args.checkpoint),
            "data_digest": identity.digest,
            "split": args.split,
        })  # fmt: skip
        say(f"written: {args.json}")
    return 0


def _score(args: argparse.Namespace, model: Any, task: Any) -> tuple[str, Callable[[Path, dict[str, Any]], None]]:
    """The figures as a table, and what writes them to a file together with their provenance."""
    if isinstance(task, MaskedMultimodalTask):
        modalities = score_modalities(model, task, args.split, args.batch_size)
        tokenizer = task.state_dict()  # which visual tokenizer's ids were predicted
        return describe_parts(modalities), lambda path, kept: write_modality_scores(path, modalities, kept | tokenizer)
    scores = score_split(model, task, args.split, args.max_tokens, args.batch_size)
    return describe(scores), lambda path, kept: write_scores(path, scores, kept)


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


def describe_parts(scores: ModalityScores) -> str:
    """A row for everything that is masked, and one for all together; beside it what a guess without context gets."""
    guesses = scores.without_context
    rows_of = {name: (part, guesses[name]) for name, part in scores.parts.items()}
    rows_of["all"] = (scores.total, together(list(guesses.values())))
    rows = [
        [
            name.replace("_", ", "),
            f"{score.targets:,}",
            number(score.loss, 4),
            number(score.perplexity),
            percent(score.accuracy),
            number(guessed.perplexity),
            percent(guessed.accuracy),
        ]
        for name, (score, guessed) in rows_of.items()
    ]
    header = ["masked", "positions", "loss (bits)", "perplexity", "right", "without context: perplexity", "right"]
    return markdown_table(header, rows)
