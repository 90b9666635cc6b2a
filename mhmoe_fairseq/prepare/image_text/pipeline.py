"""From a source of images to a prepared folder: read, divide, learn a vocabulary, write texts, indexes and ids."""

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Iterable, Optional

from ...common.errors import UserError
from ...common.files import atomic_open, read_json, read_utf8_lines, sha256_of, write_json
from ...data.documents import clean_line
from ..base import DICTIONARY, MODEL_FILE, CorpusSettings, Preparation, binary_files
from ..splits import SPLITS
from ..visual_tokenizers.settings import TOKENIZER_FILE, KMeansSettings
from .derived import Derivation, DerivedSettings
from .images import CATALOGUE, SENTENCES, Sentence, SourceImage, read_catalogue, write_catalogue
from .indexes import IndexWriter, by_part
from .units import assign_units, drop_unreadable, join_equal_images

KIND, MASK = "image-text", "<mask>"
_ASSIGNED = "parts.json"


@dataclass(frozen=True, kw_only=True)
class ImageTextSettings(CorpusSettings):
    """How images and texts are prepared.

    Args:
        languages: of captions and sentences; captioning, retrieval and derived data are in the first.
        text_data: folder with ``train.txt``, ``valid.txt`` and ``test.txt`` in place of the source's sentences.
        derived: how many questions and statements are derived; None to derive nothing.
        tokenizer: how the visual tokenizer is fitted; None to fit none.
    """

    languages: tuple[str, ...] = ("en",)
    vocab_size: int = 2000
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    text_data: Optional[Path] = None
    derived: Optional[DerivedSettings] = DerivedSettings()
    tokenizer: Optional[KMeansSettings] = KMeansSettings()

    def identity(self) -> dict[str, Any]:
        """Returns the settings by flag, the languages as ``langs``, texts as their hashes."""
        identity = super().identity()
        identity["langs"] = identity.pop("languages")
        if self.text_data is not None:
            identity["text_data"] = {split: sha256_of(self.text_data / f"{split}.txt") for split in SPLITS}
        return identity


class ImageTextPreparation(Preparation[ImageTextSettings]):
    """Prepares an :class:`~.images.ImageSource`."""

    kind = KIND
    extra_symbols = (MASK,)
    dictionary_multiple = 1

    def identity(self) -> dict[str, Any]:
        """Returns the settings by flag that decide the prepared data."""
        source = {"name": self.source.name, **self.source.identity(self.settings.languages)}
        return {"source": source, **self.settings.identity()}

    def make(self) -> dict[str, Any]:
        """Runs the stages that are not done yet and publishes the result; returns the manifest."""
        provenance = self.stage("images", [CATALOGUE, SENTENCES], self._open)
        parts = self.stage("split", [_ASSIGNED], self._split)
        texts = [f"text/{split}.txt" for split in SPLITS]
        text_source = self.stage("text", texts, self._write_texts)
        self.stage("vocabulary", [MODEL_FILE], self._train_vocabulary)
        text = {split: self.binarise(split, "text/") for split in SPLITS}
        indexes = self.stage("indexes", [], self._write_indexes)
        derived = self.stage("derived", [], self._derive)
        tokenizer = self.stage("visual tokenizer", [], self._fit_tokenizer)
        entries = {
            "source": {"name": self.source.name, "licence": self.source.licence, **provenance},
            "parts": parts,
            "text": {"source": text_source, "splits": text},
            "indexes": {**indexes, **derived.pop("files", {})},
            "derived": derived,
            "visual_tokenizer": tokenizer,
            "tokenizer": {**self.vocabulary.describe(), "mask_symbol": MASK},
        }
        outputs = [DICTIONARY, MODEL_FILE, *texts, *entries["indexes"], *(image.path for image in self._images)]
        outputs += [name for split in SPLITS for name in binary_files(split, "text/") if name != DICTIONARY]
        return self.publish(entries, outputs + ([TOKENIZER_FILE] if self.settings.tokenizer else []))

    def _open(self) -> dict[str, Any]:
        start = time.monotonic()
        opened = self.source.open(self.settings.languages, self.partial, self.cache_dir, self.say)
        kept, problems = drop_unreadable(self.partial, opened.images)
        opened, joined = join_equal_images(self.partial, opened._replace(images=kept))
        write_catalogue(self.partial, opened)
        self.say(
            f"images: {len(kept)} of {len({image.unit for image in opened.images})} things ({joined} joined to "
            f"others with the same image), {len(problems)} left out; {len(opened.sentences)} sentences; "
            f"{time.monotonic() - start:.1f} s"
        )
        return {**opened.provenance, "images": len(kept), "joined_things": joined, "unreadable": problems}

    @cached_property
    def _catalogue(self) -> tuple[list[SourceImage], list[Sentence]]:
        return read_catalogue(self.partial)

    @property
    def _images(self) -> list[SourceImage]:
        return self._catalogue[0]

    @cached_property
    def _assigned(self) -> dict[str, str]:
        return read_json(self.partial / _ASSIGNED)

    @cached_property
    def _parts(self) -> dict[str, list[SourceImage]]:
        return by_part(self._images, self._assigned)

    def _split(self) -> dict[str, dict[str, int]]:
        write_json(self.partial / _ASSIGNED, assign_units(*self._catalogue, self.settings.shares, self.settings.seed))
        counts = {
            split: {"images": len(images), "units": len({image.unit for image in images})}
            for split, images in self._parts.items()
        }
        shown = ", ".join(f"{split} {count['images']} ({count['units']})" for split, count in counts.items())
        self.say(f"split: images (things) {shown}; seed {self.settings.seed}")
        return counts

    def _write_texts(self) -> str:
        for split in SPLITS:
            with atomic_open(self.partial / "text" / f"{split}.txt") as stream:
                lines = self._text_lines(split)
                if not lines:
                    raise UserError(f"--source {self.source.name}: no sentence for {split}; give --text-data DIR")
                stream.write("".join(f"{line}\n" for line in lines).encode())
        return "the user's own text" if self.settings.text_data else f"sentences of {self.source.name}"

    def _text_lines(self, split: str) -> list[str]:
        if self.settings.text_data is not None:
            lines = read_utf8_lines(self.settings.text_data / f"{split}.txt")
            return [cleaned for line in lines if (cleaned := clean_line(line))]
        _, sentences = self._catalogue
        return [sentence.text for sentence in sentences if self._assigned[sentence.unit] == split]

    def _train_vocabulary(self) -> None:
        lines = list(self._training_lines())
        self.train_vocabulary(lines, len(lines), f"{len(lines)} lines of the training part")

    def _training_lines(self) -> Iterable[str]:
        """Yields the training part of everything that is read: sentences, captions, questions, statements."""
        yield from (self.partial / "text" / "train.txt").read_text(encoding="utf-8").splitlines()
        for image in self._parts["train"]:
            for captions in image.captions.values():
                yield from captions
        if self.settings.derived:
            yield from self._derivation.training_texts()

    @property
    def _writer(self) -> IndexWriter:
        return IndexWriter(self.partial, self.vocabulary.encode_lines, self._parts, self.settings.languages[0])

    def _write_indexes(self) -> dict[str, int]:
        writer = self._writer
        counts = {
            **writer.write_pretraining(), **writer.write_captioning(), **writer.write_retrieval(),
            **writer.write_classes(),
        }  # fmt: skip
        self.say("indexes: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
        return counts

    @cached_property
    def _derivation(self) -> Derivation:
        return Derivation(self.settings.derived or DerivedSettings(), self._parts, self.settings.seed)

    def _derive(self) -> dict[str, Any]:
        return self._derivation.write(self._writer, self.say) if self.settings.derived else {}

    def _fit_tokenizer(self) -> Optional[dict[str, Any]]:
        settings = self.settings.tokenizer
        if settings is None:
            return None
        from ..visual_tokenizers.fitting import fit_into  # which needs PyTorch

        return fit_into(self.partial, settings, self.say)
