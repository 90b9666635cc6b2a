"""The index files of a prepared folder, in BEiT-3's formats, from images and what was derived from them."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

from ...common.files import write_json
from ...data.multimodal.answers import write_answers
from ...data.multimodal.index import write_index, written_file
from ..splits import SPLITS
from .images import SourceImage
from .questions import Question
from .splits import has_known_caption, words_of
from .statements import Statement

Encode = Callable[[list[str]], list[list[int]]]
CLASSES_FILE = "imagenet.classes.json"
_MOST_OF_A_UNIT = 6
GROUND_TRUTH = {"valid": "coco_karpathy_val_gt.json", "test": "coco_karpathy_test_gt.json"}


@dataclass(frozen=True)
class IndexWriter:
    """Writes index files into ``folder``.

    Args:
        folder: the prepared folder.
        encode: texts to dictionary indices, without end marks.
        images: all of them by part; an ``image_id`` counts through the parts in this order.
        language: of captioning, retrieval and derived data; pairs are written in all languages.
    """

    folder: Path
    encode: Encode
    images: Mapping[str, Sequence[SourceImage]]
    language: str

    def write_pretraining(self) -> dict[str, Any]:
        """Images, and pairs in every language; counts by file."""
        counts = {}
        for split in SPLITS:
            shown = self.images[split]
            counts |= self._write("image", split, [{"image_path": image.path} for image in shown])
            languages = list(dict.fromkeys(language for image in shown for language in image.captions))
            rows = [
                {**row, "language": language}
                for language in languages
                for row in self._captioned(shown, language, self._image_ids)
            ]
            counts |= self._write("pair", split, rows)
        return counts

    def write_retrieval(self) -> dict[str, Any]:
        """One line for each image and caption; images are counted within each part."""
        counts = {}
        for split in SPLITS:
            shown = [image for image in self.images[split] if self.language in image.captions]
            ids = {image.path: number for number, image in enumerate(shown)}
            counts |= self._write("retrieval", split, list(self._captioned(shown, self.language, ids)))
        return counts

    def write_captioning(self) -> dict[str, Any]:
        """Captions of training images; for held-out ones the images, and the truth in COCO's format.

        Held out are images whose caption can be put together from what training has (see ``has_known_caption``), at
        most six of a unit: a couple in 25 pairs of skin tones would weigh more than all else.
        """
        train = [image for image in self.images["train"] if self.language in image.captions]
        counts = self._write("captioning", "train", list(self._captioned(train, self.language, self._image_ids)))
        words = {word for image in train for text in image.captions[self.language] for word in words_of(text)}
        families = {image.family for image in train}
        for split, name in GROUND_TRUTH.items():
            shown = _few_of_each_unit(
                image
                for image in self.images[split]
                if has_known_caption(image, self.language, families, words)
            )
            rows = [
                {"image_path": image.path, "text_segment": None, "image_id": self._image_ids[image.path]}
                for image in shown
            ]
            counts |= self._write("captioning", split, rows)
            counts |= self._write_truth(name, shown)
        return counts

    def write_classes(self) -> dict[str, Any]:
        """Images by kind, sorted by name; unlike ImageNet's, the test part has labels and a file of its own."""
        classes = sorted({image.group for image in self.images["train"]} - {""})
        if len(classes) < 2:
            return {}
        labels = {name: label for label, name in enumerate(classes)}
        counts = {}
        for split in SPLITS:
            rows = [
                {"image_path": image.path, "label": labels[image.group]}
                for image in self.images[split]
                if image.group in labels
            ]
            counts |= self._write("imagenet", split, rows)
        write_json(self.folder / CLASSES_FILE, classes)
        return {**counts, CLASSES_FILE: len(classes)}

    def write_questions(self, questions: Mapping[str, Sequence[Question]], answers: Sequence[str]) -> dict[str, Any]:
        """Questions whose answer is one of ``answers``; others are left out, as of VQAv2."""
        labels = {answer: label for label, answer in enumerate(answers)}
        counts, qid = {}, 0
        for split in SPLITS:
            kept = [question for question in questions[split] if question.answer in labels]
            segments = self.encode([question.text for question in kept])
            rows = [
                {
                    "image_path": question.path,
                    "text_segment": segment,
                    "labels": [labels[question.answer]],
                    "scores": [1.0],
                    "qid": qid + number,
                }
                for number, (question, segment) in enumerate(zip(kept, segments))
            ]
            qid += len(rows)
            counts |= self._write("vqa", split, rows)
        write_answers(self.folder, answers)
        return counts

    def write_statements(self, statements: Mapping[str, Sequence[Statement]]) -> dict[str, Any]:
        """Statements about two images."""
        counts = {}
        for split in SPLITS:
            segments = self.encode([statement.text for statement in statements[split]])
            rows = [
                {
                    "image_path": statement.left,
                    "image2_path": statement.right,
                    "text_segment": segment,
                    "label": int(statement.is_true),
                    "identifier": statement.identifier,
                }
                for statement, segment in zip(statements[split], segments)
            ]
            counts |= self._write("nlvr2", split, rows)
        return counts

    @cached_property
    def _image_ids(self) -> dict[str, int]:
        paths = [image.path for split in SPLITS for image in self.images[split]]
        return {path: number for number, path in enumerate(paths)}

    def _captioned(
        self, images: Sequence[SourceImage], language: str, ids: Mapping[str, int]
    ) -> Iterator[dict[str, Any]]:
        captioned = [(image, text) for image in images for text in image.captions.get(language, ())]
        segments = self.encode([text for _, text in captioned])
        for (image, _), segment in zip(captioned, segments):
            yield {"image_path": image.path, "text_segment": segment, "image_id": ids[image.path]}

    def _write(self, task: str, split: str, rows: list[dict[str, Any]]) -> dict[str, int]:
        """Nothing is written where there are no rows."""
        if not rows:
            return {}
        file = written_file(self.folder, task, split)
        return {file.name: write_index(file, task, rows)}

    def _write_truth(self, name: str, images: Sequence[SourceImage]) -> dict[str, int]:
        """COCO's layout: images by id, and every caption with an id of its own."""
        if not images:
            return {}
        ids = self._image_ids
        annotations: list[dict[str, Any]] = []
        for image in images:
            for caption in image.captions[self.language]:
                annotations.append({"image_id": ids[image.path], "id": len(annotations), "caption": caption})
        rows = [{"id": ids[image.path]} for image in images]
        write_json(self.folder / name, {"images": rows, "annotations": annotations})
        return {name: len(annotations)}


def _few_of_each_unit(images: Iterable[SourceImage]) -> list[SourceImage]:
    """The first images of each unit."""
    seen: Counter[str] = Counter()
    kept = []
    for image in images:
        seen[image.unit] += 1
        if seen[image.unit] <= _MOST_OF_A_UNIT:
            kept.append(image)
    return kept


def by_part(images: Sequence[SourceImage], assigned: Mapping[str, str]) -> dict[str, list[SourceImage]]:
    """Part -> its images, in their order."""
    parts: dict[str, list[SourceImage]] = defaultdict(list)
    for image in images:
        parts[assigned[image.unit]].append(image)
    return {split: parts[split] for split in SPLITS}
