"""The index files of a prepared folder, in BEiT-3's formats."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, Sequence

from ...common.files import write_json
from ...data.multimodal.index import write_index, written_file
from ..splits import SPLITS
from .images import SourceImage

CLASSES_FILE = "imagenet.classes.json"
_MOST_OF_A_UNIT = 6
GROUND_TRUTH = {"valid": "coco_karpathy_val_gt.json", "test": "coco_karpathy_test_gt.json"}

Rows = Iterable[dict[str, Any]]


@dataclass(frozen=True)
class IndexWriter:
    """Writes index files into ``folder``; every method that writes returns counts by file."""

    folder: Path
    encode: Callable[[list[str]], list[list[int]]]  # texts to dictionary indices, without end marks
    images: Mapping[str, Sequence[SourceImage]]  # by part; an ``image_id`` counts through the parts in this order
    language: str  # of captioning, retrieval and derived data; pairs are written in all languages

    def write(self, task: str, rows_of: Callable[[str], Rows]) -> dict[str, int]:
        """Writes the index of each part that has rows; their ``text_segment`` is a text, which is encoded here."""
        counts = {}
        for split in SPLITS:
            if rows := list(rows_of(split)):
                worded = [row for row in rows if row.get("text_segment") is not None]
                for row, segment in zip(worded, self.encode([row["text_segment"] for row in worded])):
                    row["text_segment"] = segment
                file = written_file(self.folder, task, split)
                counts[file.name] = write_index(file, task, rows)
        return counts

    def write_all(self) -> dict[str, int]:
        """Writes what pre-training, captioning, retrieval and classification read."""
        return {
            **self.write("image", lambda split: [{"image_path": image.path} for image in self.images[split]]),
            **self.write("pair", self._pairs),
            **self._write_captioning(),
            **self.write("retrieval", self._retrieved),
            **self._write_classes(),
        }

    def _pairs(self, split: str) -> Rows:
        for language in dict.fromkeys(language for image in self.images[split] for language in image.captions):
            for row in _captioned(self.images[split], language, self._image_ids):
                yield {**row, "language": language}

    def _retrieved(self, split: str) -> Rows:
        """Returns a row for each image and caption; images are counted within each part."""
        shown = [image for image in self.images[split] if self.language in image.captions]
        return _captioned(shown, self.language, {image.path: number for number, image in enumerate(shown)})

    def _write_captioning(self) -> dict[str, int]:
        """Writes captions of training images; for held-out ones the images, and the truth in COCO's format."""
        shown = self._with_known_captions()

        def rows_of(split: str) -> Rows:
            if split == "train":
                return _captioned(self.images[split], self.language, self._image_ids)
            return [
                {"image_path": image.path, "text_segment": None, "image_id": self._image_ids[image.path]}
                for image in shown[split]
            ]

        truths = {GROUND_TRUTH[split]: self._write_truth(split, images) for split, images in shown.items() if images}
        return {**self.write("captioning", rows_of), **truths}

    def _with_known_captions(self) -> dict[str, list[SourceImage]]:
        """Returns held-out images whose caption can be put together from what training has, by part.

        At most six of a unit: a couple in 25 pairs of skin tones would weigh more than all else.
        """
        train = [image for image in self.images["train"] if self.language in image.captions]
        words = {word for image in train for text in image.captions[self.language] for word in words_of(text)}
        families = {image.family for image in train}
        shown: dict[str, list[SourceImage]] = {}
        for split in GROUND_TRUTH:
            seen, shown[split] = Counter[str](), []
            for image in self.images[split]:
                if has_known_caption(image, self.language, families, words) and seen[image.unit] < _MOST_OF_A_UNIT:
                    seen[image.unit] += 1
                    shown[split].append(image)
        return shown

    def _write_truth(self, split: str, images: Sequence[SourceImage]) -> int:
        """Writes COCO's layout: images by id, and every caption with an id of its own."""
        captions = [(self._image_ids[image.path], text) for image in images for text in image.captions[self.language]]
        annotations = [{"image_id": id, "id": number, "caption": text} for number, (id, text) in enumerate(captions)]
        rows = [{"id": self._image_ids[image.path]} for image in images]
        write_json(self.folder / GROUND_TRUTH[split], {"images": rows, "annotations": annotations})
        return len(annotations)

    def _write_classes(self) -> dict[str, int]:
        """Writes images by kind, sorted by name; unlike ImageNet's, the test part has labels and a file of its own."""
        classes = sorted({image.group for image in self.images["train"]} - {""})
        if len(classes) < 2:
            return {}
        write_json(self.folder / CLASSES_FILE, classes)
        labels = {name: label for label, name in enumerate(classes)}
        counts = self.write("imagenet", lambda split: [
            {"image_path": image.path, "label": labels[image.group]}
            for image in self.images[split]
            if image.group in labels
        ])  # fmt: skip
        return {**counts, CLASSES_FILE: len(classes)}

    @cached_property
    def _image_ids(self) -> dict[str, int]:
        paths = [image.path for split in SPLITS for image in self.images[split]]
        return {path: number for number, path in enumerate(paths)}


def _captioned(images: Iterable[SourceImage], language: str, ids: Mapping[str, int]) -> Rows:
    for image in images:
        for text in image.captions.get(language, ()):
            yield {"image_path": image.path, "text_segment": text, "image_id": ids[image.path]}


def has_known_caption(image: SourceImage, language: str, families: set[str], words: set[str]) -> bool:
    """Whether a held-out image's caption can be put together from families and words (:func:`words_of`) of training.

    True for every caption where the source knows of no families.
    """
    captions = image.captions.get(language, [])
    if not image.family:
        return bool(captions)
    return image.family in families and any(words_of(caption) <= words for caption in captions)


def words_of(text: str) -> set[str]:
    """Returns the lower-case words of a caption, without the punctuation around them."""
    return {word.strip(".,:;!?()\"'").lower() for word in text.split()} - {""}
