"""Fetch or read images with captions, divide them, learn a vocabulary and a visual tokenizer on the training part,
and write everything that masked multimodal pre-training and fine-tuning read, in BEiT-3's formats."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..common.arguments import existing_folder, nonempty, output_folder, real, seed, whole
from ..common.errors import UserError
from ..common.files import require_files
from ..data.sentencepiece_vocabulary import MODELS, check_vocab_size
from ..prepare.image_text.beit3_folder import Completion, CompletionSettings
from ..prepare.image_text.console import say
from ..prepare.image_text.derived import DerivedSettings
from ..prepare.image_text.images import ImageSource
from ..prepare.image_text.pipeline import ImageTextSettings, prepare_image_text
from ..prepare.sources.images.emoji import EmojiSource
from ..prepare.sources.images.folder import FolderSource
from ..prepare.sources.images.tuxpaint import TuxPaintSource
from ..prepare.splits import SPLITS, check_fractions
from ..prepare.visual_tokenizers.fitting import FitSettings

_BEIT3 = "beit3-index"
_NEEDS_FOLDER = ("folder", _BEIT3)
SOURCES = ("emoji", "tuxpaint", *_NEEDS_FOLDER)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``mhmoe prepare image-text``."""
    parser.add_argument(
        "--source", nargs="+", default=["emoji"], metavar=("NAME", "DIR"),
        help="emoji; tuxpaint; 'folder DIR' with images and captions; 'beit3-index DIR', a folder of unilm's "
        "scripts, checked and completed in place",
    )  # fmt: skip
    parser.add_argument("--dest", type=output_folder, required=True, metavar="DIR", help="folder for the prepared data")
    parser.add_argument(
        "--cache-dir", type=output_folder, metavar="DIR", help="downloads; .mhmoe-downloads beside --dest if not given"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace data made with other settings")
    parser.add_argument("--seed", type=seed, default=1, help="decides what is held out, derived and fitted")
    parser.add_argument(
        "--valid-fraction", type=real(above=0, below=1), default=0.1, help="share of the things that are imaged"
    )
    parser.add_argument(
        "--test-fraction", type=real(above=0, below=1), default=0.1, help="share of the things that are imaged"
    )
    _add_text_arguments(parser.add_argument_group("text"))
    _add_image_arguments(parser.add_argument_group("visual tokenizer"))
    derived = parser.add_argument_group("derived questions and statements")
    derived.add_argument("--no-derived", action="store_true", help="make none")
    derived.add_argument(
        "--min-answer-count", type=whole(), default=3, metavar="N", help="rarer answers are no classes"
    )
    derived.add_argument("--statements", type=whole(), default=10_000, metavar="N", help="of the training part")


def _add_text_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--langs", type=nonempty, default="en", metavar="CODES", help="of captions, with commas in between"
    )
    group.add_argument("--vocab-size", type=whole(), default=2000, metavar="N", help="SentencePiece's pieces")
    group.add_argument("--tokenizer-model", choices=MODELS, default="unigram", help="SentencePiece's model")
    group.add_argument(
        "--text-data", type=existing_folder, metavar="DIR",
        help="text without images: a folder of mhmoe prepare english, or one with train.txt, valid.txt and test.txt",
    )  # fmt: skip


def _add_image_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--no-visual-tokenizer", action="store_true", help="fit none (mhmoe visual-tokenizer fit does)")
    group.add_argument("--image-size", type=whole(), default=64, metavar="PIXELS", help="side of the images it takes")
    group.add_argument("--patch-size", type=whole(), default=16, metavar="PIXELS", help="side of a patch")
    group.add_argument("--visual-vocab-size", type=whole(), default=512, metavar="N", help="number of codes")


def run(args: argparse.Namespace) -> int:
    """Prepares the images; raises ``UserError`` for anything the user can mend."""
    source, settings = build_source(args), build_settings(args)
    if source is None:
        _complete(Path(args.source[1]), args.dest, CompletionSettings(settings.text_data, settings.tokenizer))
        return 0
    cache_dir = args.cache_dir or args.dest.absolute().parent / ".mhmoe-downloads"
    say(f"source: {source.name}; licence: {source.licence}")
    prepare_image_text(source, settings, args.dest, cache_dir=cache_dir, overwrite=args.overwrite, say=say)
    return 0


def _complete(folder: Path, dest: Path, settings: CompletionSettings) -> None:
    if dest.resolve() != folder.resolve():
        raise UserError(
            f"--dest {dest}: must be {folder} itself, where the missing files are put: the images are not copied"
        )
    manifest = Completion(folder, settings, say).run()
    say(f"done: {folder}, {len(manifest['made'])} files made here")


def build_source(args: argparse.Namespace) -> ImageSource | None:
    """The source that ``--source`` names; None for beit3-index, which is no source but a folder to complete.

    Raises:
        UserError: an unknown name, a folder where none belongs, or none where one does.
    """
    name, folders = args.source[0], args.source[1:]
    if name not in SOURCES:
        raise UserError(f"--source {name}: must be one of {', '.join(SOURCES)}")
    if len(folders) != (name in _NEEDS_FOLDER):
        needs = "needs one folder after it" if name in _NEEDS_FOLDER else "takes no folder"
        raise UserError(f"--source {name}: {needs}, got {' '.join(folders) or 'none'}")
    if name == "folder":
        return FolderSource(Path(folders[0]))
    return {"emoji": EmojiSource(), "tuxpaint": TuxPaintSource()}.get(name)


def build_settings(args: argparse.Namespace) -> ImageTextSettings:
    """Checks the flags before any work and returns the settings."""
    check_fractions(args.valid_fraction, args.test_fraction)
    check_vocab_size(args.vocab_size)
    tokenizer = FitSettings(args.visual_vocab_size, args.patch_size, args.image_size, args.seed)
    tokenizer.check("--visual-vocab-size")
    return ImageTextSettings(
        languages=parse_codes(args.langs), vocab_size=args.vocab_size, tokenizer_model=args.tokenizer_model,
        text_data=_text_folder(args.text_data), valid_fraction=args.valid_fraction, test_fraction=args.test_fraction,
        seed=args.seed, derived=None if args.no_derived else DerivedSettings(args.min_answer_count, args.statements),
        tokenizer=None if args.no_visual_tokenizer else tokenizer,
    )  # fmt: skip


def parse_codes(langs: str) -> tuple[str, ...]:
    """The languages of ``--langs``; ``UserError`` when there is none."""
    codes = tuple(dict.fromkeys(code.strip() for code in langs.split(",") if code.strip()))
    if not codes:
        raise UserError(f"--langs {langs!r}: must name at least one language")
    return codes


def _text_folder(folder: Path | None) -> Path | None:
    """The folder with train.txt, valid.txt and test.txt; those of a prepared folder are in its text/."""
    if folder is None:
        return None
    inner = folder / "text" if (folder / "text").is_dir() else folder
    require_files([inner / f"{split}.txt" for split in SPLITS], "--text-data")
    return inner
