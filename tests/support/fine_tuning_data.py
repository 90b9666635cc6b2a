"""Indexes of the fine-tuning tasks for the folder of ``images_and_words``, and the words of trainings on them.

An image has two squares, ``a SIZE COLOUR square beside a SIZE COLOUR square``: questions ask for the colour of one,
statements name the left image's left colour, classes are left colours.
"""

import json
import random
from pathlib import Path
from typing import Any

from images_and_words import COLOURS, build_dictionary, ids, training_words, write_images_and_words

from mhmoe_fairseq.data.multimodal.index import index_files, read_index, write_answers, write_index

ANSWERS = list(COLOURS)
COUNTS = {split: {"image": 4, "text": 4, "pair": pairs} for split, pairs in (("train", 96), ("valid", 24))}
TASKS = {
    "mhmoe_vqa": "vqa_score", "mhmoe_nlvr2": "accuracy", "mhmoe_image_classification": "accuracy",
    "mhmoe_retrieval": "mean_recall",
}  # fmt: skip


def write_fine_tuning_data(folder: Path) -> Path:
    """Everything for pre-training and for the four tasks; the folder. Labels are known on all splits."""
    write_images_and_words(folder, COUNTS)
    write_answers(folder, ANSWERS)
    (folder / "imagenet.classes.json").write_text(json.dumps(ANSWERS))
    for split in ("train", "valid", "test"):
        pairs = [_parse(record) for record in _records(folder, split)]
        if split != "test":  # test is a copy of valid for images
            write_index(index_files(folder, "imagenet", split)[0], "imagenet", [_class_row(pair) for pair in pairs])
        write_index(index_files(folder, "retrieval", split)[0], "retrieval", [_caption_row(pair) for pair in pairs])
        write_index(index_files(folder, "vqa", split)[0], "vqa", _questions(pairs))
        write_index(index_files(folder, "nlvr2", split)[0], "nlvr2", _statements(pairs, split))
    return folder


def fine_tuning_words(
    task: str, data: Path, save_dir: Path, *flags: object, updates: int, criterion: str | None = None
) -> list[object]:
    """The words of ``fairseq-train`` for a task; later flags win over earlier ones."""
    return training_words(
        data, save_dir, "--task", task, "--criterion", criterion or task, "--batch-size", 16,
        "--best-checkpoint-metric", TASKS[task], "--maximize-best-checkpoint-metric", *flags, updates=updates,
    )  # fmt: skip


def _records(folder: Path, split: str) -> list[dict[str, Any]]:
    index = read_index(folder, "pair", split)
    return [index.record(row) for row in range(len(index))]


def _parse(record: dict[str, Any]) -> dict[str, Any]:
    words = [build_dictionary()[token] for token in record["text_segment"]]
    colours = [ANSWERS.index(word) for word in words if word in COLOURS]
    return {**record, "left": colours[0], "right": colours[1]}


def _class_row(pair: dict[str, Any]) -> dict[str, Any]:
    return {"image_path": pair["image_path"], "label": pair["left"]}


def _caption_row(pair: dict[str, Any]) -> dict[str, Any]:
    return {key: pair[key] for key in ("image_path", "text_segment", "image_id")}


def _questions(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two for each image; the other square's colour is worth 0.3."""
    rows = []
    for pair in pairs:
        for text, asked, other in (("the square is", "left", "right"), ("beside the square is", "right", "left")):
            scores = {pair[other]: 0.3, pair[asked]: 1.0}
            rows.append(
                {
                    "image_path": pair["image_path"],
                    "text_segment": ids(build_dictionary(), text),
                    "labels": list(scores),
                    "scores": list(scores.values()),
                    "qid": 100 + len(rows),
                }
            )
    return rows


def _statements(pairs: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """Each statement, about the left image, is used once as it is true, and once with the images changed."""
    shuffled = random.Random(3).sample(pairs, len(pairs))
    rows = []
    for number, (one, two) in enumerate(zip(pairs, shuffled)):
        if one["left"] == two["left"]:
            continue
        text = f"the square is {ANSWERS[one['left']]}"
        for label, (first, second) in ((1, (one, two)), (0, (two, one))):
            rows.append(
                {
                    "image_path": first["image_path"],
                    "image2_path": second["image_path"],
                    "text_segment": ids(build_dictionary(), text),
                    "label": label,
                    "identifier": f"{split}-{number}-{1 - label}-0",
                }
            )
    return rows
