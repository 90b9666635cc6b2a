"""The index files of a prepared folder, in BEiT-3's formats."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

from ...common.files import write_json
from ...data.multimodal.index import write_index, written_file
from ..splits import SPLITS
from .images import SourceImage
from .units import has_known_caption, words_of

CLASSES_FILE = "imagenet.classes.json"
_MOST_OF_A_UNIT = 6
GROUND_TRUTH = {"valid": "coco_karpathy_val_gt.json", "test": "coco_karpathy_test_gt.json"}


@dataclass(frozen=True)
class IndexWriter:
    """Writes index files into ``folder``; every method returns counts by file.

    Args:
        folder: the prepared folder.
        encode: texts to dictionary indices, without end marks.
        images: all of them by part; an ``image_id`` counts through the parts in this order.
        language: of captioning, retrieval and derived data; pairs are written in all languages.
    """

    folder: Path
    encode: Callable[[list[str]], list[list[int]]]
    images: Mapping[str, Sequence[SourceImage]]
    language: str

    def write(self, task: str, split: str, rows: Sequence[dict[str, Any]]) -> dict[str, int]:
        """Writes one index; nothing where there are no rows."""
        if not rows:
            return {}
        file = written_file(self.folder, task, split)
        return {file.name: write_index(file, task, rows)}

    def write_pretraining(self) -> dict[str, int]:
        """Writes images, and pairs in every language."""
        counts = {}
        for split in SPLITS:
            shown = self.images[split]
            counts |= self.write("image", split, [{"image_path": image.path} for image in shown])
            languages = list(dict.fromkeys(language for image in shown for language in image.captions))
            rows = [
                {**row, "language": language}
                for language in languages
                for row in self._captioned(shown, language, self._image_ids)
            ]
            counts |= self.write("pair", split, rows)
        return counts

    def write_retrieval(self) -> dict[str, int]:
        """Writes one line for each image and caption; images are counted within each part."""
        counts = {}
        for split in SPLITS:
            shown = self._with_caption(split)
            ids = {image.path: number for number, image in enumerate(shown)}
            counts |= self.write("retrieval", split, list(self._captioned(shown, self.language, ids)))
        return counts

    def write_captioning(self) -> dict[str, int]:
        """Writes captions of training images; for held-out ones the images, and the truth in COCO's format.

        Held out are images whose caption can be put together from what training has (see ``has_known_caption``), at
        most six of a unit: a couple in 25 pairs of skin tones would weigh more than all else.
        """
        train = self._with_caption("train")
        counts = self.write("captioning", "train", list(self._captioned(train, self.language, self._image_ids)))
        words = {word for image in train for text in image.captions[self.language] for word in words_of(text)}
        families = {image.family for image in train}
        for split, name in GROUND_TRUTH.items():
            seen: Counter[str] = Counter()
            shown = []
            for image in self.images[split]:
                if has_known_caption(image, self.language, families, words) and seen[image.unit] < _MOST_OF_A_UNIT:
                    seen[image.unit] += 1
                    shown.append(image)
            rows = [
                {"image_path": image.path, "text_segment": None, "image_id": self._image_ids[image.path]}
                for image in shown
            ]
            counts |= {**self.write("captioning", split, rows), **self._write_truth(name, shown)}
        return counts

    def _write_truth(self, name: str, images: Sequence[SourceImage]) -> dict[str, int]:
        """Writes COCO's layout: images by id, and every caption with an id of its own."""
        if not images:
            return {}
        captions = [(self._image_ids[image.path], text) for image in images for text in image.captions[self.language]]
        annotations = [{"image_id": id, "id": number, "caption": text} for number, (id, text) in enumerate(captions)]
        rows = [{"id": self._image_ids[image.path]} for image in images]
        write_json(self.folder / name, {"images": rows, "annotations": annotations})
        return {name: len(annotations)}

    def write_classes(self) -> dict[str, int]:
        """Writes images by kind, sorted by name; unlike ImageNet's, the test part has labels and a file of its own."""
        classes = sorted({image.group for image in self.images["train"]} - {""})
        if len(classes) < 2:
            return {}
        labels = {name: label for label, name in enumerate(classes)}
        counts = {}
        for split in SPLITS:
            shown = [image for image in self.images[split] if image.group in labels]
            rows = [{"image_path": image.path, "label": labels[image.group]} for image in shown]
            counts |= self.write("imagenet", split, rows)
        write_json(self.folder / CLASSES_FILE, classes)
        return {**counts, CLASSES_FILE: len(classes)}

    @cached_property
    def _image_ids(self) -> dict[str, int]:
        paths = [image.path for split in SPLITS for image in self.images[split]]
        return {path: number for number, path in enumerate(paths)}

    def _with_caption(self, split: str) -> list[SourceImage]:
        return [image for image in self.images[split] if self.language in image.captions]

    def _captioned(
        self, images: Sequence[SourceImage], language: str, ids: Mapping[str, int]
    ) -> Iterator[dict[str, Any]]:
        captioned = [(image, text) for image in images for text in image.captions.get(language, ())]
        segments = self.encode([text for _, text in captioned])
        for (image, _), segment in zip(captioned, segments):
            yield {"image_path": image.path, "text_segment": segment, "image_id": ids[image.path]}


def by_part(images: Sequence[SourceImage], assigned: Mapping[str, str]) -> dict[str, list[SourceImage]]:
    """Returns the images of each part, in their order."""
    parts: dict[str, list[SourceImage]] = defaultdict(list)
    for image in images:
        parts[assigned[image.unit]].append(image)
    return {split: parts[split] for split in SPLITS}
