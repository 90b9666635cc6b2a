"""Folders as unilm's BEiT-3 scripts make them: checked, and completed by what pre-training here needs besides.

Nothing that is there is changed. Missing are, as a rule: the dictionary (written from the SentencePiece model), the
indexes for pre-training (made from those of captioning, retrieval and ImageNet), text without images, the visual
tokenizer, and a manifest.
"""

import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Iterable, Iterator, Optional, Sequence

import numpy as np
from tqdm import tqdm

from ...common.errors import UserError
from ...common.files import atomic_open, atomic_path, read_utf8_lines, refuse_path_separator, write_json
from ...common.locks import LOCK, exclusive_lock
from ...data.documents import clean_line
from ...data.identity import MANIFEST, read_manifest
from ...data.multimodal import index as beit3
from ...data.vocabularies import NUM_SPECIALS, open_model, write_dictionary
from ..archives import Say
from ..base import DICTIONARY, MODEL_FILE, complete_manifest
from ..binarize import dataset_writer
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
    scripts use; a ``<mask>`` after the last piece makes them whole. ``UserError`` if the file is not such a model.
    """

    def __init__(self, path: Path):
        self._model = open_model(path)
        size = self._model.vocab_size()
        plain = [index for index in range(size) if not (self._model.is_control(index) or self._model.is_unknown(index))]
        self.symbols = [self._model.id_to_piece(index) for index in plain]
        self._ids = np.full(size, _UNK)
        self._ids[plain] = np.arange(NUM_SPECIALS, NUM_SPECIALS + len(plain))

    def encode(self, line: str) -> list[int]:
        """Returns the dictionary indices of a line, without an end mark."""
        return self._ids[self._model.encode(line)].tolist()


@dataclass
class Completion:
    """One run over one folder; ``made`` are the files that it wrote."""

    folder: Path
    say: Say
    text_data: Optional[Path] = None  # folder with ``train.txt``, ...; None for the captions themselves
    tokenizer: Optional[KMeansSettings] = None  # None to fit none
    made: list[str] = field(default_factory=list)

    def run(self, dest: Path, *, overwrite: bool = False) -> dict[str, Any]:
        """Checks and completes the folder; returns the manifest.

        Args:
            dest: the folder itself.
            overwrite: has no meaning: nothing is replaced.

        Raises:
            UserError: naming file and line of what is wrong.
        """
        flag = f"--source {_SOURCE}"
        if dest.resolve() != self.folder.resolve():
            raise UserError(
                f"--dest {dest}: must be {self.folder} itself, where the missing files are put: the images are not "
                "copied"
            )
        if not self.folder.is_dir():
            raise UserError(f"{flag} {self.folder}: no such folder")
        refuse_path_separator(self.folder, flag)
        source = read_manifest(self.folder).get("source", {"name": _SOURCE}).get("name")
        if source != _SOURCE:
            raise UserError(f"{flag} {self.folder}: was made from {source}, there is nothing to complete")
        with exclusive_lock(self.folder / LOCK, flag):
            counts = {"dictionary": len(self._symbols), **self._check_indexes()}
            for make in (self._make_pairs, self._make_images, self._make_texts):
                for split in SPLITS:
                    make(split)
            manifest = self._write_manifest(counts, self._fit_tokenizer())
        self.say(f"done: {self.folder}, {len(manifest['made'])} files made here")
        return manifest

    @cached_property
    def _symbols(self) -> list[str]:
        """The dictionary, written first where it is missing."""
        from fairseq.data import Dictionary

        path, upstream, model = (self.folder / name for name in (DICTIONARY, _UPSTREAM_MODEL, MODEL_FILE))
        if not path.is_file():
            if not model.is_file():
                if not upstream.is_file():
                    raise UserError(f"{self.folder}: has neither {DICTIONARY} nor {_UPSTREAM_MODEL} nor {MODEL_FILE}")
                with atomic_path(model) as temporary:
                    shutil.copyfile(upstream, temporary)
                self._note(MODEL_FILE)
            symbols = PieceVocabulary(model).symbols
            write_dictionary(path, symbols, np.zeros(NUM_SPECIALS + len(symbols), dtype=np.int64), [MASK], multiple=1)
            self._note(DICTIONARY)
        symbols = Dictionary.load(str(path)).symbols
        if MASK not in symbols:
            raise UserError(f"{path}: has no {MASK}, which stands after the last piece")
        return symbols

    def _note(self, *names: str) -> None:
        self.made += names
        for name in names:
            self.say(f"made: {name}")

    def _check_indexes(self) -> dict[str, int]:
        """Reads every index that is there, to its last line; returns lines by file."""
        counts: dict[str, int] = {}
        every = [
            (task, split, name)
            for task in beit3.TASKS
            for name in beit3.NAMES.get(task, (None,))
            for split in ((*SPLITS, "test-dev") if task == "vqa" else SPLITS)
        ]
        for task, split, name in every:
            files = beit3.index_files(self.folder, task, split, name)
            if not files[0].is_file() or files[0].name in counts:
                continue
            index = self._read(task, split, name)
            self._check_images(index)
            if task == "vqa":
                answers = len(beit3.read_answers(self.folder))
                index.check_ids("labels", f"label {{}}, {beit3.ANSWERS_FILE} has {{}} answers", answers)
            counts[files[0].name] = len(index)
            self.say(f"index: {', '.join(file.name for file in files)}: {len(index)} lines")
        if not counts:
            raise UserError(f"--source {_SOURCE} {self.folder}: has none of BEiT-3's index files")
        return counts

    def _read(self, task: str, split: str, name: str | None = None) -> beit3.Index:
        return beit3.read_index(self.folder, task, split, name, vocabulary_size=len(self._symbols))

    def _check_images(self, index: beit3.Index) -> None:
        for column in ("image_path", "image2_path"):
            paths = [self.folder / path for path in index[column]] if column in index else []
            missing = [row for row, path in enumerate(paths) if not path.is_file()]
            if missing:
                raise UserError(
                    f"{index.place(missing[0])}: no image {paths[missing[0]]} "
                    f"({len(missing)} of {len(index)} lines name one that is not there)"
                )

    def _is_there(self, task: str, split: str) -> bool:
        return beit3.index_files(self.folder, task, split)[0].is_file()

    def _write(self, task: str, split: str, rows: Iterable[dict[str, Any]]) -> None:
        file = beit3.index_files(self.folder, task, split)[0]
        beit3.write_index(file, task, rows)
        self._note(file.name)

    def _make_pairs(self, split: str) -> None:
        """Writes the pairs of captioning, whose held-out parts have no captions, or of retrieval."""
        sources = ("captioning", "retrieval") if split == "train" else ("retrieval",)
        source = next((task for task in sources if self._is_there(task, split)), None)
        if source is not None and not self._is_there("pair", split):
            index = self._read(source, split)
            self._write("pair", split, map(index.record, range(len(index))))

    def _make_images(self, split: str) -> None:
        """Writes ImageNet's images where they are there, and the pairs'; each once."""
        sources = [task for task in ("imagenet", "pair") if self._is_there(task, split)]
        if sources and not self._is_there("image", split):
            paths = dict.fromkeys(path for task in sources for path in self._read(task, split)["image_path"])
            self._write("image", split, ({"image_path": path} for path in paths))

    def _make_texts(self, split: str) -> None:
        """Writes the ids of the text's lines, or of the captions, each caption once."""
        prefix = self.folder / "text" / split
        if prefix.with_suffix(".idx").is_file():
            return
        if self.text_data is not None:
            lines = self._encode(self.text_data / f"{split}.txt", prefix.with_suffix(".txt"))
        elif self._is_there("pair", split):
            lines = iter(dict.fromkeys(tuple(ids.tolist()) for ids in self._read("pair", split)["text_segment"]))
        else:
            return
        with dataset_writer(prefix, len(self._symbols)) as add:
            for ids in tqdm(lines, desc=f"binarise {split}", unit=" lines", disable=None):
                add([*ids, _EOS])
        self._note(f"text/{split}.bin", f"text/{split}.idx")

    def _encode(self, source: Path, text: Path) -> Iterator[Sequence[int]]:
        """Writes the clean lines to ``text``, for other preparations, and yields their ids."""
        model = self.folder / MODEL_FILE
        if not model.is_file():
            raise UserError(f"--text-data: {self.folder} has no {MODEL_FILE} to encode it with")
        with atomic_open(text) as stream:
            stream.writelines(f"{line}\n".encode() for line in map(clean_line, read_utf8_lines(source)) if line)
        return map(PieceVocabulary(model).encode, read_utf8_lines(text))

    def _fit_tokenizer(self) -> Optional[dict[str, Any]]:
        if self.tokenizer is None or (self.folder / TOKENIZER_FILE).is_file() or not self._is_there("image", "train"):
            return None
        from ..visual_tokenizers.fitting import fit_into  # which needs PyTorch

        record = fit_into(self.folder, self.tokenizer, self.say)
        self._note(TOKENIZER_FILE)
        return record

    def _write_manifest(self, counts: dict[str, int], tokenizer: Optional[dict[str, Any]]) -> dict[str, Any]:
        earlier = read_manifest(self.folder)
        made = list(dict.fromkeys([*earlier.get("made", []), *self.made]))
        may_be = (MODEL_FILE, TOKENIZER_FILE, *(f"text/{split}.{kind}" for split in SPLITS for kind in ("bin", "idx")))
        there = (name for name in may_be if (self.folder / name).is_file())  # the user's, or of a run that was cut off
        names = sorted({DICTIONARY, *made, *there, *(name for name in counts if name.endswith(".jsonl"))})
        entries = {
            "source": {"name": _SOURCE, "licence": "the user's own data: their terms are the user's to know"},
            "indexes": counts,
            "made": made,
            "visual_tokenizer": tokenizer or earlier.get("visual_tokenizer"),
        }
        manifest = {**complete_manifest(KIND, entries), "files": describe_files(self.folder, names)}
        write_json(self.folder / MANIFEST, manifest)
        return manifest
