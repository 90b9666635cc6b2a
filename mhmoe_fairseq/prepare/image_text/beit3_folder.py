"""Folders as unilm's BEiT-3 scripts make them: checked, and completed by what pre-training here needs besides.

Nothing that is there is changed. Missing are, as a rule: the dictionary (written from the SentencePiece model), the
indexes for pre-training (made from those of captioning, retrieval and ImageNet), text without images, the visual
tokenizer, and a manifest.
"""

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any, Iterable, Iterator, Optional

import numpy as np

from ...common.errors import UserError
from ...common.files import atomic_open, atomic_path, read_utf8_lines, refuse_path_separator, write_json
from ...common.locks import LOCK, exclusive_lock
from ...data.documents import clean_line
from ...data.identity import MANIFEST, read_manifest
from ...data.multimodal.answers import ANSWERS_FILE, read_answers
from ...data.multimodal.index import NAMES, TASKS, Index, index_files, read_index, write_index
from ...data.vocabulary import NUM_SPECIALS, build_dictionary, save_dictionary
from ..archives import Say
from ..base import DICTIONARY, MODEL_FILE, complete_manifest
from ..binarize import binarize, dataset_writer
from ..splits import SPLITS
from ..visual_tokenizers.settings import TOKENIZER_FILE, KMeansSettings
from ..workspace import describe_files
from .pipeline import KIND, MASK

_UPSTREAM_MODEL = "beit3.spm"
_SOURCE = "beit3-index"
_EOS, _UNK = 2, 3


class PieceVocabulary:
    """A SentencePiece model of anyone's making in fairseq's order: its pieces from dictionary index 4 on.

    For BEiT-3's ``beit3.spm`` (``<unk>`` 0, ``<s>`` 1, ``</s>`` 2) these are the ids of the tokenizer that unilm's
    scripts use; a ``<mask>`` after the last piece makes them whole.

    Raises:
        UserError: the file is not a SentencePiece model.
    """

    def __init__(self, path: Path):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: not a SentencePiece model ({' '.join(str(error).split())})") from error
        size = self._model.vocab_size()
        plain = [index for index in range(size) if not (self._model.is_control(index) or self._model.is_unknown(index))]
        self.symbols = [self._model.id_to_piece(index) for index in plain]
        self._ids = np.full(size, _UNK)
        self._ids[plain] = np.arange(NUM_SPECIALS, NUM_SPECIALS + len(plain))

    def encode_lines(self, lines: list[str]) -> list[list[int]]:
        """Returns dictionary indices of each line, without an end mark."""
        return [self._ids[ids].tolist() for ids in self._model.encode(lines, num_threads=1)]

    def describe(self) -> dict[str, object]:
        """Returns its size."""
        return {"kind": "sentencepiece", "pieces": self._model.vocab_size()}


class Completion:
    """One run over one folder; :attr:`made` are the files that it wrote.

    Args:
        text_data: folder with ``train.txt``, ``valid.txt`` and ``test.txt``; None for the captions themselves.
        tokenizer: settings of the visual tokenizer; without them no tokenizer is fitted.
    """

    def __init__(
        self, folder: Path, say: Say, text_data: Optional[Path] = None, tokenizer: Optional[KMeansSettings] = None
    ):
        self._folder = folder
        self._say = say
        self._text_data = text_data
        self._tokenizer = tokenizer
        self.made: list[str] = []

    def run(self) -> dict[str, Any]:
        """Checks and completes the folder; returns the manifest.

        Raises:
            UserError: naming file and line of what is wrong.
        """
        flag = f"--source {_SOURCE}"
        if not self._folder.is_dir():
            raise UserError(f"{flag} {self._folder}: no such folder")
        refuse_path_separator(self._folder, flag)
        source = read_manifest(self._folder).get("source", {"name": _SOURCE}).get("name")
        if source != _SOURCE:
            raise UserError(f"{flag} {self._folder}: was made from {source}, there is nothing to complete")
        with exclusive_lock(self._folder / LOCK, flag):
            counts = {"dictionary": len(self._symbols), **self._check_indexes()}
            for make in (self._make_pairs, self._make_images, self._make_texts):
                for split in SPLITS:
                    make(split)
            return self._write_manifest(counts, self._fit_tokenizer())

    @cached_property
    def _symbols(self) -> list[str]:
        """The dictionary, written first where it is missing."""
        from fairseq.data import Dictionary

        path = self._folder / DICTIONARY
        if not path.is_file():
            self._write_dictionary(path)
        symbols = Dictionary.load(str(path)).symbols
        if MASK not in symbols:
            raise UserError(f"{path}: has no {MASK}, which stands after the last piece")
        return symbols

    def _write_dictionary(self, path: Path) -> None:
        upstream, model = self._folder / _UPSTREAM_MODEL, self._folder / MODEL_FILE
        if not model.is_file():
            if not upstream.is_file():
                raise UserError(f"{self._folder}: has neither {DICTIONARY} nor {_UPSTREAM_MODEL} nor {MODEL_FILE}")
            with atomic_path(model) as temporary:
                shutil.copyfile(upstream, temporary)
            self._note(MODEL_FILE)
        symbols = PieceVocabulary(model).symbols
        counts = np.zeros(NUM_SPECIALS + len(symbols), dtype=np.int64)
        save_dictionary(build_dictionary(symbols, counts, [MASK], multiple=1), path)
        self._note(DICTIONARY)

    def _note(self, *names: str) -> None:
        for name in names:
            self.made.append(name)
            self._say(f"made: {name}")

    def _check_indexes(self) -> dict[str, int]:
        """Reads every index that is there, to its last line; returns lines by file."""
        counts: dict[str, int] = {}
        for task, split, name in _all_indexes():
            files = index_files(self._folder, task, split, name)
            if not files[0].is_file() or files[0].name in counts:
                continue
            index = self._read(task, split, name)
            self._check_images(index)
            if task == "vqa":
                self._check_labels(index)
            counts[files[0].name] = len(index)
            self._say(f"index: {', '.join(file.name for file in files)}: {len(index)} lines")
        if not counts:
            raise UserError(f"--source {_SOURCE} {self._folder}: has none of BEiT-3's index files")
        return counts

    def _read(self, task: str, split: str, name: str | None = None) -> Index:
        return read_index(self._folder, task, split, name, vocabulary_size=len(self._symbols))

    def _check_images(self, index: Index) -> None:
        for field in ("image_path", "image2_path"):
            paths = [self._folder / index[field][row] for row in range(len(index))] if field in index else []
            missing = [row for row, path in enumerate(paths) if not path.is_file()]
            if missing:
                raise UserError(
                    f"{index.place(missing[0])}: no image {paths[missing[0]]} "
                    f"({len(missing)} of {len(index)} lines name one that is not there)"
                )

    def _check_labels(self, index: Index) -> None:
        answers = len(read_answers(self._folder))
        for row in range(len(index)):
            largest = max(index["labels"][row].tolist(), default=-1)
            if largest >= answers:
                raise UserError(f"{index.place(row)}: label {largest}, {ANSWERS_FILE} has {answers} answers")

    def _is_there(self, task: str, split: str) -> bool:
        return index_files(self._folder, task, split)[0].is_file()

    def _write(self, task: str, split: str, rows: Iterable[dict[str, Any]]) -> None:
        file = index_files(self._folder, task, split)[0]
        write_index(file, task, rows)
        self._note(file.name)

    def _make_pairs(self, split: str) -> None:
        """Writes the pairs of captioning, whose held-out parts have no captions, or of retrieval."""
        sources = ("captioning", "retrieval") if split == "train" else ("retrieval",)
        source = next((task for task in sources if self._is_there(task, split)), None)
        if source is not None and not self._is_there("pair", split):
            index = self._read(source, split)
            self._write("pair", split, (index.record(row) for row in range(len(index))))

    def _make_images(self, split: str) -> None:
        """Writes ImageNet's images where they are there, and the pairs'; each once."""
        sources = [task for task in ("imagenet", "pair") if self._is_there(task, split)]
        if sources and not self._is_there("image", split):
            indexes = [self._read(task, split) for task in sources]
            paths = dict.fromkeys(index["image_path"][row] for index in indexes for row in range(len(index)))
            self._write("image", split, ({"image_path": path} for path in paths))

    def _make_texts(self, split: str) -> None:
        prefix = self._folder / "text" / split
        if prefix.with_suffix(".idx").is_file():
            return
        if self._text_data is not None:
            self._binarise_text(self._text_data / f"{split}.txt", prefix)
        elif self._is_there("pair", split):
            self._copy_captions(split, prefix)
        else:
            return
        self._note(f"text/{split}.bin", f"text/{split}.idx")

    def _binarise_text(self, source: Path, prefix: Path) -> None:
        model = self._folder / MODEL_FILE
        if not model.is_file():
            raise UserError(f"--text-data: {self._folder} has no {MODEL_FILE} to encode it with")
        text = prefix.with_suffix(".txt")
        with atomic_open(text) as stream:
            lines = filter(None, map(clean_line, read_utf8_lines(source)))
            stream.writelines(f"{line}\n".encode() for line in lines)
        binarize(text, prefix, PieceVocabulary(model))

    def _copy_captions(self, split: str, prefix: Path) -> None:
        """Writes the ids of the captions, each text once, as lines of text."""
        index = self._read("pair", split)
        lines = dict.fromkeys(tuple(index["text_segment"][row].tolist()) for row in range(len(index)))
        with dataset_writer(prefix, len(self._symbols)) as add:
            for ids in lines:
                add([*ids, _EOS])

    def _fit_tokenizer(self) -> Optional[dict[str, Any]]:
        settings, file = self._tokenizer, self._folder / TOKENIZER_FILE
        if settings is None or file.is_file() or not self._is_there("image", "train"):
            return None
        from ..visual_tokenizers.fitting import fit_into  # which needs PyTorch

        record = fit_into(self._folder, settings, self._say)
        self._note(TOKENIZER_FILE)
        return record

    def _write_manifest(self, counts: dict[str, int], tokenizer: Optional[dict[str, Any]]) -> dict[str, Any]:
        earlier = read_manifest(self._folder)
        made = list(dict.fromkeys([*earlier.get("made", []), *self.made]))
        names = sorted({DICTIONARY, *made, *(name for name in counts if name.endswith(".jsonl"))})
        entries = {
            "source": {"name": _SOURCE, "licence": "the user's own data: their terms are the user's to know"},
            "indexes": counts,
            "made": made,
            "visual_tokenizer": tokenizer or earlier.get("visual_tokenizer"),
        }
        manifest = {**complete_manifest(KIND, entries), "files": describe_files(self._folder, names)}
        write_json(self._folder / MANIFEST, manifest)
        return manifest


def _all_indexes() -> Iterator[tuple[str, str, str | None]]:
    for task in TASKS:
        for name in NAMES.get(task, (None,)):
            for split in (*SPLITS, "test-dev") if task == "vqa" else SPLITS:
                yield task, split, name
