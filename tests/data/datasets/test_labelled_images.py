"""The data sets of fine-tuning: targets, pairs of images, captions, and splits without labels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_folders import settings, words, write_images

from mhmoe_fairseq.data.datasets import labelled
from mhmoe_fairseq.data.datasets.labelled import CaptionDataset, ImagePairs, LabelledImages, VQADataset
from mhmoe_fairseq.data.images.reading import ImageError, read_image
from mhmoe_fairseq.data.images.transforms import EvaluationTransform, TrainTransform
from mhmoe_fairseq.data.multimodal.index import index_files, read_index, write_index

TRAIN, EVALUATION = TrainTransform(32), EvaluationTransform(32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    write_images(folder, 4)
    return folder


def index_of(folder: Path, task: str, *records: dict[str, Any], split: str = "train"):
    write_index(index_files(folder, task, split)[0], task, records)
    return read_index(folder, task, split)


def image(number: int) -> dict[str, str]:
    return {"image_path": f"images/{number}.png"}


def whole(folder: Path, number: int) -> torch.Tensor:
    return EVALUATION(read_image(folder / f"images/{number}.png"))


def batch_of(dataset, *rows: int) -> dict[str, Any]:
    return dataset.collater([dataset[row] for row in (rows or range(len(dataset)))])


QUESTIONS = [
    {**image(0), "text_segment": words(1, 3), "labels": [2], "scores": [1.0], "qid": 70},
    {**image(1), "text_segment": words(2, 5), "labels": [0, 4, 1], "scores": [0.9, 0.3, 0.6], "qid": 71},
    {**image(1), "text_segment": words(3, 20), "labels": [], "scores": [], "qid": 72},
]


def test_questions(folder):
    dataset = VQADataset(index_of(folder, "vqa", *QUESTIONS), settings(folder), TRAIN, num_classes=5)
    batch = batch_of(dataset)
    expected = np.zeros((3, 5))
    for row, question in enumerate(QUESTIONS):
        for label, score in zip(question["labels"], question["scores"]):
            expected[row, label] = score
    assert batch["targets"].dtype == torch.float32 and np.allclose(batch["targets"].numpy(), expected)
    assert batch["question_ids"].tolist() == [70, 71, 72]
    tokens = [[0, *question["text_segment"][:8], 2] for question in QUESTIONS]
    assert batch["net_input"]["text_tokens"].tolist() == [row + [1] * (10 - len(row)) for row in tokens]
    assert batch["net_input"]["images"].shape == (3, 3, 32, 32)
    assert (batch["nsentences"], batch["ntokens"]) == (3, 5 + 7 + 10)
    assert dataset.sizes.tolist() == [17 + 5, 17 + 7, 17 + 10]
    assert set(batch["net_input"]) == {"text_tokens", "images"}


def test_questions_without_answers(folder):
    index = index_of(folder, "vqa", {**QUESTIONS[0], "labels": [], "scores": []}, QUESTIONS[2], split="test")
    batch = batch_of(VQADataset(index, settings(folder, training=False), EVALUATION, num_classes=5))
    assert batch["targets"] is None and batch["question_ids"].tolist() == [70, 72]
    assert torch.equal(batch["net_input"]["images"][1], whole(folder, 1))


def test_an_answer_that_the_vocabulary_lacks(folder):
    index = index_of(folder, "vqa", *QUESTIONS)
    with pytest.raises(ValueError, match=r"vqa\.train\.jsonl:2: answer 4, answer2label\.txt has 4 answers"):
        VQADataset(index, settings(folder), TRAIN, num_classes=4)


def statement(left: int, right: int, number: int, **label: int) -> dict[str, Any]:
    paths = {"image_path": f"images/{left}.png", "image2_path": f"images/{right}.png"}
    return {**paths, "text_segment": words(number, number + 1), "identifier": f"dev-{number}-0", **label}


def test_statements_have_all_left_images_first(folder):
    index = index_of(folder, "nlvr2", statement(0, 1, 0, label=1), statement(2, 3, 1, label=0), split="valid")
    dataset = ImagePairs(index, settings(folder, training=False), EVALUATION)
    batch = batch_of(dataset)
    images = batch["net_input"]["images"]
    assert images.shape == (4, 3, 32, 32)
    for index, number in enumerate([0, 2, 1, 3]):
        assert torch.equal(images[index], whole(folder, number))
    first, second = [0, *words(0, 1), 2, 1], [0, *words(1, 2), 2]
    assert batch["net_input"]["text_tokens"].tolist() == [first, second, first, second]
    assert batch["targets"].tolist() == [1, 0] and batch["identifiers"] == ["dev-0-0", "dev-1-0"]
    assert batch["nsentences"] == 2 and dataset.sizes.tolist() == [2 * 20, 2 * 21]


def test_statements_without_labels_and_with_some(folder):
    index = index_of(folder, "nlvr2", statement(0, 1, 0), statement(2, 3, 1), split="test")
    assert batch_of(ImagePairs(index, settings(folder, training=False), EVALUATION))["targets"] is None
    mixed = index_of(folder, "nlvr2", statement(0, 1, 0, label=1), statement(2, 3, 1), split="valid")
    with pytest.raises(
        ValueError, match=r"nlvr2\.dev\.index\.jsonl:2: no label, but other lines of the split have one"
    ):
        ImagePairs(mixed, settings(folder), TRAIN)


def test_the_right_image_may_be_the_bad_one(folder):
    index = index_of(folder, "nlvr2", statement(0, 9, 0, label=1), statement(2, 3, 1, label=0))
    with pytest.raises(ImageError, match=r"nlvr2\.train\.index\.jsonl:1: .*images/9\.png: no such image"):
        ImagePairs(index, settings(folder), TRAIN)[0]
    batch = batch_of(ImagePairs(index, settings(folder, skip_bad_images=True), TRAIN))
    assert batch["identifiers"] == ["dev-1-0", "dev-1-0"] and batch["num_replaced"] == 1


CAPTIONS = [
    {**image(0), "text_segment": words(0, 4), "image_id": 500},
    {**image(0), "text_segment": words(1, 30), "image_id": 500},
    {**image(1), "text_segment": [], "image_id": 7},
]


def test_captions_in_training(folder):
    dataset = CaptionDataset(index_of(folder, "captioning", *CAPTIONS), settings(folder), TRAIN, fraction=0.6)
    ends = 0
    for epoch in range(1, 30):
        dataset.set_epoch(epoch)
        batch = batch_of(dataset)
        targets = batch["text_targets"]
        assert targets.shape == batch["net_input"]["text_tokens"].shape == (3, 10)
        assert targets.ne(1).sum(1).tolist() == [3, 5, 1]  # of 5, 9 and 1 tokens with </s>: 3, 5.4 and at least 1
        assert batch["ntokens"] == 9 and not targets[:, 0].ne(1).any()
        assert batch["image_ids"].tolist() == [500, 500, 7]
        ends += int(targets[0].eq(2).sum())
    assert 5 < ends < 29  # </s> is one of the tokens that are predicted
    assert "masked_patches" not in batch["net_input"]


def test_captions_in_evaluation_have_one_row_per_image(folder):
    index = index_of(folder, "captioning", *CAPTIONS, {**image(2), "text_segment": None, "image_id": 3}, split="valid")
    dataset = CaptionDataset(index, settings(folder, training=False), EVALUATION)
    batch = batch_of(dataset)
    assert len(dataset) == 3 and batch["image_ids"].tolist() == [500, 7, 3]
    assert batch["net_input"]["text_tokens"] is None and "text_targets" not in batch
    for index, number in enumerate([0, 1, 2]):
        assert torch.equal(batch["net_input"]["images"][index], whole(folder, number))
    assert dataset.sizes.tolist() == [17] * 3 and batch["ntokens"] == 3
    assert dataset.place(2).endswith("coco_captioning.val.jsonl:4")


def test_training_needs_captions(folder):
    index = index_of(folder, "captioning", CAPTIONS[0], {**image(1), "text_segment": None, "image_id": 7})
    with pytest.raises(ValueError, match=r"coco_captioning\.train\.jsonl:2: text_segment is null, but training needs"):
        CaptionDataset(index, settings(folder), TRAIN)
    with pytest.raises(ValueError, match=r"--caption-mask-prob \(0\)"):
        CaptionDataset(index, settings(folder), TRAIN, fraction=0)


@pytest.mark.parametrize("training", [True, False])
def test_retrieval_has_a_row_per_caption(folder, training):
    index = index_of(folder, "retrieval", *CAPTIONS)
    batch = batch_of(labelled.RetrievalDataset(index, settings(folder, training=training), EVALUATION))
    assert batch["image_ids"].tolist() == [500, 500, 7]
    assert batch["net_input"]["text_tokens"].tolist() == [
        [0, *words(0, 4), 2, *[1] * 4],
        [0, *words(1, 8), 2],
        [0, 2, *[1] * 8],
    ]
    assert torch.equal(batch["net_input"]["images"][0], batch["net_input"]["images"][1])


def test_classes(folder):
    index = index_of(folder, "imagenet", {**image(0), "label": 3}, {**image(1), "label": 0})
    batch = batch_of(LabelledImages(index, settings(folder), TRAIN, num_classes=4))
    assert batch["targets"].tolist() == [3, 0] and batch["net_input"]["text_tokens"] is None
    assert (batch["nsentences"], batch["ntokens"]) == (2, 2)
    with pytest.raises(ValueError, match=r"imagenet\.train\.index\.jsonl:1: class 3, there are 3 classes"):
        LabelledImages(index, settings(folder), TRAIN, num_classes=3)


def test_transforms_are_new_in_every_epoch(folder):
    index = index_of(folder, "imagenet", {**image(0), "label": 3}, {**image(1), "label": 0})
    dataset = LabelledImages(index, settings(folder), TRAIN)
    first = batch_of(dataset)["net_input"]["images"]
    assert torch.equal(batch_of(dataset)["net_input"]["images"], first)
    dataset.set_epoch(2)
    assert not torch.equal(batch_of(dataset)["net_input"]["images"], first)
