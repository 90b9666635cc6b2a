"""Fetch, clean, split by document, learn a vocabulary on the training part, and binarise for fairseq."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..common.arguments import existing_file, nonempty, output_folder, real, seed, whole
from ..common.errors import UserError
from ..common.files import sha256_of
from ..data.documents import DEDUP_CHOICES
from ..data.sentencepiece_vocabulary import MODELS
from ..data.tiktoken_vocabulary import TOKENIZERS, check_tokenizer
from ..prepare.english import PrepareSettings, prepare
from ..prepare.sources import Source
from ..prepare.sources.docstrings import DEFAULT_PACKAGES, DocstringSource
from ..prepare.sources.local_files import BLANK_LINE, JsonlSource, TextSource, TorchscaleShardSource
from ..prepare.sources.packaged import BROWN, WEB_BIBLE, linux_doc
from ..prepare.splits import check_fractions

_NEEDS_FILES = ("text", "jsonl", "torchscale-shards")
SOURCES = ("web-bible", "brown", "docstrings", "linux-doc", *_NEEDS_FILES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``mhmoe prepare english``."""
    parser.add_argument(
        "--source", nargs="+", default=["web-bible"], metavar=("NAME", "FILE"),
        help=f"{', '.join(SOURCES[:4])}, or 'text FILE...', 'jsonl FILE...', 'torchscale-shards DIR'",
    )  # fmt: skip
    parser.add_argument("--dest", type=output_folder, required=True, metavar="DIR", help="folder for the prepared data")
    parser.add_argument(
        "--cache-dir", type=output_folder, metavar="DIR", help="downloads; .mhmoe-downloads beside --dest if not given"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace data made with other settings")
    parser.add_argument("--seed", type=seed, default=1, help="decides which documents are held out")
    parser.add_argument(
        "--valid-fraction", type=real(at_least=0, below=1), default=0.05, help="share of the bytes; 0 for none"
    )
    parser.add_argument(
        "--test-fraction", type=real(at_least=0, below=1), default=0.05, help="share of the bytes; 0 for none"
    )
    parser.add_argument(
        "--dedup", choices=DEDUP_CHOICES, default="lines",
        help="what is kept only where it occurs first in the whole corpus, before the split",
    )  # fmt: skip
    text = parser.add_argument_group("sources")
    text.add_argument(
        "--jsonl-field", type=nonempty, default="text", metavar="NAME", help="field that holds a document's text"
    )
    text.add_argument(
        "--document-separator", type=nonempty, default=BLANK_LINE, metavar="SEP",
        help="for text: blank-line, file (a file is a document), line (a line is one), or the text of a separator line",
    )  # fmt: skip
    text.add_argument(
        "--docstring-packages",
        type=nonempty,
        nargs="+",
        default=list(DEFAULT_PACKAGES),
        metavar="NAME",
        help="for docstrings",
    )
    text.add_argument(
        "--deb-package", type=nonempty, default="linux-doc-6.1", metavar="NAME", help="for linux-doc: its name here"
    )
    vocabulary = parser.add_argument_group("vocabulary")
    vocabulary.add_argument("--tokenizer", choices=TOKENIZERS, default="sentencepiece", help="kind")
    vocabulary.add_argument("--tokenizer-model", choices=MODELS, default="unigram", help="SentencePiece's model")
    vocabulary.add_argument(
        "--tokenizer-lines",
        type=whole(),
        default=2_000_000,
        metavar="N",
        help="learn pieces from at most about N lines",
    )
    vocabulary.add_argument("--vocab-size", type=whole(), default=8000, metavar="N", help="entries of the dictionary")
    vocabulary.add_argument(
        "--tiktoken-ranks", type=existing_file, metavar="FILE", help="rank file for --tokenizer tiktoken"
    )


def run(args: argparse.Namespace) -> int:
    """Prepares the corpus; raises ``UserError`` for anything the user can mend."""
    source, settings = build_source(args), build_settings(args)
    cache_dir = args.cache_dir or args.dest.absolute().parent / ".mhmoe-downloads"
    _say(f"source: {source.name}; {source.unit}; licence: {source.licence}")
    prepare(
        source, settings, args.dest, cache_dir=cache_dir, overwrite=args.overwrite,
        identity=identify(args, source, settings), say=_say,
    )  # fmt: skip
    return 0


def build_source(args: argparse.Namespace) -> Source:
    """The source that ``--source`` names.

    Raises:
        UserError: an unknown name, files where none belong, or none where they do.
    """
    name, files = args.source[0], tuple(Path(file) for file in args.source[1:])
    if name not in SOURCES:
        raise UserError(f"--source {name}: must be one of {', '.join(SOURCES)}")
    if (name in _NEEDS_FILES) != bool(files):
        needs = "needs at least one file after it" if name in _NEEDS_FILES else f"takes no files, but got {files[0]}"
        raise UserError(f"--source {name}: {needs}")
    if name == "text":
        return TextSource(files, args.document_separator)
    if name == "jsonl":
        return JsonlSource(files, args.jsonl_field)
    if name == "torchscale-shards":
        if len(files) > 1 or not files[0].is_dir():
            named = " ".join(map(str, files))
            raise UserError(f"--source torchscale-shards {named}: must be one folder with json/ in it")
        return TorchscaleShardSource(files[0])
    if name == "docstrings":
        return DocstringSource(tuple(args.docstring_packages))
    return {"web-bible": WEB_BIBLE, "brown": BROWN}.get(name) or linux_doc(args.deb_package)


def build_settings(args: argparse.Namespace) -> PrepareSettings:
    """Checks the flags before any work and returns the settings."""
    check_fractions(args.valid_fraction, args.test_fraction)
    check_tokenizer(args.tokenizer, args.vocab_size, args.tiktoken_ranks)
    return PrepareSettings(
        vocab_size=args.vocab_size, tokenizer=args.tokenizer, tokenizer_model=args.tokenizer_model,
        tokenizer_lines=args.tokenizer_lines, tiktoken_ranks=args.tiktoken_ranks, dedup=args.dedup,
        valid_fraction=args.valid_fraction, test_fraction=args.test_fraction, seed=args.seed,
    )  # fmt: skip


def identify(args: argparse.Namespace, source: Source, settings: PrepareSettings) -> dict[str, Any]:
    """Settings by flag that decide the prepared data: only those that have a say for this source and tokenizer."""
    identity: dict[str, Any] = {
        "source": {"name": source.name, **source.identity()}, "dedup": settings.dedup, "seed": settings.seed,
        "valid_fraction": settings.valid_fraction, "test_fraction": settings.test_fraction,
        "tokenizer": settings.tokenizer,
    }  # fmt: skip
    if source.name == "text":
        identity["document_separator"] = args.document_separator
    if source.name == "jsonl":
        identity["jsonl_field"] = args.jsonl_field
    if settings.tiktoken_ranks is not None:
        identity["tiktoken_ranks"] = sha256_of(settings.tiktoken_ranks)
    else:
        identity["vocab_size"] = settings.vocab_size
        identity["tokenizer_model"] = settings.tokenizer_model
        identity["tokenizer_lines"] = settings.tokenizer_lines
    return identity


def _say(line: str) -> None:
    """One line for the user, at once even into a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
