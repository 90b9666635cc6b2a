"""Labelled sentences or pairs in the layout of fairseq's ``sentence_prediction``: input0/, input1/, label/."""

import contextlib
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional, Sequence

from ..common.errors import UserError
from ..common.files import atomic_path, require_files, sha256_of
from ..data.classification.examples import Example, Fields, file_format, read_examples
from ..data.classification.labels import Labels, found_labels, given_labels
from ..data.languages import get_language
from ..data.vocabularies import NUM_SPECIALS, SentencePieceVocabulary, TiktokenVocabulary, Vocabulary
from .base import DICTIONARY, MODEL_FILE, Preparation, Settings
from .binarize import dataset_writer
from .sources.base import fingerprint
from .splits import SPLITS

_EOS = 2
_BATCH = 2000
_LABEL_DICTIONARY = "label/dict.txt"


@dataclass(frozen=True)
class LabelledFile:
    """One input: which split and language it is, and where."""

    split: str
    language: str
    path: Path

    @property
    def name(self) -> str:
        """The name of the data set: ``valid_de``."""
        return f"{self.split}_{self.language}"

    @property
    def flag(self) -> str:
        """What the user gave."""
        return f"--{self.split} {self.language}={self.path}"


def labelled_files(words: Mapping[str, Sequence[str]], several_languages: bool) -> list[LabelledFile]:
    """Returns the files that ``--train``, ``--valid`` and ``--test`` name.

    Args:
        words: ``LANG=FILE`` by split.
        several_languages: whether a file may hold several languages.

    Raises:
        UserError: a word that is not LANG=FILE, an unknown language, one given twice, a file that is missing, of
            another format, or given for two languages or splits.
    """
    files: list[LabelledFile] = []
    for split, word in [(part, word) for part in SPLITS for word in words[part]]:
        code, separator, path = word.partition("=")
        if not separator or not path:
            raise UserError(f"--{split} {word}: must be LANG=FILE, such as en={word}")
        get_language(code, f"--{split}")
        new = LabelledFile(split, code, Path(path))
        require_files([new.path], f"--{split}")
        file_format(new.path)
        for old in files:
            if old.name == new.name:
                raise UserError(f"{new.flag}: --{split} has a file for {code} already, {old.path}")
            same_examples = not several_languages or old.language == code
            if same_examples and old.path.resolve() == new.path.resolve():
                raise UserError(
                    f"{new.flag}: is the file of --{old.split} {old.language}; of a file with several languages give "
                    "the --language-field"
                )
        files.append(new)
    return files


@dataclass(frozen=True)
class LabelledText:
    """What is prepared: labelled files, and what turns text into the ids that a language model knows.

    Args:
        files: the labelled files.
        folder: prepared data of the language model.
        vocabulary: its tokenizer.
        copied: the language model's files that the fine-tuning data copy, by name.
        tiktoken_ranks: its rank file, if it has one.
    """

    files: Sequence[LabelledFile]
    folder: Path
    vocabulary: Vocabulary
    copied: tuple[str, ...]
    tiktoken_ranks: Optional[Path] = None

    def identity(self) -> dict[str, Any]:
        """Returns names, sizes and hashes of the files by flag."""
        identity: dict[str, Any] = {split: {} for split in SPLITS}
        for file in self.files:
            identity[file.split][file.language] = fingerprint(file.path)
        identity["data"] = {name: sha256_of(self.folder / name) for name in self.copied}
        if self.tiktoken_ranks is not None:
            identity["tiktoken_ranks"] = sha256_of(self.tiktoken_ranks)
        return identity


def open_labelled_text(files: Sequence[LabelledFile], folder: Path, tiktoken_ranks: Optional[Path]) -> LabelledText:
    """Opens the dictionary and the tokenizer in ``folder`` and compares them.

    Args:
        folder: made by ``mhmoe prepare english`` or ``multilingual``, or by hand.
        tiktoken_ranks: rank file, where the model was trained with one.

    Raises:
        UserError: one of the two is missing, or they do not belong together.
    """
    dictionary, tokenizer = folder / DICTIONARY, tiktoken_ranks or folder / MODEL_FILE
    if not dictionary.is_file():
        raise UserError(f"--data {folder}: has no {DICTIONARY}; name the folder that the language model was trained on")
    if tiktoken_ranks is None and not tokenizer.is_file():
        raise UserError(f"--data {folder}: has no {MODEL_FILE}; of a model with tiktoken give --tiktoken-ranks FILE")
    vocabulary = (SentencePieceVocabulary if tiktoken_ranks is None else TiktokenVocabulary)(tokenizer)
    _compare(dictionary, tokenizer, vocabulary)
    copied = (DICTIONARY, MODEL_FILE) if tiktoken_ranks is None else (DICTIONARY,)
    return LabelledText(files, folder, vocabulary, copied, tiktoken_ranks)


def _compare(file: Path, tokenizer: Path, vocabulary: Vocabulary) -> None:
    """``UserError`` unless the dictionary starts with the tokenizer's symbols; others, as languages', may follow."""
    from fairseq.data import Dictionary

    symbols = Dictionary.load(str(file)).symbols[NUM_SPECIALS:]
    for index, symbol in enumerate(vocabulary.symbols):
        if index >= len(symbols) or symbols[index] != symbol:
            found = repr(symbols[index]) if index < len(symbols) else "its end"
            raise UserError(
                f"{file}:{index + 1}: {found} where {tokenizer} has {symbol!r}: the dictionary is another model's"
            )


@dataclass(frozen=True)
class ClassificationSettings(Settings):
    """How the files are read.

    Args:
        text_fields, label_field, language_field: names of the fields.
        labels: the classes, with other spellings (``contradiction=contradictory``); None to take them from the
            training files.
        skip_labels: examples with these are left out.

    Raises:
        UserError: naming the flag and the rule that it breaks.
    """

    text_fields: Sequence[str]
    label_field: str
    language_field: Optional[str]
    labels: Optional[Sequence[str]] = None
    skip_labels: Sequence[str] = ()

    def __post_init__(self) -> None:
        if len(self.text_fields) > 2 or len(set(self.text_fields)) < len(self.text_fields):
            raise UserError(f"--text-fields {' '.join(self.text_fields)}: must be one field or two different ones")
        if self.labels is not None:
            given_labels(self.labels, self.skip_labels, self.label_field)

    @property
    def fields(self) -> Fields:
        """The names of the fields."""
        return Fields(tuple(self.text_fields), self.label_field, self.language_field)


class ClassificationPreparation(Preparation[ClassificationSettings]):
    """Prepares a :class:`LabelledText`."""

    kind = "classification"

    def identity(self) -> dict[str, Any]:
        """Returns the settings by flag that decide the prepared data."""
        return {**self.source.identity(), **self.settings.identity()}

    def make(self) -> dict[str, Any]:
        """Reads and checks every file, then binarises each; returns the manifest."""
        text, settings = self.source, self.settings
        spellings = self.stage("labels", [_LABEL_DICTIONARY], self._check_all)
        labels = Labels(
            tuple(map(tuple, spellings)), frozenset(settings.skip_labels), settings.label_field,
            are_ordered=settings.labels is not None,
        )  # fmt: skip
        self.stage("language model", list(text.copied), self._copy_language_model)
        outputs, splits = [_LABEL_DICTIONARY, *text.copied], {}
        for file in self.source.files:
            made = [f"{folder}/{file.name}.{end}" for folder in (*self._folders, "label") for end in ("bin", "idx")]
            splits[file.name] = self.stage(f"binarise {file.name}", made, partial(self._binarise_file, file, labels))
            outputs += made
        entries = {
            "classes": labels.names,
            "fields": list(settings.text_fields),
            "tokenizer": text.vocabulary.describe(),
            "splits": splits,
        }
        return self.publish(entries, outputs)

    @property
    def _folders(self) -> list[str]:
        return [f"input{index}" for index in range(len(self.settings.text_fields))]

    def _check_all(self) -> list[list[str]]:
        """Reads every file once, so that the last one's mistakes show before the first is binarised."""
        settings = self.settings
        if settings.labels is None:
            examples = (example for file in self.source.files if file.split == "train" for example in self._read(file))
            labels = found_labels(examples, settings.skip_labels, settings.label_field)
        else:
            labels = given_labels(settings.labels, settings.skip_labels, settings.label_field)
        in_training: Counter[int] = Counter()
        for file in self.source.files:
            classes = [labels.find(example) for example in self._read(file)]
            found = Counter(index for index in classes if index is not None)
            if not found:
                of_language = f" of language {file.language}" if settings.language_field else ""
                raise UserError(f"{file.flag}: no example{of_language} in it")
            if file.split == "train":
                in_training += found
        absent = [name for index, name in enumerate(labels.names) if not in_training[index]]
        if absent:
            raise UserError(f"--train: no example of class {absent[0]!r}, which could not be learnt")
        self.say(f"classes: {', '.join(labels.names)}")
        with atomic_path(self.partial / _LABEL_DICTIONARY) as temporary:
            lines = (f"{name} {in_training[index]}\n" for index, name in enumerate(labels.names))
            temporary.write_text("".join(lines), encoding="utf-8")
        return [list(spellings) for spellings in labels.spellings]

    def _read(self, file: LabelledFile, others: Optional[Counter[str]] = None) -> Iterator[Example]:
        is_shared = sum(other.path.resolve() == file.path.resolve() for other in self.source.files) > 1
        return read_examples(file.path, self.settings.fields, file.language, is_shared=is_shared, others=others)

    def _copy_language_model(self) -> None:
        for name in self.source.copied:
            with atomic_path(self.partial / name) as temporary:
                shutil.copyfile(self.source.folder / name, temporary)

    def _binarise_file(self, file: LabelledFile, labels: Labels) -> dict[str, Any]:
        prefixes = [self.partial / folder / file.name for folder in self._folders]
        vocab_size = len(self.source.vocabulary.symbols) + NUM_SPECIALS
        lengths: list[int] = []
        classes, others = Counter[str](), Counter[str]()
        skipped = 0
        with contextlib.ExitStack() as stack:
            inputs = [stack.enter_context(dataset_writer(prefix, vocab_size)) for prefix in prefixes]
            label_prefix = self.partial / "label" / file.name
            add_label = stack.enter_context(dataset_writer(label_prefix, NUM_SPECIALS + len(labels.names)))
            examples = self._read(file, others)
            while batch := list(islice(examples, _BATCH)):
                kept = [(example, index) for example in batch if (index := labels.find(example)) is not None]
                skipped += len(batch) - len(kept)
                for sentences, (_, index) in zip(self._encode([example for example, _ in kept]), kept):
                    for add, ids in zip(inputs, sentences):
                        add([*ids, _EOS])
                    add_label([NUM_SPECIALS + index, _EOS])
                    classes[labels.names[index]] += 1
                    lengths.append(1 + sum(len(ids) + 1 for ids in sentences))
        counts = {name: classes[name] for name in labels.names}
        tokens, longest = sum(lengths), max(lengths)
        other_languages = ", ".join(f"{tag} {count}" for tag, count in sorted(others.items()))
        besides = f" (of other languages besides: {other_languages})" if others else ""
        self.say(
            f"{file.name}: {len(lengths)} examples ({', '.join(f'{name} {count}' for name, count in counts.items())}), "
            f"{skipped} left out{besides}, {tokens / len(lengths):.1f} tokens on average, the longest {longest}"
        )
        return {
            "language": file.language, "examples": len(lengths), "skipped": skipped, "classes": counts,
            "tokens": tokens, "longest": longest, "in_other_languages": dict(others),
        }  # fmt: skip

    def _encode(self, examples: list[Example]) -> Iterator[tuple[list[int], ...]]:
        """Yields the ids of each example's one or two sentences, without end marks."""
        columns = zip(*(example.texts for example in examples))
        return zip(*(self.source.vocabulary.encode_lines(list(column)) for column in columns))
