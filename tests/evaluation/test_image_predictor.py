"""What ``mhmoe predict`` makes of a head's scores: the most probable answers, and figures beside baselines, by hand."""

from __future__ import annotations

import math
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY
from fine_tuning_data import ANSWERS, write_fine_tuning_data
from images_and_words import IMG_SIZE, PATCH_SIZE

from mhmoe_fairseq.data.multimodal.index import Index, index_files, read_index, write_index
from mhmoe_fairseq.evaluation.image_predictor import predict_split
from mhmoe_fairseq.metrics.recall import chance_of_recall

SHAPES = {"img_size": IMG_SIZE, "patch_size": PATCH_SIZE, "max_text_length": 16}
OUTER = {"tpu": False, "seed": 1, "save_dir": "", "restore_file": "checkpoint_last.pt", "finetune_from_model": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fine_tuning_data(tmp_path_factory.mktemp("images") / "data")


class Scored:
    """In place of a fine-tuned model: row i of a split has the scores of row i of a table."""

    def __init__(self, name: str, data: Path, scores: torch.Tensor | None = None) -> None:
        config = TASK_DATACLASS_REGISTRY[name](data=str(data), **SHAPES)
        self.task = TASK_REGISTRY[name].setup_task(Namespace(**{**vars(config), **OUTER}))
        self.scores = scores
        self.model = Vectors()

    def batches(self, dataset: Any, batch_size: int, num_workers: int) -> Iterator[dict[str, Any]]:
        for start in range(0, len(dataset), batch_size):
            rows = range(start, min(start + batch_size, len(dataset)))
            yield dataset.collater([dataset[row] for row in rows])

    def logits(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.scores[batch["id"]]


class Vectors(torch.nn.Module):
    """Vectors of images and texts for retrieval: those of equal inputs are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = {"retrieval": Namespace(logit_scale=torch.zeros(()))}
        self.eval()

    def forward(self, images: Any = None, text_tokens: Any = None, head: str = "") -> tuple[torch.Tensor, dict]:
        rows = text_tokens.float() if images is None else images.flatten(1)
        return torch.nn.functional.normalize(rows[:, :8] + 1e-3, dim=1), {}


def rows_of(index: Index) -> list[dict[str, Any]]:
    return [index.record(row) for row in range(len(index))]


def table(rows: int, columns: int) -> torch.Tensor:
    """Scores without ties, whose largest stand everywhere."""
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(3))


def heaviest(weights: Counter) -> int:
    return min(weights, key=lambda label: (-weights[label], label))


def by_text(training: list[dict[str, Any]], weights: Any) -> tuple[dict[tuple, int], int]:
    """The heaviest label of each text of the training split, and of all of it."""
    of_text: dict[tuple, Counter] = {}
    total: Counter = Counter()
    for row in training:
        of_text.setdefault(tuple(row["text_segment"]), Counter()).update(weights(row))
        total.update(weights(row))
    return {text: heaviest(found) for text, found in of_text.items()}, heaviest(total)


def test_answers_are_the_most_probable_ones(data: Path) -> None:
    rows = rows_of(read_index(data, "vqa", "valid"))
    scores = table(len(rows), len(ANSWERS))
    found = predict_split(Scored("mhmoe_vqa", data, scores), "valid", batch_size=7)
    best = [max(range(len(ANSWERS)), key=lambda label: float(row[label])) for row in scores]
    assert len(set(best)) == len(ANSWERS)
    assert found.answers == [ANSWERS[label] for label in best]
    assert found.question_ids.tolist() == [row["qid"] for row in rows]
    soft = [dict(zip(row["labels"], row["scores"])) for row in rows]
    own = [weights.get(label, 0.0) for weights, label in zip(soft, best)]
    assert 0 < sum(own) < len(own) and found.scores.tolist() == pytest.approx(own)
    training = rows_of(read_index(data, "vqa", "train"))
    of_text, most = by_text(training, lambda row: dict(zip(row["labels"], row["scores"])))
    guessed = [weights.get(of_text.get(tuple(row["text_segment"]), most), 0.0) for row, weights in zip(rows, soft)]
    always = [weights.get(most, 0.0) for weights in soft]
    assert guessed != always
    assert found.baselines == {
        "question only": pytest.approx(100 * sum(guessed) / len(rows)),
        "most frequent answer": pytest.approx(100 * sum(always) / len(rows)),
    }


def test_statements_are_judged_by_the_larger_score(data: Path) -> None:
    rows = rows_of(read_index(data, "nlvr2", "valid"))
    scores = table(len(rows), 2)
    found = predict_split(Scored("mhmoe_nlvr2", data, scores), "valid", batch_size=5)
    judged = [int(right > wrong) for wrong, right in scores.tolist()]
    assert 0 < sum(judged) < len(judged)
    assert found.judgements.tolist() == judged and found.identifiers == [row["identifier"] for row in rows]
    assert found.labels.tolist() == [row["label"] for row in rows]
    right = sum(one == row["label"] for one, row in zip(judged, rows))
    assert found.figures["accuracy"] == pytest.approx(100 * right / len(rows)) != 50


def test_statements_without_labels_are_judged_alike(data: Path, tmp_path: Path) -> None:
    rows = rows_of(read_index(data, "nlvr2", "test"))
    scores = table(len(rows), 2)
    labelled = predict_split(Scored("mhmoe_nlvr2", data, scores), "test")
    for name in ("dict.txt", "images"):
        (tmp_path / name).symlink_to(data / name)
    plain = [{key: value for key, value in row.items() if key != "label"} for row in rows]
    write_index(index_files(tmp_path, "nlvr2", "test")[0], "nlvr2", plain)
    found = predict_split(Scored("mhmoe_nlvr2", tmp_path, scores), "test")
    assert found.labels is None and found.figures == {}
    labelled.write(tmp_path / "labelled.csv")
    found.write(tmp_path / "plain.csv")
    lines = (tmp_path / "plain.csv").read_text().splitlines()
    assert lines == (tmp_path / "labelled.csv").read_text().splitlines()
    assert lines == [f"{row['identifier']},{right > wrong}" for row, (wrong, right) in zip(rows, scores.tolist())]


def test_classes_are_the_five_most_probable_in_order(data: Path) -> None:
    rows = rows_of(read_index(data, "imagenet", "valid"))
    scores = table(len(rows), len(ANSWERS))
    found = predict_split(Scored("mhmoe_image_classification", data, scores), "valid", batch_size=9)
    best = [sorted(range(len(ANSWERS)), key=lambda label: -float(row[label]))[:5] for row in scores]
    assert found.best.tolist() == best and found.paths == [row["image_path"] for row in rows]
    labels = [row["label"] for row in rows]
    assert found.figures == {
        "top-1": pytest.approx(100 * sum(one[0] == label for one, label in zip(best, labels)) / len(rows)),
        "top-5": pytest.approx(100 * sum(label in one for one, label in zip(best, labels)) / len(rows)),
    }
    counts = Counter(labels)
    assert max(counts.values()) > counts[min(counts)]
    assert found.baselines == {"most frequent class": pytest.approx(100 * max(counts.values()) / len(rows))}


def test_retrieval_stands_beside_what_chance_finds(data: Path, tmp_path: Path) -> None:
    """Of images with one and with several captions."""
    rows = rows_of(read_index(data, "retrieval", "valid"))
    for name in ("dict.txt", "images"):
        (tmp_path / name).symlink_to(data / name)
    several = [{**row, "image_id": min(row["image_id"], 20)} for row in rows]
    several = [{**row, "image_path": rows[row["image_id"]]["image_path"]} for row in several]
    write_index(index_files(tmp_path, "retrieval", "valid")[0], "retrieval", several)
    found = predict_split(Scored("mhmoe_retrieval", tmp_path), "valid", batch_size=10)
    owned = list(Counter(row["image_id"] for row in several).values())
    assert (found.images, found.captions) == (len(owned), len(rows)) and max(owned) > 1
    assert found.baselines == {"mean recall by chance": pytest.approx(chance_of_recall(owned))}
    assert not math.isclose(chance_of_recall(owned), chance_of_recall([1] * len(owned)), rel_tol=1e-3)
