"""From labelled files to a folder in the layout of fairseq's ``sentence_prediction``: input0/, input1/, label/."""

from __future__ import annotations

import contextlib
import datetime
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Sequence

import numpy as np

from ...common.errors import UserError
from ...common.files import atomic_path
from ...data.classification.examples import Example, Fields, read_examples
from ...data.classification.labels import Labels, found_labels, given_labels
from ...data.vocabulary import NUM_SPECIALS
from ..english import tool_versions
from ..workspace import Workspace, prepare_folder
from .language_model import LanguageModelText

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
        """Of the data set: ``valid_de``."""
        return f"{self.split}_{self.language}"

    @property
    def flag(self) -> str:
        """As the user gave it."""
        return f"--{self.split} {self.language}={self.path}"


@dataclass(frozen=True)
class ClassificationSettings:
    """How the files are read.

    Args:
        fields: names of the fields.
        labels: of the classes, with other spellings (``contradiction=contradictory``); None to take them from the
            training files.
        skipped_labels: examples with these are left out.
    """

    fields: Fields
    labels: Optional[tuple[str, ...]] = None
    skipped_labels: tuple[str, ...] = ()


class Preparation:
    """One run over the stages of one workspace."""

    def __init__(
        self,
        files: Sequence[LabelledFile],
        settings: ClassificationSettings,
        text: LanguageModelText,
        workspace: Workspace,
        say: Callable[[str], None],
    ):
        self._files = files
        self._settings = settings
        self._text = text
        self._workspace = workspace
        self._say = say
        self._partial = workspace.partial
        self._folders = [f"input{index}" for index in range(len(settings.fields.texts))]

    def run(self) -> dict[str, Any]:
        """Reads and checks every file, then binarises each; returns the manifest."""
        spellings = self._workspace.stage("labels", [_LABEL_DICTIONARY], self._check_all)
        labels = Labels(
            tuple(map(tuple, spellings)), frozenset(self._settings.skipped_labels), str(self._settings.fields.label),
            are_ordered=self._settings.labels is not None,
        )  # fmt: skip
        self._workspace.stage("language model", list(self._text.files), self._copy_language_model)
        outputs = [_LABEL_DICTIONARY, *self._text.files]
        splits = {}
        for file in self._files:
            made = [f"{folder}/{file.name}.{end}" for folder in (*self._folders, "label") for end in ("bin", "idx")]
            splits[file.name] = self._workspace.stage(
                f"binarise {file.name}", made, partial(self._binarise, file, labels)
            )
            outputs += made
        manifest = {
            "format": 1,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "classes": labels.names,
            "fields": list(self._settings.fields.texts),
            "tokenizer": self._text.vocabulary.describe(),
            "splits": splits,
            "tools": tool_versions(),
        }
        return self._workspace.publish(manifest, outputs)

    def _check_all(self) -> list[list[str]]:
        """Reads every file once, so that the last one's mistakes show before the first is binarised."""
        fields, settings = self._settings.fields, self._settings
        train = [file for file in self._files if file.split == "train"]
        if settings.labels is None:
            examples = (example for file in train for example in self._read(file))
            labels = found_labels(examples, settings.skipped_labels, str(fields.label))
        else:
            labels = given_labels(settings.labels, settings.skipped_labels, str(fields.label))
        in_training: Counter[int] = Counter()
        for file in self._files:
            classes = [labels.find(example) for example in self._read(file)]
            found = Counter(index for index in classes if index is not None)
            if not found:
                of_language = f" of language {file.language}" if fields.language else ""
                raise UserError(f"{file.flag}: no example{of_language} in it")
            if file.split == "train":
                in_training += found
        absent = [name for index, name in enumerate(labels.names) if not in_training[index]]
        if absent:
            raise UserError(f"--train: no example of class {absent[0]!r}, which could not be learnt")
        self._say(f"classes: {', '.join(labels.names)}")
        with atomic_path(self._partial / _LABEL_DICTIONARY) as temporary:
            lines = (f"{name} {in_training[index]}\n" for index, name in enumerate(labels.names))
            temporary.write_text("".join(lines), encoding="utf-8")
        return [list(spellings) for spellings in labels.spellings]

    def _read(self, file: LabelledFile, others: Optional[Counter[str]] = None) -> Iterator[Example]:
        is_shared = sum(other.path.resolve() == file.path.resolve() for other in self._files) > 1
        return read_examples(file.path, self._settings.fields, file.language, is_shared=is_shared, others=others)

    def _copy_language_model(self) -> None:
        for name in self._text.files:
            with atomic_path(self._partial / name) as temporary:
                shutil.copyfile(self._text.folder / name, temporary)

    def _binarise(self, file: LabelledFile, labels: Labels) -> dict[str, Any]:
        prefixes = [self._partial / folder / file.name for folder in self._folders]
        vocab_size = len(self._text.vocabulary.symbols) + NUM_SPECIALS
        lengths: list[int] = []
        classes: Counter[str] = Counter()
        others: Counter[str] = Counter()
        skipped = 0
        with contextlib.ExitStack() as stack:
            inputs = [stack.enter_context(_builder(prefix, vocab_size)) for prefix in prefixes]
            label_prefix = self._partial / "label" / file.name
            add_label = stack.enter_context(_builder(label_prefix, NUM_SPECIALS + len(labels.names)))
            for batch in _batches(self._read(file, others)):
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
        self._say(
            f"{file.name}: {len(lengths)} examples ({', '.join(f'{name} {count}' for name, count in counts.items())}), "
            f"{skipped} left out{_in_other_languages(others)}, {tokens / len(lengths):.1f} tokens on average, "
            f"the longest {longest}"
        )
        return {
            "language": file.language, "examples": len(lengths), "skipped": skipped, "classes": counts,
            "tokens": tokens, "longest": longest, "in_other_languages": dict(others),
        }  # fmt: skip

    def _encode(self, examples: list[Example]) -> Iterator[tuple[list[int], ...]]:
        """The ids of each example's one or two sentences, without end marks."""
        columns = zip(*(example.texts for example in examples))
        return zip(*(self._text.vocabulary.encode_lines(list(column)) for column in columns))


def _in_other_languages(others: Counter[str]) -> str:
    counts = ", ".join(f"{tag} {count}" for tag, count in sorted(others.items()))
    return f" (of other languages besides: {counts})" if others else ""


@contextlib.contextmanager
def _builder(prefix: Path, vocab_size: int) -> Iterator[Callable[[list[int]], None]]:
    """Adds lines of ids to ``prefix.bin`` and ``prefix.idx``, which appear together at the end."""
    import torch
    from fairseq.data import indexed_dataset

    with atomic_path(prefix.with_suffix(".idx")) as index, atomic_path(prefix.with_suffix(".bin")) as data:
        builder = indexed_dataset.make_builder(str(data), impl="mmap", vocab_size=vocab_size)
        yield lambda ids: builder.add_item(torch.from_numpy(np.array(ids, dtype=np.int64)))
        builder.finalize(str(index))


def _batches(examples: Iterator[Example]) -> Iterator[list[Example]]:
    while batch := list(islice(examples, _BATCH)):
        yield batch


def prepare(
    files: Sequence[LabelledFile],
    settings: ClassificationSettings,
    text: LanguageModelText,
    dest: Path,
    *,
    overwrite: bool,
    identity: dict[str, Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Prepares ``files`` into ``dest`` and returns the manifest; does nothing if that was done before.

    Args:
        identity: the settings by flag name that decide whether an earlier preparation is the same one.

    Raises:
        UserError: bad input, other settings already in ``dest``, no room.
    """
    return prepare_folder(
        dest, identity, lambda workspace: Preparation(files, settings, text, workspace, say).run(),
        overwrite=overwrite, say=say,
    )  # fmt: skip
