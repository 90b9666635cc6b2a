"""Questions, statements, classes and captions of images by models that were fine-tuned on them.

Every metric stands beside what is reached without looking at the images. Predictions are written in the layouts that
the evaluation servers and scripts take.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.open import Opened
from ..common.errors import UserError
from ..common.files import atomic_open, write_json
from ..criterions.base import GateLossConfig
from ..criterions.finetuning import RetrievalCriterion
from ..data.datasets.labelled import ImagePairs, LabelledImages, RetrievalDataset, VQADataset
from ..data.multimodal.index import Index
from ..metrics.recall import RANKS, VectorMeter, chance_of_recall
from .expert_loads import LoadCounter
from .records import Metric, Record, mean_percent

Batches = Iterator[dict[str, Any]]
Metrics = dict[str, Metric]


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

    Raises:
        FileNotFoundError, UserError: as the task's ``read_split``; without labels ``output`` is needed.
    """
    task = opened.task
    what, predict = _PREDICT[task.index_task]
    dataset = task.read_split(split)
    if output is None and not dataset.has_targets:
        raise UserError(f"--split {split} has no labels to score by: give --output FILE for the predictions")
    with counter.counting():
        metrics = predict(opened, dataset, opened.batches(dataset, batch_size, num_workers), output)
    settings: dict[str, Any] = {"examples": len(dataset)}
    if task.has_derived_labels:
        settings["derived"] = True  # by templates, from the images' metadata
    return Record(what, split, metrics, settings=settings)


def _answer(opened: Opened, dataset: VQADataset, batches: Batches, output: Path | None) -> Metrics:
    """``accuracy`` is the mean soft score, VQA's."""
    index = dataset.index
    baselines = text_baselines(opened, index, "question") if dataset.has_targets else {}
    best = _best(opened, batches)
    if output is not None:
        answers = zip(index["qid"].tolist(), best)
        write_objects(output, ({"question_id": qid, "answer": opened.task.classes[label]} for qid, label in answers))
    if not dataset.has_targets:
        return {}
    return {"accuracy": mean_percent(_scores(index, best), baselines)}


def _judge(opened: Opened, dataset: ImagePairs, batches: Batches, output: Path | None) -> Metrics:
    index = dataset.index
    baselines = text_baselines(opened, index, "statement") if dataset.has_targets else {}
    identifiers, best = list(index["identifier"]), _best(opened, batches)
    if output is not None:
        write_rows(output, ([name, str(bool(judged))] for name, judged in zip(identifiers, best)))
    if not dataset.has_targets:
        return {}
    scores = _scores(index, best)
    return {"accuracy": mean_percent(scores, baselines), **consistency(identifiers, scores)}


def consistency(identifiers: Sequence[str], is_right: Sequence[float]) -> Metrics:
    """Share of sentences that are judged rightly with all of their images, as NLVR2 defines it.

    ``test1-12-0-1`` is the pair of images 0 with sentence 1 of set 12; where an identifier is of another form there is
    no such metric.
    """
    parts = [identifier.split("-") for identifier in identifiers]
    if any(len(part) != 4 for part in parts):
        return {}
    sentences: dict[tuple[str, ...], float] = {}
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
    for way, queries in (("text", len(texts_of_image)), ("image", len(dataset))):  # texts of an image; its image
        metrics |= {f"{way} R@{rank}": Metric(found[f"{way}_r{rank}"], "%", count=queries) for rank in RANKS}
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


def text_baselines(opened: Opened, scored: Index, text: str) -> dict[str, float]:
    """What answering from the text alone scores in percent, learnt on the training split; nothing if there is none.

    Args:
        scored: the rows to answer.
        text: what the texts are; the other baseline always gives one answer.
    """
    try:
        training = opened.task.read_index("train")
    except FileNotFoundError:
        return {}
    if "labels" not in training and "label" not in training:
        return {}
    answers, majority = answers_by_text((_text(training, row), _weights(training, row)) for row in range(len(training)))
    by_text = _scores(scored, [answers.get(_text(scored, row), majority) for row in range(len(scored))])
    always_one = _scores(scored, [majority] * len(scored))
    return {
        f"{text} only": 100 * float(np.mean(by_text)),
        "most frequent answer": 100 * float(np.mean(always_one)),
    }


def answers_by_text(examples: Iterable[tuple[Hashable, Mapping[int, float]]]) -> tuple[dict[Hashable, int], int]:
    """The answer that each text of the training set most often has, and the most frequent of all; of equals the lowest.

    Args:
        examples: texts, each with the weights of its labels.

    Raises:
        UserError: if no example has a label.
    """
    by_text: dict[Hashable, Counter[int]] = {}
    total: Counter[int] = Counter()
    for text, weights in examples:
        by_text.setdefault(text, Counter()).update(weights)
        total.update(weights)
    if not total:
        raise UserError("the training set has no labels")
    return {text: _heaviest(weights) for text, weights in by_text.items() if weights}, _heaviest(total)


def _heaviest(weights: Counter[int]) -> int:
    return min(weights, key=lambda label: (-weights[label], label))


def write_objects(path: Path, objects: Iterable[dict[str, Any]]) -> None:
    """Write a JSON list atomically, a line for each object."""
    lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in objects)
    with atomic_open(path) as stream:
        stream.write(f"[\n{lines}\n]\n".encode())


def write_rows(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """Write CSV atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with atomic_open(path) as stream:
        stream.write(text.getvalue().encode())


def _logits(opened: Opened, batch: dict[str, Any]) -> Tensor:
    """``(B, classes)`` float32: what the head says of a batch."""
    return opened.model(**batch["net_input"], head=opened.task.head_name)[0].float()


def _best(opened: Opened, batches: Batches) -> list[int]:
    """The most probable label of every row."""
    return [label for batch in batches for label in _logits(opened, batch).argmax(dim=1).tolist()]


def _scores(index: Index, answers: Sequence[int]) -> list[float]:
    """What a label for each row scores: its weight among those of the row."""
    return [_weights(index, row).get(label, 0.0) for row, label in enumerate(answers)]


def _weights(index: Index, row: int) -> dict[int, float]:
    if "labels" in index:
        return dict(zip(index["labels"][row].tolist(), index["scores"][row].tolist()))
    return {int(index["label"][row]): 1.0}


def _text(index: Index, row: int) -> tuple[int, ...]:
    return tuple(index["text_segment"][row].tolist())
