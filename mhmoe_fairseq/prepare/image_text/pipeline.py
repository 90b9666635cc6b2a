"""From a source of images to a prepared folder: read, divide, learn a vocabulary, write texts, indexes and ids."""

from __future__ import annotations

import datetime
import time
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Iterable, Optional

from ...common.errors import UserError
from ...common.files import atomic_open, read_json, read_utf8_lines, sha256_of, write_json
from ...data.documents import clean_line
from ...data.sentencepiece_vocabulary import SentencePieceVocabulary, train_sentencepiece
from ...data.vocabulary import build_dictionary, save_dictionary
from ..archives import Say
from ..binarize import binarize
from ..english import MODEL_FILE, tool_versions
from ..splits import SPLITS
from ..visual_tokenizers.fitting import FILE as TOKENIZER_FILE
from ..visual_tokenizers.fitting import FitSettings, fit_kmeans
from ..workspace import Workspace, prepare_folder
from .derived import Derivation, DerivedSettings
from .equal_images import join_equal_images
from .images import CATALOGUE, SENTENCES, ImageSource, Sentence, SourceImage, read_catalogue, write_catalogue
from .indexes import IndexWriter, by_part
from .readable import drop_unreadable
from .splits import assign_units

KIND = "image-text"
MASK = "<mask>"
_ASSIGNED = "parts.json"


@dataclass(frozen=True)
class ImageTextSettings:
    """How images and texts are prepared; every field is part of the manifest's settings.

    Args:
        languages: of captions and sentences; captioning, retrieval and derived data are in the first.
        text_data: folder with ``train.txt``, ``valid.txt`` and ``test.txt`` in place of the source's sentences.
        derived: of questions and statements; None for none.
        tokenizer: of the visual tokenizer; None for none.
    """

    languages: tuple[str, ...] = ("en",)
    vocab_size: int = 2000
    tokenizer_model: str = "unigram"
    text_data: Optional[Path] = None
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 1
    derived: Optional[DerivedSettings] = DerivedSettings()
    tokenizer: Optional[FitSettings] = FitSettings()

    def identity(self, source: ImageSource) -> dict[str, Any]:
        """Settings by flag that decide the prepared data."""
        identity = {"source": {"name": source.name, **source.identity(self.languages)}, **asdict(self)}
        identity["langs"] = list(identity.pop("languages"))
        if self.text_data is not None:
            identity["text_data"] = {
                split: sha256_of(self.text_data / f"{split}.txt") for split in SPLITS
            }  # fmt: skip
        return identity


class ImageTextPreparation:
    """One run over the stages of one workspace."""

    def __init__(
        self, source: ImageSource, settings: ImageTextSettings, workspace: Workspace, cache_dir: Path, say: Say
    ):
        self._source = source
        self._settings = settings
        self._workspace = workspace
        self._cache_dir = cache_dir
        self._say = say
        self._partial = workspace.partial

    def run(self) -> dict[str, Any]:
        """Runs the stages that are not done yet and publishes the result; returns the manifest."""
        stage = self._workspace.stage
        provenance = stage("images", [CATALOGUE, SENTENCES], self._open)
        parts = stage("split", [_ASSIGNED], self._split)
        texts = [f"text/{split}.txt" for split in SPLITS]
        text_source = stage("text", texts, self._write_texts)
        stage("vocabulary", [MODEL_FILE], self._train_vocabulary)
        text = {split: self._binarise(split) for split in SPLITS}
        indexes = stage("indexes", [], self._write_indexes)
        derived = stage("derived", [], self._derive)
        tokenizer = stage("visual tokenizer", [], self._fit_tokenizer)
        manifest = {
            "format": 1,
            "kind": KIND,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "source": {"name": self._source.name, "licence": self._source.licence, **provenance},
            "parts": parts,
            "text": {"source": text_source, "splits": text},
            "indexes": {**indexes, **derived.pop("files", {})},
            "derived": derived,
            "visual_tokenizer": tokenizer,
            "tokenizer": {**self._vocabulary.describe(), "mask_symbol": MASK},
            "tools": tool_versions(),
        }
        return self._workspace.publish(manifest, self._outputs(manifest))

    def _outputs(self, manifest: dict[str, Any]) -> list[str]:
        outputs = ["dict.txt", MODEL_FILE, *manifest["indexes"], *(image.path for image in self._images)]
        for split in SPLITS:
            outputs += [f"text/{split}.{kind}" for kind in ("txt", "bin", "idx")]
        return outputs + ([TOKENIZER_FILE] if self._settings.tokenizer else [])

    def _open(self) -> dict[str, Any]:
        start = time.monotonic()
        opened = self._source.open(self._settings.languages, self._partial, self._cache_dir, self._say)
        kept, problems = drop_unreadable(self._partial, opened.images)
        opened, joined = join_equal_images(self._partial, opened._replace(images=kept))
        write_catalogue(self._partial, opened)
        self._say(
            f"images: {len(kept)} of {len({image.unit for image in opened.images})} things ({joined} joined to "
            f"others with the same image), {len(problems)} left out; {len(opened.sentences)} sentences; "
            f"{time.monotonic() - start:.1f} s"
        )
        return {**opened.provenance, "images": len(kept), "joined_things": joined, "unreadable": problems}

    @cached_property
    def _catalogue(self) -> tuple[list[SourceImage], list[Sentence]]:
        return read_catalogue(self._partial)

    @property
    def _images(self) -> list[SourceImage]:
        return self._catalogue[0]

    @cached_property
    def _assigned(self) -> dict[str, str]:
        return read_json(self._partial / _ASSIGNED)

    @cached_property
    def _parts(self) -> dict[str, list[SourceImage]]:
        return by_part(self._images, self._assigned)

    def _split(self) -> dict[str, dict[str, int]]:
        settings = self._settings
        assigned = assign_units(
            *self._catalogue, valid_fraction=settings.valid_fraction, test_fraction=settings.test_fraction,
            seed=settings.seed,
        )  # fmt: skip
        write_json(self._partial / _ASSIGNED, assigned)
        counts = {
            split: {"images": len(images), "units": len({image.unit for image in images})}
            for split, images in by_part(self._images, assigned).items()
        }
        shown = ", ".join(f"{split} {count['images']} ({count['units']})" for split, count in counts.items())
        self._say(f"split: images (things) {shown}; seed {settings.seed}")
        return counts

    def _write_texts(self) -> str:
        for split in SPLITS:
            with atomic_open(self._partial / "text" / f"{split}.txt") as stream:
                lines = self._text_lines(split)
                if not lines:
                    raise UserError(f"--source {self._source.name}: no sentence for {split}; give --text-data DIR")
                stream.write("".join(f"{line}\n" for line in lines).encode())
        return "the user's own text" if self._settings.text_data else f"sentences of {self._source.name}"

    def _text_lines(self, split: str) -> list[str]:
        if self._settings.text_data is not None:
            lines = read_utf8_lines(self._settings.text_data / f"{split}.txt")
            return [cleaned for line in lines if (cleaned := clean_line(line))]
        _, sentences = self._catalogue
        return [sentence.text for sentence in sentences if self._assigned[sentence.unit] == split]

    def _train_vocabulary(self) -> None:
        """On the training part of everything that is read: sentences, captions, questions, statements."""
        start, settings = time.monotonic(), self._settings
        lines = list(self._training_lines())
        train_sentencepiece(
            lines, len(lines), self._partial / MODEL_FILE, vocab_size=settings.vocab_size,
            model=settings.tokenizer_model, max_lines=len(lines), seed=settings.seed,
        )  # fmt: skip
        self._say(
            f"vocabulary: SentencePiece {settings.tokenizer_model}, {settings.vocab_size} pieces with byte fallback, "
            f"learnt on {len(lines)} lines of the training part, {time.monotonic() - start:.1f} s"
        )

    def _training_lines(self) -> Iterable[str]:
        yield from (self._partial / "text" / "train.txt").read_text(encoding="utf-8").splitlines()
        for image in self._parts["train"]:
            for captions in image.captions.values():
                yield from captions
        if self._settings.derived:
            yield from self._derivation.training_texts()

    @cached_property
    def _vocabulary(self) -> SentencePieceVocabulary:
        return SentencePieceVocabulary(self._partial / MODEL_FILE)

    def _binarise(self, split: str) -> dict[str, Any]:
        files = [f"text/{split}.bin", f"text/{split}.idx"] + (["dict.txt"] if split == "train" else [])
        return self._workspace.stage(f"binarise {split}", files, partial(self._make_binary, split))

    def _make_binary(self, split: str) -> dict[str, Any]:
        prefix = self._partial / "text" / split
        counts, occurrences = binarize(prefix.with_suffix(".txt"), prefix, self._vocabulary)
        if split == "train":
            dictionary = build_dictionary(self._vocabulary.symbols, occurrences, [MASK], multiple=1)
            save_dictionary(dictionary, self._partial / "dict.txt")
        self._say(f"text: {split} {counts.lines} lines, {counts.words} words, {counts.tokens} tokens")
        return counts.as_dict()

    @property
    def _writer(self) -> IndexWriter:
        return IndexWriter(self._partial, self._vocabulary.encode_lines, self._parts, self._settings.languages[0])

    def _write_indexes(self) -> dict[str, int]:
        writer = self._writer
        counts = {
            **writer.write_pretraining(), **writer.write_captioning(), **writer.write_retrieval(),
            **writer.write_classes(),
        }  # fmt: skip
        self._say("indexes: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
        return counts

    @cached_property
    def _derivation(self) -> Derivation:
        return Derivation(self._settings.derived or DerivedSettings(), self._parts, self._settings.seed)

    def _derive(self) -> dict[str, Any]:
        return self._derivation.write(self._writer, self._say) if self._settings.derived else {}

    def _fit_tokenizer(self) -> Optional[dict[str, Any]]:
        settings = self._settings.tokenizer
        if settings is None:
            return None
        start = time.monotonic()
        fitted = fit_kmeans(self._partial, settings, say=lambda line: None)
        fitted.save(self._partial / TOKENIZER_FILE)
        held_out = fitted.provenance.get("valid", fitted.provenance["train"])
        self._say(
            f"visual tokenizer: {fitted.kind}, {fitted.vocab_size} codes for patches of {fitted.patch_size} pixels, "
            f"held-out images use {held_out['used']:.0%} of them (perplexity {held_out['perplexity']:g}), mean "
            f"squared error {held_out['mean_squared_error']:g}, {time.monotonic() - start:.1f} s"
        )
        return {"kind": fitted.kind, **asdict(settings), **fitted.provenance}


def prepare_image_text(
    source: ImageSource, settings: ImageTextSettings, dest: Path, *, cache_dir: Path, overwrite: bool, say: Say
) -> dict[str, Any]:
    """Prepares ``source`` into ``dest`` and returns the manifest; does nothing if that was done before.

    Raises:
        UserError: other settings already in ``dest``, bad input, no room, a client that is missing or fails.
    """
    return prepare_folder(
        dest, settings.identity(source),
        lambda workspace: ImageTextPreparation(source, settings, workspace, cache_dir, say).run(),
        overwrite=overwrite, say=say,
    )  # fmt: skip
