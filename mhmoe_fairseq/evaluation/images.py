"""Questions, statements, classes and captions of images by models that were fine-tuned on them.

Every metric stands beside what is reached without looking at the images. Predictions are written in the layouts that
the evaluation servers and scripts take.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.open import Opened
from ..common.errors import UserError
from ..common.files import atomic_open, write_json
from ..criterions.base import GateLossConfig
from ..criterions.retrieval import RetrievalCriterion
from ..data.datasets.labelled import ImagePairs, LabelledImages, RetrievalDataset, VQADataset
from ..data.multimodal.index import Index
from ..metrics.baselines import TextOnly
from ..metrics.recall import RANKS, VectorMeter, chance_of_recall
from .expert_loads import LoadCounter
from .records import Metric, Record, mean_percent

Batches = Iterator[dict[str, Any]]
Metrics = dict[str, Metric]
# Weights of a row's labels in an index: an answer scores its weight.
Weights = Callable[[Index, int], dict[int, float]]


@torch.no_grad()
def evaluate_images(
    opened: Opened,
    split: str,
    counter: LoadCounter,
    *,
    output: Path | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
) -> Record:
    """Answer the questions, judge the statements, classify the images or find the captions of a split.

    Args:
        split: ``train``, ``valid`` or ``test``; of questions also ``test-dev``.
        output: file for the predictions: of questions JSON for VQAv2's evaluation server, of statements CSV for NLVR2's
            own ``metrics.py``, of classes CSV with a header, of retrieval the metrics as a JSON object.
        batch_size: examples that the model sees together.
        num_workers: processes that decode images.

    Raises:
        FileNotFoundError, UserError: as the task's ``read_split``; without labels ``output`` is needed.
    """
    task = opened.task
    what, predict = _PREDICT[task.index_task]
    dataset = task.read_split(split)
    if output is None and not getattr(dataset, "has_targets", True):
        raise UserError(f"--split {split} has no labels to score by: give --output FILE for the predictions")
    with counter.counting():
        metrics = predict(opened, dataset, opened.batches(dataset, batch_size, num_workers), output)
    settings: dict[str, Any] = {"examples": len(dataset)}
    if task.has_derived_labels:
        settings["derived"] = True  # by templates, from the images' metadata
    return Record(what, split, metrics, settings=settings)


def _answer(opened: Opened, dataset: VQADataset, batches: Batches, output: Path | None) -> Metrics:
    """``accuracy`` is the mean soft score, VQA's."""
    ids, labels, scores = [], [], []
    for batch in batches:
        best = _logits(opened, batch).argmax(dim=1)
        ids += batch["question_ids"].tolist()
        labels += best.tolist()
        if batch["targets"] is not None:
            scores += batch["targets"].gather(1, best[:, None])[:, 0].tolist()
    answers = [opened.task.classes[label] for label in labels]
    if output is not None:
        write_objects(output, [{"question_id": number, "answer": answer} for number, answer in zip(ids, answers)])
    if not dataset.has_targets:
        return {}
    return {"accuracy": mean_percent(scores, text_baselines(opened, dataset.index, _answer_weights, "question"))}


def _judge(opened: Opened, dataset: ImagePairs, batches: Batches, output: Path | None) -> Metrics:
    identifiers, judgements, labels = [], [], []
    for batch in batches:
        judgements += _logits(opened, batch).argmax(dim=1).tolist()
        identifiers += batch["identifiers"]
        if batch["targets"] is not None:
            labels += batch["targets"].tolist()
    if output is not None:
        write_rows(output, ([name, str(bool(judged))] for name, judged in zip(identifiers, judgements)))
    if not dataset.has_targets:
        return {}
    is_right = [judged == label for judged, label in zip(judgements, labels)]
    baselines = text_baselines(opened, dataset.index, _class_weights, "statement")
    return {"accuracy": mean_percent(is_right, baselines), **consistency(identifiers, is_right)}


def consistency(identifiers: Sequence[str], is_right: Sequence[bool]) -> Metrics:
    """Share of sentences that are judged rightly with all of their images, as NLVR2 defines it.

    ``test1-12-0-1`` is the pair of images 0 with sentence 1 of set 12; where an identifier is of another form there is
    no such metric.
    """
    parts = [identifier.split("-") for identifier in identifiers]
    if any(len(part) != 4 for part in parts):
        return {}
    sentences: dict[tuple[str, ...], bool] = {}
    for (split, number, _, sentence), right in zip(parts, is_right):
        key = (split, number, sentence)
        sentences[key] = sentences.get(key, True) and right
    return {"consistency": mean_percent(list(sentences.values()))}


def _classify(opened: Opened, dataset: LabelledImages, batches: Batches, output: Path | None) -> Metrics:
    """How often the right class is the most probable one, and among the five most probable ones."""
    classes, paths, labels = opened.task.classes, dataset.index["image_path"], dataset.index["label"]
    best = [_logits(opened, batch).topk(min(5, len(classes)), dim=1).indices.cpu() for batch in batches]
    best_PK = torch.cat(best).numpy()
    if output is not None:
        header = ["image_path", "label", *(f"top{rank + 1}" for rank in range(best_PK.shape[1]))]
        named = ([classes[label], *(classes[guess] for guess in best)] for label, best in zip(labels, best_PK))
        write_rows(output, [header, *([paths[row], *names] for row, names in enumerate(named))])
    counts = np.bincount(labels)
    majority = {"most frequent class": 100 * float(counts.max() / counts.sum())}
    is_right = best_PK == labels[:, None]
    return {
        "top-1": mean_percent(is_right[:, 0].tolist(), majority),
        "top-5": mean_percent(is_right.any(axis=1).tolist()),
    }


def _retrieve(opened: Opened, dataset: RetrievalDataset, batches: Batches, output: Path | None) -> Metrics:
    """Recall of the texts of an image and of the image of a text, and their mean."""
    criterion = RetrievalCriterion(opened.task, GateLossConfig())
    meter = VectorMeter()
    for batch in batches:
        meter.update(criterion.vectors(criterion.embed(opened.model, batch), batch))
    texts_of_image = np.unique(dataset.index["image_id"], return_counts=True)[1].tolist()
    found, chance = meter.recalls, {"chance": chance_of_recall(texts_of_image)}
    metrics = {"mean recall": Metric(found["mean_recall"], "%", count=len(dataset), baselines=chance)}
    for way in ("text", "image"):
        metrics |= {f"{way} R@{rank}": Metric(found[f"{way}_r{rank}"], "%", count=len(dataset)) for rank in RANKS}
    if output is not None:
        write_json(output, {name: metric.value for name, metric in metrics.items()})
    return metrics


# By the index that the task reads: what a record of it is called, and how it is measured.
_PREDICT: dict[str, tuple[str, Callable[..., Metrics]]] = {
    "vqa": ("questions", _answer),
    "nlvr2": ("statements", _judge),
    "imagenet": ("image classification", _classify),
    "retrieval": ("retrieval", _retrieve),
}


def text_baselines(opened: Opened, scored: Index, weights: Weights, text: str) -> dict[str, float]:
    """What answering from the text alone scores in percent, learnt on the training split; nothing if there is none.

    Args:
        scored: the rows to answer.
        weights: of a row's labels.
        text: what the texts are; the other baseline always gives one answer.
    """
    try:
        training = opened.task.read_index("train")
    except FileNotFoundError:
        return {}
    baseline = TextOnly((_text(training, row), weights(training, row)) for row in range(len(training)))
    rows = [(_text(scored, row), weights(scored, row)) for row in range(len(scored))]
    by_text = np.mean([right.get(baseline.answer(text), 0.0) for text, right in rows])
    always_one = np.mean([right.get(baseline.majority, 0.0) for _, right in rows])
    return {f"{text} only": 100 * float(by_text), "most frequent answer": 100 * float(always_one)}


def write_objects(path: Path, objects: Iterable[dict[str, Any]]) -> None:
    """Write a JSON list atomically, a line for each object."""
    lines = ",\n".join(json.dumps(one, ensure_ascii=False) for one in objects)
    _write(path, f"[\n{lines}\n]\n")


def write_rows(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """Write CSV atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    _write(path, text.getvalue())


def _write(path: Path, text: str) -> None:
    with atomic_open(path) as stream:
        stream.write(text.encode())


def _logits(opened: Opened, batch: dict[str, Any]) -> Tensor:
    """``(B, classes)`` float32: what the head says of a batch."""
    return opened.model(**batch["net_input"], head=opened.task.head_name)[0].float()


def _text(index: Index, row: int) -> tuple[int, ...]:
    return tuple(index["text_segment"][row].tolist())


def _answer_weights(index: Index, row: int) -> dict[int, float]:
    return dict(zip(index["labels"][row].tolist(), index["scores"][row].tolist()))


def _class_weights(index: Index, row: int) -> dict[int, float]:
    return {int(index["label"][row]): 1.0}
