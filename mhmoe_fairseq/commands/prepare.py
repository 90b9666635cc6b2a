"""``mhmoe prepare``: one sub-command per kind of corpus."""

from __future__ import annotations

import argparse

from . import prepare_classification, prepare_english, prepare_image_text, prepare_multilingual

PREPARERS = {
    "english": (prepare_english, "English text for language modelling"),
    "multilingual": (prepare_multilingual, "text in many languages for language modelling"),
    "classification": (prepare_classification, "labelled sentences or pairs, such as XNLI's, for fine-tuning"),
    "image-text": (prepare_image_text, "images with captions and questions, for masked multimodal models"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the kinds of corpora as sub-commands of ``parser``."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, (module, summary) in PREPARERS.items():
        kind = kinds.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        module.add_arguments(kind)


def run(args: argparse.Namespace) -> int:
    """Runs the chosen kind."""
    return PREPARERS[args.kind][0].run(args)
