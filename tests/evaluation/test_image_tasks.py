"""Predictions of images in the layouts of servers, and their metrics beside baselines, by hand."""

import csv
import json
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY
from fine_tuning_data import ANSWERS, write_fine_tuning_data
from images_and_words import IMG_SIZE, PATCH_SIZE

from mhmoe_fairseq.checkpoints.open import Opened
from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.data.multimodal.index import Index, index_files, read_index, write_index
from mhmoe_fairseq.evaluation.expert_loads import LoadCounter
from mhmoe_fairseq.evaluation.images import answers_by_text, consistency, evaluate_images, write_rows
from mhmoe_fairseq.evaluation.records import Record
from mhmoe_fairseq.metrics.recall import chance_of_recall

SHAPES = {"img_size": IMG_SIZE, "patch_size": PATCH_SIZE, "max_text_length": 16}
OUTER = {"tpu": False, "seed": 1, "save_dir": "", "restore_file": "checkpoint_last.pt", "finetune_from_model": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fine_tuning_data(tmp_path_factory.mktemp("images") / "data")


class Model(torch.nn.Module):
    """In place of a fine-tuned model: the next rows have the next scores of a table, or vectors of inputs."""

    def __init__(self, scores: torch.Tensor | None) -> None:
        super().__init__()
        self.heads = {"retrieval": Namespace(logit_scale=torch.zeros(()))}
        self.device_of = torch.nn.Parameter(torch.zeros(()))
        self.scores, self.next = scores, 0

    def forward(self, images: Any = None, text_tokens: Any = None, head: str = "", **_: Any) -> tuple[Any, dict]:
        if self.scores is not None:
            start, self.next = self.next, self.next + len(images if text_tokens is None else text_tokens)
            return self.scores[start : self.next], {}
        rows = text_tokens.float() if images is None else images.flatten(1)
        return torch.nn.functional.normalize(rows[:, :8] + 1e-3, dim=1), {}


def evaluated(name: str, data: Path, split: str, scores: torch.Tensor | None = None, **options: Any) -> Record:
    config = TASK_DATACLASS_REGISTRY[name](data=str(data), **SHAPES)
    task = TASK_REGISTRY[name].setup_task(Namespace(**{**vars(config), **OUTER}))
    opened = Opened(Model(scores).eval(), task, {"task": {"_name": name}}, data / "model.pt")
    return evaluate_images(opened, split, LoadCounter([]), **options)


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


def test_answers_are_the_most_probable_ones(data: Path, tmp_path: Path) -> None:
    rows = rows_of(read_index(data, "vqa", "valid"))
    scores = table(len(rows), len(ANSWERS))
    found = evaluated("mhmoe_vqa", data, "valid", scores, batch_size=7, output=tmp_path / "out.json")
    best = [max(range(len(ANSWERS)), key=lambda label: float(row[label])) for row in scores]
    assert len(set(best)) == len(ANSWERS)
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == [
        {"question_id": row["qid"], "answer": ANSWERS[label]} for row, label in zip(rows, best)
    ]
    soft = [dict(zip(row["labels"], row["scores"])) for row in rows]
    own = [weights.get(label, 0.0) for weights, label in zip(soft, best)]
    accuracy = found.metrics["accuracy"]
    assert 0 < sum(own) < len(own) and accuracy.value == pytest.approx(100 * sum(own) / len(own))
    training = rows_of(read_index(data, "vqa", "train"))
    of_text, most = by_text(training, lambda row: dict(zip(row["labels"], row["scores"])))
    guessed = [weights.get(of_text.get(tuple(row["text_segment"]), most), 0.0) for row, weights in zip(rows, soft)]
    always = [weights.get(most, 0.0) for weights in soft]
    assert guessed != always
    assert accuracy.baselines == {
        "question only": pytest.approx(100 * sum(guessed) / len(rows)),
        "most frequent answer": pytest.approx(100 * sum(always) / len(rows)),
    }


def test_statements_are_judged_by_the_larger_score(data: Path, tmp_path: Path) -> None:
    rows = rows_of(read_index(data, "nlvr2", "valid"))
    scores = table(len(rows), 2)
    found = evaluated("mhmoe_nlvr2", data, "valid", scores, batch_size=5, output=tmp_path / "out.csv")
    judged = [right > wrong for wrong, right in scores.tolist()]
    assert 0 < sum(judged) < len(judged)
    assert (tmp_path / "out.csv").read_text().splitlines() == [
        f"{row['identifier']},{right}" for row, right in zip(rows, judged)
    ]
    right = sum(one == bool(row["label"]) for one, row in zip(judged, rows))
    assert found.metrics["accuracy"].value == pytest.approx(100 * right / len(rows)) != 50


def test_without_labels_there_are_predictions_only(data: Path, tmp_path: Path) -> None:
    rows = rows_of(read_index(data, "nlvr2", "test"))
    for name in ("dict.txt", "images"):
        (tmp_path / name).symlink_to(data / name)
    plain = [{key: value for key, value in row.items() if key != "label"} for row in rows]
    write_index(index_files(tmp_path, "nlvr2", "test")[0], "nlvr2", plain)
    scores = table(len(rows), 2)
    with pytest.raises(UserError, match="--split test has no labels to score by: give --output FILE"):
        evaluated("mhmoe_nlvr2", tmp_path, "test", scores)
    found = evaluated("mhmoe_nlvr2", tmp_path, "test", scores, output=tmp_path / "out.csv")
    assert found.metrics == {} and found.settings["examples"] == len(rows)
    assert len((tmp_path / "out.csv").read_text().splitlines()) == len(rows)


def test_consistency_is_that_of_nlvr2s_own_rules() -> None:
    """Of sentences that are right with all of their images; without identifiers of that form there is none."""
    names = ["test1-12-0-0", "test1-12-1-0", "test1-12-0-1", "test1-7-3-0"]
    assert consistency(names, [True, False, True, True])["consistency"].value == pytest.approx(200 / 3)
    by_image = [f"test1-12-{image}-{sentence}" for image in range(3) for sentence in range(2)]
    assert consistency(by_image, [True, False] * 3)["consistency"].value == 50.0
    assert consistency(["a", "b"], [True, False]) == {}


def test_classes_are_the_five_most_probable_in_order(data: Path, tmp_path: Path) -> None:
    rows = rows_of(read_index(data, "imagenet", "valid"))
    scores = table(len(rows), len(ANSWERS))
    found = evaluated("mhmoe_image_classification", data, "valid", scores, batch_size=9, output=tmp_path / "out.csv")
    best = [sorted(range(len(ANSWERS)), key=lambda label: -float(row[label]))[:5] for row in scores]
    header, *lines = csv.reader((tmp_path / "out.csv").read_text().splitlines())
    assert header == ["image_path", "label", "top1", "top2", "top3", "top4", "top5"][: len(header)]
    assert lines == [
        [row["image_path"], *(ANSWERS[label] for label in (row["label"], *five))] for row, five in zip(rows, best)
    ]
    labels = [row["label"] for row in rows]
    assert {name: metric.value for name, metric in found.metrics.items()} == {
        "top-1": pytest.approx(100 * sum(one[0] == label for one, label in zip(best, labels)) / len(rows)),
        "top-5": pytest.approx(100 * sum(label in one for one, label in zip(best, labels)) / len(rows)),
    }
    counts = Counter(labels)
    assert max(counts.values()) > counts[min(counts)]
    expected = {"most frequent class": pytest.approx(100 * max(counts.values()) / len(rows))}
    assert found.metrics["top-1"].baselines == expected


def test_retrieval_stands_beside_what_chance_finds(data: Path, tmp_path: Path) -> None:
    """Of images with one and with several captions."""
    rows = rows_of(read_index(data, "retrieval", "valid"))
    for name in ("dict.txt", "images"):
        (tmp_path / name).symlink_to(data / name)
    several = [{**row, "image_id": min(row["image_id"], 20)} for row in rows]
    several = [{**row, "image_path": rows[row["image_id"]]["image_path"]} for row in several]
    write_index(index_files(tmp_path, "retrieval", "valid")[0], "retrieval", several)
    found = evaluated("mhmoe_retrieval", tmp_path, "valid", batch_size=10, output=tmp_path / "out.json").metrics
    assert json.loads((tmp_path / "out.json").read_text()) == {name: metric.value for name, metric in found.items()}
    owned = list(Counter(row["image_id"] for row in several).values())
    assert found["mean recall"].count == len(rows) and max(owned) > 1
    assert (found["text R@1"].count, found["image R@1"].count) == (len(owned), len(rows))
    assert found["mean recall"].baselines == {"chance": pytest.approx(chance_of_recall(owned))}
    ranked = [found[f"{way} R@{rank}"].value for way in ("text", "image") for rank in (1, 5, 10)]
    assert found["mean recall"].value == pytest.approx(sum(ranked) / 6) and ranked[0] <= ranked[1] <= ranked[2]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """An image's name that cannot be encoded, for example."""
    file = tmp_path / "out.csv"
    file.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_rows(file, [["\ud800"]])
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_the_heaviest_answer_of_the_text_or_of_all() -> None:
    training = [
        ("what colour", {3: 1.0, 1: 0.3}), ("what colour", {2: 1.0}), ("what colour", {2: 0.3, 3: 0.3}),
        ("is it red", {5: 1.0}), ("is it red", {4: 1.0}), ("no answer", {}), ("what kind", {6: 1.2}),
    ]  # fmt: skip
    # Of colours and of all, 2 and 3 have 1.3 each: the lower one.
    assert answers_by_text(training) == ({"what colour": 2, "is it red": 4, "what kind": 6}, 2)
    with pytest.raises(UserError, match="no labels"):
        answers_by_text([("what", {})])
