"""``mhmoe classify``: accuracy by language, and predictions, of a fine-tuned model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.arguments import existing_folder, existing_path, nonempty, output_file, plain_name, whole
from ..common.errors import UserError
from ..common.files import atomic_open, read_json, require_files
from ..data.classification.examples import Fields, read_examples
from ..data.languages import get_language
from ..prepare.workspace import MANIFEST

if TYPE_CHECKING:
    from ..evaluation.classify import Classified, Classifier


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``mhmoe classify``."""
    parser.add_argument(
        "checkpoint",
        type=existing_path,
        metavar="CHECKPOINT",
        help="a fine-tuned checkpoint, or the folder that holds one",
    )
    parser.add_argument(
        "--data",
        type=existing_folder,
        metavar="DIR",
        help="data made by mhmoe prepare classification; those of the training if not given",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--splits", type=plain_name, nargs="+", metavar="NAME",
        help="prepared splits, such as test_de; all test splits if not given, or all validation splits",
    )  # fmt: skip
    what.add_argument(
        "--input",
        nargs="+",
        metavar="LANG=FILE",
        help="files of texts by language, as for mhmoe prepare classification",
    )
    parser.add_argument(
        "--text-fields",
        type=nonempty,
        nargs="+",
        metavar="NAME",
        help="of --input: fields of the text; the training's if not given",
    )
    parser.add_argument(
        "--label-field",
        type=nonempty,
        metavar="NAME",
        help="of --input: field of the label; without it there is no accuracy",
    )
    parser.add_argument(
        "--language-field", type=nonempty, metavar="NAME", help="of --input: field of the language's code"
    )
    parser.add_argument(
        "--predictions", type=output_file, metavar="FILE",
        help="write a JSON object per example: split, index, label, prediction, probabilities",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=whole(), default=4096, metavar="N", help="tokens of a batch, padding counted"
    )
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even if there is a GPU")


def run(args: argparse.Namespace) -> int:
    """Prints a line for each split, and their means."""
    if args.input is None:
        for flag in ("text_fields", "label_field", "language_field"):
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag.replace('_', '-')} needs --input")
    # Imported late, so that `mhmoe classify --help` is quick.
    import torch

    from ..evaluation.classify import Classifier

    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    classifier = Classifier(args.checkpoint, args.data, device)
    results = []
    for result in _results(classifier, args):
        results.append(result)
        _say(_line(result))
    labelled = [result for result in results if result.is_labelled]
    if len(labelled) > 1:
        _say(_means(labelled))
    if args.predictions is not None:
        with atomic_open(args.predictions) as stream:
            for result in results:
                for record in result.records():
                    stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
    return 0


def _results(classifier: Classifier, args: argparse.Namespace) -> Iterator[Classified]:
    if args.input is None:
        for split in args.splits or classifier.splits():
            yield classifier.classify_split(split, args.max_tokens)
        return
    fields = Fields(_text_fields(classifier, args.text_fields), args.label_field, args.language_field)
    for word in args.input:
        code, _, name = word.partition("=")
        if not name:
            raise UserError(f"--input {word}: must be LANG=FILE, such as en={word}")
        get_language(code, "--input")
        require_files([Path(name)], "--input")
        is_shared = sum(other.partition("=")[2] == name for other in args.input) > 1
        examples = list(read_examples(Path(name), fields, code, is_shared=is_shared))
        if not examples:
            raise UserError(f"--input {word}: no example in it")
        yield classifier.classify_examples(f"input_{code}", examples, args.label_field is not None, args.max_tokens)


def _text_fields(classifier: Classifier, given: list[str] | None) -> tuple[str, ...]:
    if given is not None:
        return tuple(given)
    manifest = classifier.data / MANIFEST
    if not manifest.is_file():
        raise UserError(f"--input: {manifest} is missing; give --text-fields")
    return tuple(read_json(manifest)["fields"])


def _line(result: Classified) -> str:
    start = f"{result.split}: {len(result.labels)} examples"
    if result.num_cut:
        start += f" ({result.num_cut} too long, cut)"
    if not result.is_labelled:
        return start
    return f"{start}, accuracy {result.accuracy:.2f}, majority class {result.majority:.2f}"


def _means(results: list[Classified]) -> str:
    """XNLI's average is the one over languages."""
    by_split = sum(result.accuracy for result in results) / len(results)
    examples = sum(len(result.labels) for result in results)
    overall = sum(result.accuracy * len(result.labels) for result in results) / examples
    return f"all {len(results)} splits: {examples} examples, accuracy {overall:.2f}, mean over splits {by_split:.2f}"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
