"""Fetch or read text in many languages, clean it, hold out the same keys in all of them, learn one vocabulary on the
training parts, and binarise every language for fairseq."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..common.arguments import existing_file, nonempty, output_folder, real, seed, whole
from ..common.errors import UserError
from ..data.languages import PAPER_LANGUAGES, parse_languages
from ..data.sentencepiece_vocabulary import MODELS
from ..data.tiktoken_vocabulary import TOKENIZERS, check_tokenizer
from ..prepare.multilingual.corpus_source import MultilingualSource
from ..prepare.multilingual.pipeline import MultilingualSettings, prepare_multilingual
from ..prepare.multilingual.sampling import check_alpha
from ..prepare.sources.debian_docs.families import FAMILIES
from ..prepare.sources.debian_docs.source import DebianDocs
from ..prepare.sources.language_folders import jsonl_folder, text_folder
from ..prepare.sources.local_files import BLANK_LINE
from ..prepare.splits import check_fractions

_DEBIAN = "debian-docs"
_NEEDS_FOLDER = ("text", "jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``mhmoe prepare multilingual``."""
    parser.add_argument(
        "--langs",
        type=nonempty,
        default=",".join(PAPER_LANGUAGES),
        metavar="CODES",
        help="languages, with commas in between",
    )
    parser.add_argument(
        "--source", nargs="+", default=[_DEBIAN], metavar=("NAME", "DIR"),
        help=f"{_DEBIAN}; 'text DIR' with DIR/de.txt or DIR/de/*.txt; 'jsonl DIR' with DIR/de.jsonl or DIR/de/*.jsonl",
    )  # fmt: skip
    parser.add_argument("--dest", type=output_folder, required=True, metavar="DIR", help="folder for the prepared data")
    parser.add_argument(
        "--cache-dir", type=output_folder, metavar="DIR", help="downloads; .mhmoe-downloads beside --dest if not given"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace data made with other settings")
    parser.add_argument("--seed", type=seed, default=1, help="decides what is held out, and what a cap leaves out")
    parser.add_argument(
        "--valid-fraction", type=real(at_least=0, below=1), default=0.05, help="share of the keys; 0 for none"
    )
    parser.add_argument(
        "--test-fraction", type=real(at_least=0, below=1), default=0.05, help="share of the keys; 0 for none"
    )
    parser.add_argument(
        "--max-mb-per-language", type=real(at_least=0), default=2.0, metavar="MB",
        help="leave out whole keys, the same ones in all languages, above this size; 0 for no limit",
    )  # fmt: skip
    parser.add_argument(
        "--line-filter", choices=("auto", "on", "off"), default="auto",
        help="drop short lines, lines in another script, and untranslated English; auto: for debian-docs only",
    )  # fmt: skip
    _add_source_arguments(parser.add_argument_group("sources"))
    _add_vocabulary_arguments(parser.add_argument_group("vocabulary"))


def _add_source_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--debian-families", type=nonempty, nargs="+", default=list(FAMILIES), metavar="NAME",
        help=f"for {_DEBIAN}: which of {', '.join(FAMILIES)}",
    )  # fmt: skip
    group.add_argument(
        "--jsonl-field", type=nonempty, default="text", metavar="NAME", help="field that holds a document's text"
    )
    group.add_argument(
        "--jsonl-key-field", type=nonempty, default="key", metavar="NAME",
        help="field that names a document alike in all languages; documents without it are not aligned",
    )  # fmt: skip
    group.add_argument(
        "--document-separator", type=nonempty, default=BLANK_LINE, metavar="SEP",
        help="for text: blank-line, file (a file is a document), line (a line is one), or the text of a separator line",
    )  # fmt: skip


def _add_vocabulary_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tokenizer", choices=TOKENIZERS, default="sentencepiece", help="kind")
    group.add_argument(
        "--tiktoken-ranks", type=existing_file, metavar="FILE", help="rank file for --tokenizer tiktoken"
    )
    group.add_argument("--vocab-size", type=whole(), default=8000, metavar="N", help="SentencePiece's pieces")
    group.add_argument(
        "--vocab-sampling-alpha", type=real(at_least=0), default=0.5, metavar="A",
        help="languages are drawn by (their share of the characters) ** A; 1 as they are, 0 all alike",
    )  # fmt: skip
    group.add_argument("--tokenizer-model", choices=MODELS, default="unigram", help="SentencePiece's model")
    group.add_argument(
        "--tokenizer-lines", type=whole(), default=120_000, metavar="N", help="learn pieces from at most about N lines"
    )


def run(args: argparse.Namespace) -> int:
    """Prepares the languages; raises ``UserError`` for anything the user can mend."""
    source = build_source(args)
    settings = build_settings(args, source)
    cache_dir = args.cache_dir or args.dest.absolute().parent / ".mhmoe-downloads"
    _say(f"source: {source.name}; languages: {', '.join(settings.languages)}")
    prepare_multilingual(source, settings, args.dest, cache_dir=cache_dir, overwrite=args.overwrite, say=_say)
    return 0


def build_source(args: argparse.Namespace) -> MultilingualSource:
    """The source that ``--source`` names.

    Raises:
        UserError: an unknown name or family, a folder where none belongs, or none where one does.
    """
    name, folders = args.source[0], args.source[1:]
    if name not in (_DEBIAN, *_NEEDS_FOLDER):
        raise UserError(f"--source {name}: must be one of {', '.join((_DEBIAN, *_NEEDS_FOLDER))}")
    if len(folders) != (name in _NEEDS_FOLDER):
        needs = "needs one folder after it" if name in _NEEDS_FOLDER else "takes no folder"
        raise UserError(f"--source {name}: {needs}, got {' '.join(folders) or 'none'}")
    if name == "text":
        return text_folder(Path(folders[0]), args.document_separator)
    if name == "jsonl":
        return jsonl_folder(Path(folders[0]), args.jsonl_field, args.jsonl_key_field)
    for family in args.debian_families:
        if family not in FAMILIES:
            raise UserError(f"--debian-families {family}: must be one of {', '.join(FAMILIES)}")
    return DebianDocs(tuple(family for family in FAMILIES if family in args.debian_families))


def build_settings(args: argparse.Namespace, source: MultilingualSource) -> MultilingualSettings:
    """Checks the flags before any work and returns the settings."""
    check_fractions(args.valid_fraction, args.test_fraction)
    check_tokenizer(args.tokenizer, args.vocab_size, args.tiktoken_ranks)
    check_alpha(args.vocab_sampling_alpha, "--vocab-sampling-alpha")
    return MultilingualSettings(
        languages=parse_languages(args.langs),
        filter_lines=source.filter_lines if args.line_filter == "auto" else args.line_filter == "on",
        vocab_size=args.vocab_size, vocab_sampling_alpha=args.vocab_sampling_alpha,
        tokenizer_model=args.tokenizer_model, tokenizer_lines=args.tokenizer_lines,
        max_mb_per_language=args.max_mb_per_language or None, valid_fraction=args.valid_fraction,
        test_fraction=args.test_fraction, tiktoken_ranks=args.tiktoken_ranks, seed=args.seed,
    )  # fmt: skip


def _say(line: str) -> None:
    """One line for the user, at once even into a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
