"""Labelled sentences or pairs in the layout of fairseq's ``sentence_prediction``: input0/, input1/, label/."""

import contextlib
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Optional, Sequence

from ..common.errors import UserError
from ..common.files import atomic_open, atomic_path, require_files, sha256_of
from ..data.classification import Example, Fields, Labels, file_format, found_labels, given_labels, read_examples
from ..data.languages import get_language
from ..data.vocabularies import MODEL_FILE, NUM_SPECIALS, RANKS_FILE, Vocabulary, find_vocabulary, open_vocabulary
from .base import DICTIONARY, Preparation, Settings
from .binarize import dataset_writer
from .sources.base import fingerprint
from .splits import SPLITS

_EOS = 2
_BATCH = 2000
_LABEL_DICTIONARY = "label/dict.txt"


class LabelledFile(NamedTuple):
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
    """Returns the files that ``--train``, ``--valid`` and ``--test`` name; ``words`` are ``LANG=FILE`` by split.

    Args:
        several_languages: whether a file may hold several languages.

    Raises:
        UserError: naming the flag and what is wrong with its word or file.
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
    """Labelled files, and a language model's dictionary and tokenizer; ``UserError`` unless these belong together."""

    files: Sequence[LabelledFile]
    folder: Path  # made by ``mhmoe prepare english`` or ``multilingual``, or by hand

    def __post_init__(self) -> None:
        if not (self.folder / DICTIONARY).is_file():
            raise UserError(
                f"--data {self.folder}: has no {DICTIONARY}; name the folder that the language model was trained on"
            )
        _ = self.vocabulary  # refuses a dictionary of another model

    @property
    def copied(self) -> list[str]:
        """The language model's files that the fine-tuning data copy."""
        return [DICTIONARY, *(file.name for file in filter(None, [find_vocabulary(self.folder)]))]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The language model's tokenizer."""
        from fairseq.data import Dictionary

        symbols = Dictionary.load(str(self.folder / DICTIONARY)).symbols[NUM_SPECIALS:]
        if (vocabulary := open_vocabulary(self.folder, symbols)) is None:
            raise UserError(f"--data {self.folder}: has neither {MODEL_FILE} nor {RANKS_FILE}")
        return vocabulary

    def identity(self) -> dict[str, Any]:
        """Returns names, sizes and hashes of the files by flag."""
        identity: dict[str, Any] = {split: {} for split in SPLITS}
        for file in self.files:
            identity[file.split][file.language] = fingerprint(file.path)
        identity["data"] = {name: sha256_of(self.folder / name) for name in self.copied}
        return identity


@dataclass(frozen=True)
class ClassificationSettings(Settings):
    """How the files are read; ``UserError`` names the flag of a bad value and its rule."""

    text_fields: Sequence[str]
    label_field: str
    language_field: Optional[str]
    labels: Optional[Sequence[str]] = None  # ``contradiction=contradictory``; None to find them in training files
    skip_labels: Sequence[str] = ()  # examples with these are left out

    def __post_init__(self) -> None:
        if len(self.text_fields) > 2 or len(set(self.text_fields)) < len(self.text_fields):
            raise UserError(f"--text-fields {' '.join(self.text_fields)}: must be one field or two different ones")
        if self.labels is not None:
            given_labels(self.labels, self.skip_labels, self.label_field)


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
        self.stage("language model", text.copied, self._copy_language_model)
        outputs, splits = [_LABEL_DICTIONARY, *text.copied], {}
        for file in text.files:
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

    def _check_all(self) -> Sequence[Sequence[str]]:
        """Reads every file once, so that the last one's mistakes show before the first is binarised."""
        settings = self.settings
        if settings.labels is None:
            examples = (example for file in self.source.files if file.split == "train" for example in self._read(file))
            labels = found_labels(examples, settings.skip_labels, settings.label_field)
        else:
            labels = given_labels(settings.labels, settings.skip_labels, settings.label_field)
        in_training: Counter[int] = Counter()
        for file in self.source.files:
            ids = (labels.find(example) for example in self._read(file))
            found = Counter(label for label in ids if label is not None)
            if not found:
                of_language = f" of language {file.language}" if settings.language_field else ""
                raise UserError(f"{file.flag}: no example{of_language} in it")
            if file.split == "train":
                in_training += found
        absent = [name for index, name in enumerate(labels.names) if not in_training[index]]
        if absent:
            raise UserError(f"--train: no example of class {absent[0]!r}, which could not be learnt")
        self.say(f"classes: {', '.join(labels.names)}")
        with atomic_open(self.partial / _LABEL_DICTIONARY) as stream:
            stream.writelines(f"{name} {in_training[index]}\n".encode() for index, name in enumerate(labels.names))
        return labels.spellings

    def _read(self, file: LabelledFile, others: Optional[Counter[str]] = None) -> Iterator[Example]:
        is_shared = sum(other.path.resolve() == file.path.resolve() for other in self.source.files) > 1
        names = self.settings
        fields = Fields(tuple(names.text_fields), names.label_field, names.language_field)
        return read_examples(file.path, fields, file.language, is_shared=is_shared, others=others)

    def _copy_language_model(self) -> None:
        for name in self.source.copied:
            with atomic_path(self.partial / name) as temporary:
                shutil.copyfile(self.source.folder / name, temporary)

    def _binarise_file(self, file: LabelledFile, labels: Labels) -> dict[str, Any]:
        vocabulary = self.source.vocabulary
        sizes = dict.fromkeys(self._folders, len(vocabulary.symbols)) | {"label": len(labels.names)}
        lengths: list[int] = []
        classes, others = Counter[Optional[int]](), Counter[str]()
        with contextlib.ExitStack() as stack:
            *inputs, add_label = (
                stack.enter_context(dataset_writer(self.partial / folder / file.name, NUM_SPECIALS + size))
                for folder, size in sizes.items()
            )
            examples = self._read(file, others)
            while batch := list(islice(examples, _BATCH)):
                found = [labels.find(example) for example in batch]
                classes.update(found)
                columns = zip(*(example.texts for example, index in zip(batch, found) if index is not None))
                encoded = [vocabulary.encode_lines(list(column)) for column in columns]
                for index, *sentences in zip((index for index in found if index is not None), *encoded):
                    for add, ids in zip(inputs, sentences):
                        add([*ids, _EOS])
                    add_label([NUM_SPECIALS + index, _EOS])
                    lengths.append(1 + sum(len(ids) + 1 for ids in sentences))
        skipped = classes.pop(None, 0)
        counts = {name: classes[index] for index, name in enumerate(labels.names)}
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
