"""Read labelled sentences or pairs (XNLI, MNLI, ...), encode them as a language model does, and binarise them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Sequence

from ..common.arguments import existing_file, existing_folder, nonempty, output_folder
from ..common.errors import UserError
from ..common.files import require_files, sha256_of
from ..data.classification.examples import Fields, file_format
from ..data.classification.labels import given_labels
from ..data.languages import get_language
from ..prepare.classification.language_model import LanguageModelText, open_language_model_text
from ..prepare.classification.pipeline import ClassificationSettings, LabelledFile, prepare
from ..prepare.splits import SPLITS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``mhmoe prepare classification``."""
    for split, purpose in (("train", "to train on"), ("valid", "to validate on"), ("test", "to test on")):
        parser.add_argument(
            f"--{split}", nargs="+", default=[], required=split == "train", metavar="LANG=FILE",
            help=f"files {purpose}, by language: JSON lines (.jsonl, .json) or TSV with a header (.tsv), .gz too",
        )  # fmt: skip
    parser.add_argument(
        "--data", type=existing_folder, required=True, metavar="DIR",
        help="prepared data of the language model: its dict.txt and sentencepiece.model are used",
    )  # fmt: skip
    parser.add_argument("--dest", type=output_folder, required=True, metavar="DIR", help="folder for the prepared data")
    parser.add_argument("--overwrite", action="store_true", help="replace data made with other settings")
    parser.add_argument(
        "--tiktoken-ranks",
        type=existing_file,
        metavar="FILE",
        help="rank file, for a language model that was trained with one",
    )
    fields = parser.add_argument_group("fields")
    fields.add_argument(
        "--text-fields", type=nonempty, nargs="+", default=["premise", "hypothesis"], metavar="NAME",
        help="fields of the text: one for single sentences, two for pairs (XNLI's own files: sentence1 sentence2)",
    )  # fmt: skip
    fields.add_argument(
        "--label-field", type=nonempty, default="label", metavar="NAME", help="field of the label (XNLI: gold_label)"
    )
    fields.add_argument(
        "--language-field", type=nonempty, metavar="NAME",
        help="field of the language's code, for files that hold several: only LANG's examples are read, and those of "
        "files for one language that do not have it (XNLI: language)",
    )  # fmt: skip
    fields.add_argument(
        "--labels", type=nonempty, nargs="+", metavar="NAME[=OTHER]",
        help="classes in the order of their ids, each with other spellings of its label, such as "
        "'entailment neutral contradiction=contradictory'; if not given, all labels of the training files, sorted",
    )  # fmt: skip
    fields.add_argument(
        "--skip-labels", type=nonempty, nargs="+", default=[], metavar="LABEL",
        help="leave out examples with these labels, such as MNLI's '-'; any other unknown label is an error",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Prepares the data; raises ``UserError`` for anything the user can mend."""
    files, settings = build_files(args), build_settings(args)
    text = open_language_model_text(args.data, args.tiktoken_ranks)
    prepare(files, settings, text, args.dest, overwrite=args.overwrite, identity=identify(args, files, text), say=_say)
    return 0


def build_files(args: argparse.Namespace) -> list[LabelledFile]:
    """The files that ``--train``, ``--valid`` and ``--test`` name.

    Raises:
        UserError: a word that is not LANG=FILE, an unknown language, one given twice, a file that is missing, of
            another format, or given for two languages or splits.
    """
    files: list[LabelledFile] = []
    for split in SPLITS:
        for word in getattr(args, split):
            code, separator, path = word.partition("=")
            if not separator or not path:
                raise UserError(f"--{split} {word}: must be LANG=FILE, such as en={word}")
            get_language(code, f"--{split}")
            file = LabelledFile(split, code, Path(path))
            require_files([file.path], f"--{split}")
            file_format(file.path)
            _refuse_twice(files, file, several_languages=args.language_field is not None)
            files.append(file)
    return files


def _refuse_twice(files: Sequence[LabelledFile], new: LabelledFile, several_languages: bool) -> None:
    for old in files:
        if old.name == new.name:
            raise UserError(f"{new.flag}: --{new.split} has a file for {new.language} already, {old.path}")
        same_examples = not several_languages or old.language == new.language
        if same_examples and old.path.resolve() == new.path.resolve():
            raise UserError(
                f"{new.flag}: is the file of --{old.split} {old.language}; of a file with several languages give the "
                "--language-field"
            )


def build_settings(args: argparse.Namespace) -> ClassificationSettings:
    """Checks the flags before any work and returns the settings."""
    names = args.text_fields
    if len(names) > 2 or len(set(names)) < len(names):
        raise UserError(f"--text-fields {' '.join(names)}: must be one field or two different ones")
    if args.labels is not None:
        given_labels(args.labels, args.skip_labels, args.label_field)
    fields = Fields(tuple(names), args.label_field, args.language_field)
    return ClassificationSettings(fields, None if args.labels is None else tuple(args.labels), tuple(args.skip_labels))


def identify(args: argparse.Namespace, files: Sequence[LabelledFile], text: LanguageModelText) -> dict[str, Any]:
    """Settings by flag that decide the prepared data."""
    identity: dict[str, Any] = {
        split: {
            file.language: {
                "name": file.path.name, "bytes": file.path.stat().st_size, "sha256": sha256_of(file.path),
            }
            for file in files if file.split == split
        }
        for split in SPLITS
    }  # fmt: skip
    identity["data"] = {name: sha256_of(text.folder / name) for name in text.files}
    if args.tiktoken_ranks is not None:
        identity["tiktoken_ranks"] = sha256_of(args.tiktoken_ranks)
    for name in ("text_fields", "label_field", "language_field", "labels", "skip_labels"):
        identity[name] = getattr(args, name)
    return identity


def _say(line: str) -> None:
    """One line for the user, at once even into a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
