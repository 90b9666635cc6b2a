"""Run a model that was fine-tuned on images over a split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ..common.errors import UserError
from ..criterions.gate_losses import GateLossConfig
from ..criterions.retrieval import RetrievalCriterion
from ..data.datasets import ImagePairs, LabelledImages, RetrievalDataset, VQADataset
from ..data.multimodal.index import Index
from ..metrics.recall import VectorMeter, chance_of_recall
from ..metrics.text_only import TextOnly
from .fine_tuned import FineTuned
from .image_predictions import Answers, Classes, Judgements, Predictions, Recalls

Batches = Iterator[dict[str, Any]]
# Weights of a row's labels in an index.
Weights = Callable[[Index, int], dict[int, float]]


def predict_split(model: FineTuned, split: str, batch_size: int = 32, num_workers: int = 0) -> Predictions:
    """Predictions for every row of a split.

    Args:
        batch_size: rows that the model sees together.
        num_workers: processes that decode images.

    Raises:
        FileNotFoundError, ValueError: as the task's ``read_split``.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size ({batch_size}) must be at least 1")
    dataset = model.task.read_split(split)
    predict = _PREDICT[model.task.index_task]
    with torch.no_grad():
        return predict(model, split, dataset, model.batches(dataset, batch_size, num_workers))


def _answer(model: FineTuned, split: str, dataset: VQADataset, batches: Batches) -> Answers:
    ids, labels, scores = [], [], []
    for batch in batches:
        best = model.logits(batch).argmax(dim=1)
        ids += batch["question_ids"].tolist()
        labels += best.tolist()
        if batch["targets"] is not None:
            scores += batch["targets"].gather(1, best[:, None])[:, 0].tolist()
    answers = [model.task.classes[label] for label in labels]
    if not dataset.has_targets:
        return Answers(split, np.array(ids), answers, None)
    baselines = text_baselines(model, dataset.index, _answer_weights, "question only")
    return Answers(split, np.array(ids), answers, np.array(scores), baselines=baselines)


def _judge(model: FineTuned, split: str, dataset: ImagePairs, batches: Batches) -> Judgements:
    identifiers, judgements, labels = [], [], []
    for batch in batches:
        judgements += model.logits(batch).argmax(dim=1).tolist()
        identifiers += batch["identifiers"]
        if batch["targets"] is not None:
            labels += batch["targets"].tolist()
    if not dataset.has_targets:
        return Judgements(split, identifiers, np.array(judgements), None)
    baselines = text_baselines(model, dataset.index, _class_weights, "statement only")
    return Judgements(split, identifiers, np.array(judgements), np.array(labels), baselines=baselines)


def _classify(model: FineTuned, split: str, dataset: LabelledImages, batches: Batches) -> Classes:
    best = [model.logits(batch).topk(min(5, len(model.task.classes)), dim=1).indices.cpu() for batch in batches]
    paths = [dataset.index["image_path"][row] for row in range(len(dataset.index))]
    labels = dataset.index["label"]
    counts = np.bincount(labels)
    baselines = {"most frequent class": 100 * float(counts.max() / counts.sum())}
    return Classes(split, paths, model.task.classes, torch.cat(best).numpy(), labels, baselines=baselines)


def _retrieve(model: FineTuned, split: str, dataset: RetrievalDataset, batches: Batches) -> Recalls:
    criterion = RetrievalCriterion(model.task, GateLossConfig())
    meter = VectorMeter()
    for batch in batches:
        meter.update(criterion.vectors(criterion.embed(model.model, batch), batch))
    texts_of_image = np.unique(dataset.index["image_id"], return_counts=True)[1].tolist()
    chance = {"mean recall by chance": chance_of_recall(texts_of_image)}
    return Recalls(split, len(texts_of_image), len(dataset), meter.recalls, baselines=chance)


_PREDICT: dict[str, Callable[..., Predictions]] = {
    "vqa": _answer,
    "nlvr2": _judge,
    "imagenet": _classify,
    "retrieval": _retrieve,
}


def text_baselines(model: FineTuned, scored: Index, weights: Weights, name: str) -> dict[str, float]:
    """What answering from the text alone scores in percent, learnt on the training split; nothing if there is none.

    Args:
        scored: the rows to answer.
        weights: of a row's labels: an answer scores its weight.
        name: of the baseline that reads the texts; the other one always gives one answer.
    """
    try:
        training = model.task.read_index("train")
    except FileNotFoundError:
        return {}
    baseline = TextOnly((_text(training, row), weights(training, row)) for row in range(len(training)))
    rows = [(_text(scored, row), weights(scored, row)) for row in range(len(scored))]
    by_text = np.mean([right.get(baseline.answer(text), 0.0) for text, right in rows])
    always_one = np.mean([right.get(baseline.majority, 0.0) for _, right in rows])
    return {name: 100 * float(by_text), "most frequent answer": 100 * float(always_one)}


def _text(index: Index, row: int) -> tuple[int, ...]:
    return tuple(index["text_segment"][row].tolist())


def _answer_weights(index: Index, row: int) -> dict[int, float]:
    return dict(zip(index["labels"][row].tolist(), index["scores"][row].tolist()))


def _class_weights(index: Index, row: int) -> dict[int, float]:
    return {int(index["label"][row]): 1.0}
