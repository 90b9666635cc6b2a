"""From a source of images to a prepared folder: read, divide, learn a vocabulary, write texts, indexes and ids."""

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

from ...common.errors import UserError
from ...common.files import atomic_open, read_json, read_utf8_lines, sha256_of, write_json
from ...data.documents import clean_line
from ..base import DICTIONARY, CorpusPreparation, CorpusSettings, binary_files
from ..splits import SPLITS
from ..visual_tokenizers.settings import TOKENIZER_FILE, KMeansSettings
from .derived import Derivation, DerivedSettings
from .images import CATALOGUE, SENTENCES, Sentence, SourceImage, assign_units, keep_images, read_catalogue
from .indexes import IndexWriter

KIND, MASK = "image-text", "<mask>"
_ASSIGNED = "parts.json"


@dataclass(frozen=True, kw_only=True)
class ImageTextSettings(CorpusSettings):
    """How images and texts are prepared."""

    languages: tuple[str, ...] = ("en",)  # of captions; captioning, retrieval and derived data are in the first
    vocab_size: int = 2000
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    text_data: Optional[Path] = None  # folder with ``train.txt``, ... in place of the source's sentences
    derived: Optional[DerivedSettings] = DerivedSettings()  # None to derive nothing
    tokenizer: Optional[KMeansSettings] = KMeansSettings()  # None to fit none

    def identity(self) -> dict[str, Any]:
        """Returns the settings by flag, the languages as ``langs``, texts as their hashes."""
        identity = super().identity()
        identity["langs"] = identity.pop("languages")
        if self.text_data is not None:
            identity["text_data"] = {split: sha256_of(self.text_data / f"{split}.txt") for split in SPLITS}
        return identity


class ImageTextPreparation(CorpusPreparation[ImageTextSettings]):
    """Prepares an :class:`~.images.ImageSource`."""

    kind = KIND
    extra_symbols = (MASK,)
    dictionary_multiple = 1

    def source_identity(self) -> dict[str, Any]:
        """Returns what tells the source's images, with captions in these languages, from others."""
        return self.source.identity(self.settings.languages)

    def make(self) -> dict[str, Any]:
        """Runs the stages that are not done yet and publishes the result; returns the manifest."""
        provenance = self.stage("images", [CATALOGUE, SENTENCES], self._open)
        parts = self.stage("split", [_ASSIGNED], self._split)
        texts = [f"text/{split}.txt" for split in SPLITS]
        text_source = self.stage("text", texts, self._write_texts)
        vocabulary = self.make_vocabulary(self._train_vocabulary)
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
        outputs = [DICTIONARY, vocabulary, *texts, *entries["indexes"], *(image.path for image in self._catalogue[0])]
        outputs += [name for split in SPLITS for name in binary_files(split, "text/") if name != DICTIONARY]
        return self.publish(entries, outputs + ([TOKENIZER_FILE] if self.settings.tokenizer else []))

    def _open(self) -> dict[str, Any]:
        start = time.monotonic()
        opened = self.source.open(self.settings.languages, self.partial, self.downloads, self.say)
        record, images, sentences = keep_images(self.partial, opened)
        self.say(
            f"images: {len(images)} of {len({image.unit for image in images})} things "
            f"({record['joined_things']} joined to others with the same image), {len(record['unreadable'])} left out; "
            f"{len(sentences)} sentences; {time.monotonic() - start:.1f} s"
        )
        return {**opened.provenance, **record}

    @cached_property
    def _catalogue(self) -> tuple[list[SourceImage], list[Sentence]]:
        return read_catalogue(self.partial)

    @cached_property
    def _assigned(self) -> dict[str, str]:
        return read_json(self.partial / _ASSIGNED)

    @cached_property
    def _parts(self) -> dict[str, list[SourceImage]]:
        images, _ = self._catalogue
        return {split: [image for image in images if self._assigned[image.unit] == split] for split in SPLITS}

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
        own, (_, sentences) = self.settings.text_data, self._catalogue
        for split in SPLITS:
            if own is None:
                lines = [sentence.text for sentence in sentences if self._assigned[sentence.unit] == split]
            else:
                lines = list(filter(None, map(clean_line, read_utf8_lines(own / f"{split}.txt"))))
            if not lines:
                raise UserError(f"--source {self.source.name}: no sentence for {split}; give --text-data DIR")
            with atomic_open(self.partial / "text" / f"{split}.txt") as stream:
                stream.writelines(f"{line}\n".encode() for line in lines)
        return "the user's own text" if own else f"sentences of {self.source.name}"

    def _train_vocabulary(self) -> None:
        """Learns it on the training part of everything that is read: sentences, captions, questions, statements."""
        lines = (self.partial / "text" / "train.txt").read_text(encoding="utf-8").splitlines()
        lines += [text for image in self._parts["train"] for texts in image.captions.values() for text in texts]
        if self._derivation is not None:
            lines += self._derivation.training_texts()
        self.train_vocabulary(lines, len(lines), f"{len(lines)} lines of the training part")

    @property
    def _writer(self) -> IndexWriter:
        return IndexWriter(self.partial, self.vocabulary.encode_lines, self._parts, self.settings.languages[0])

    def _write_indexes(self) -> dict[str, int]:
        counts = self._writer.write_all()
        self.say("indexes: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
        return counts

    @cached_property
    def _derivation(self) -> Optional[Derivation]:
        settings = self.settings.derived
        return None if settings is None else Derivation(settings, self._parts, self.settings.seed)

    def _derive(self) -> dict[str, Any]:
        return {} if self._derivation is None else self._derivation.write(self._writer, self.say)

    def _fit_tokenizer(self) -> Optional[dict[str, Any]]:
        if self.settings.tokenizer is None:
            return None
        from ..visual_tokenizers.fitting import fit_into  # which needs PyTorch

        return fit_into(self.partial, self.settings.tokenizer, self.say)
