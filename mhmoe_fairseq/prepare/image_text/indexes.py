"""The index files of a prepared folder, in BEiT-3's formats, from pictures and what was derived from them."""

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
from .pictures import Picture
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
        pictures: all of them by part; an ``image_id`` counts through the parts in this order.
        language: of captioning, retrieval and derived data; pairs are written in all languages.
    """

    folder: Path
    encode: Encode
    pictures: Mapping[str, Sequence[Picture]]
    language: str

    def write_pretraining(self) -> dict[str, Any]:
        """Pictures, and pairs in every language; counts by file."""
        counts = {}
        for split in SPLITS:
            shown = self.pictures[split]
            counts |= self._write("image", split, [{"image_path": picture.path} for picture in shown])
            languages = list(dict.fromkeys(language for picture in shown for language in picture.captions))
            rows = [
                {**row, "language": language}
                for language in languages
                for row in self._captioned(shown, language, self._image_ids)
            ]
            counts |= self._write("pair", split, rows)
        return counts

    def write_retrieval(self) -> dict[str, Any]:
        """One line for each picture and caption; pictures are counted within each part."""
        counts = {}
        for split in SPLITS:
            shown = [picture for picture in self.pictures[split] if self.language in picture.captions]
            ids = {picture.path: number for number, picture in enumerate(shown)}
            counts |= self._write("retrieval", split, list(self._captioned(shown, self.language, ids)))
        return counts

    def write_captioning(self) -> dict[str, Any]:
        """Captions of training pictures; for held-out ones the pictures, and the truth in COCO's format.

        Held out are pictures whose caption can be put together from what training has (see ``has_known_caption``), at
        most six of a unit: a couple in 25 pairs of skin tones would weigh more than all else.
        """
        train = [picture for picture in self.pictures["train"] if self.language in picture.captions]
        counts = self._write("captioning", "train", list(self._captioned(train, self.language, self._image_ids)))
        words = {word for picture in train for text in picture.captions[self.language] for word in words_of(text)}
        families = {picture.family for picture in train}
        for split, name in GROUND_TRUTH.items():
            shown = _few_of_each_unit(
                picture
                for picture in self.pictures[split]
                if has_known_caption(picture, self.language, families, words)
            )
            rows = [
                {"image_path": picture.path, "text_segment": None, "image_id": self._image_ids[picture.path]}
                for picture in shown
            ]
            counts |= self._write("captioning", split, rows)
            counts |= self._write_truth(name, shown)
        return counts

    def write_classes(self) -> dict[str, Any]:
        """Pictures by kind, sorted by name; unlike ImageNet's, the test part has labels and a file of its own."""
        classes = sorted({picture.group for picture in self.pictures["train"]} - {""})
        if len(classes) < 2:
            return {}
        labels = {name: label for label, name in enumerate(classes)}
        counts = {}
        for split in SPLITS:
            rows = [
                {"image_path": picture.path, "label": labels[picture.group]}
                for picture in self.pictures[split]
                if picture.group in labels
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
        """Statements about two pictures."""
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
        paths = [picture.path for split in SPLITS for picture in self.pictures[split]]
        return {path: number for number, path in enumerate(paths)}

    def _captioned(
        self, pictures: Sequence[Picture], language: str, ids: Mapping[str, int]
    ) -> Iterator[dict[str, Any]]:
        captioned = [(picture, text) for picture in pictures for text in picture.captions.get(language, ())]
        segments = self.encode([text for _, text in captioned])
        for (picture, _), segment in zip(captioned, segments):
            yield {"image_path": picture.path, "text_segment": segment, "image_id": ids[picture.path]}

    def _write(self, task: str, split: str, rows: list[dict[str, Any]]) -> dict[str, int]:
        """Nothing is written where there are no rows."""
        if not rows:
            return {}
        file = written_file(self.folder, task, split)
        return {file.name: write_index(file, task, rows)}

    def _write_truth(self, name: str, pictures: Sequence[Picture]) -> dict[str, int]:
        """COCO's layout: pictures by id, and every caption with an id of its own."""
        if not pictures:
            return {}
        ids = self._image_ids
        annotations: list[dict[str, Any]] = []
        for picture in pictures:
            for caption in picture.captions[self.language]:
                annotations.append({"image_id": ids[picture.path], "id": len(annotations), "caption": caption})
        images = [{"id": ids[picture.path]} for picture in pictures]
        write_json(self.folder / name, {"images": images, "annotations": annotations})
        return {name: len(annotations)}


def _few_of_each_unit(pictures: Iterable[Picture]) -> list[Picture]:
    """The first pictures of each unit."""
    seen: Counter[str] = Counter()
    kept = []
    for picture in pictures:
        seen[picture.unit] += 1
        if seen[picture.unit] <= _MOST_OF_A_UNIT:
            kept.append(picture)
    return kept


def by_part(pictures: Sequence[Picture], assigned: Mapping[str, str]) -> dict[str, list[Picture]]:
    """Part -> its pictures, in their order."""
    parts: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        parts[assigned[picture.unit]].append(picture)
    return {split: parts[split] for split in SPLITS}
