"""What mhmoe predict prints and writes, in the layouts that the evaluation servers and scripts take."""

import json

import numpy as np
import pytest

from mhmoe_fairseq.evaluation.image_predictions import Answers, Classes, Judgements, Recalls


@pytest.fixture
def statements():
    """Two sentences of set 12 and one of set 7: sentence 12-0 is right with one of its two pairs of images."""
    return Judgements(
        "test",
        ["test1-12-0-0", "test1-12-1-0", "test1-12-0-1", "test1-7-3-0"],
        judgements=np.array([1, 1, 0, 1]),
        labels=np.array([1, 0, 0, 1]),
        baselines={"statement only": 50.0},
    )


def official_scores(predictions, examples):
    """The rules of NLVR2's metrics.py: share of right lines, and of sentences that are right with all images."""
    judged = dict(line.strip().split(",") for line in predictions.splitlines())
    right = {name: judged[name].lower() == label.lower() for name, label in examples.items()}
    sentences = {}
    for name, is_right in right.items():
        parts = name.split("-")
        parts[2] = ""
        sentences.setdefault("-".join(parts), []).append(is_right)
    return sum(right.values()) / len(right), sum(map(all, sentences.values())) / len(sentences)


def test_statements_score_as_nlvr2s_own_rules_say(statements, tmp_path):
    statements.write(tmp_path / "out.csv")
    labels = {name: str(bool(label)) for name, label in zip(statements.identifiers, statements.labels)}
    accuracy, consistency = official_scores((tmp_path / "out.csv").read_text(), labels)
    assert (accuracy, consistency) == (0.75, pytest.approx(2 / 3))
    assert statements.describe() == "test: 4 statements, accuracy 75.00, consistency 66.67, statement only 50.00"


def test_consistency_is_of_sentences_and_not_of_images():
    """Wrong once with each of three images, and always with the same sentence."""
    names = [f"test1-12-{image}-{sentence}" for image in range(3) for sentence in range(2)]
    found = Judgements("test", names, np.array([1, 0, 1, 0, 1, 0]), np.array([1, 1, 1, 1, 1, 1]))
    assert (found.figures["accuracy"], found.consistency) == (50.0, 50.0)


def test_identifiers_of_another_form_have_no_consistency(statements):
    plain = Judgements("test", ["a", "b", "c", "d"], statements.judgements, statements.labels)
    assert plain.consistency is None
    assert plain.describe() == "test: 4 statements, accuracy 75.00"


def test_answers_are_written_as_vqas_server_takes_them(tmp_path):
    answers = Answers("test", np.array([262148000, 7]), ["down", 'a "quoted" Äpfel'], None, baselines={"none": 0.0})
    answers.write(tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == [
        {"question_id": 262148000, "answer": "down"},
        {"question_id": 7, "answer": 'a "quoted" Äpfel'},
    ]
    assert not answers.figures and answers.describe() == "test: 2 questions"


def test_answers_with_scores_stand_beside_their_baselines():
    scores = np.array([1.0, 0.3, 0.0, 0.6])
    answers = Answers("valid", np.arange(4), list("abca"), scores, baselines={"question only": 12.5})
    assert answers.describe() == "valid: 4 questions, VQA score 47.50, question only 12.50"


def test_classes(tmp_path):
    best = np.array([[2, 0, 1], [0, 1, 2]])
    names, labels = ["cat", "dog", "bird"], np.array([2, 1])
    found = Classes("valid", ["b.png", "a,b.png"], names, best, labels, baselines={"x": 50.0})
    assert found.describe() == "valid: 2 images, top-1 50.00, top-5 100.00, x 50.00"
    found.write(tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text().splitlines() == [
        "image_path,label,top1,top2,top3", "b.png,bird,bird,cat,dog", '"a,b.png",dog,cat,dog,bird'
    ]  # fmt: skip


def test_recall(tmp_path):
    recalls = {f"{way}_r{rank}": float(rank) for way in ("text", "image") for rank in (1, 5, 10)}
    found = Recalls("test", 50, 250, {**recalls, "mean_recall": 5.33}, baselines={"mean recall by chance": 2.0})
    assert found.describe() == (
        "test: 250 captions, mean recall 5.33, text R@1 1.00, text R@5 5.00, text R@10 10.00, image R@1 1.00, "
        "image R@5 5.00, image R@10 10.00, mean recall by chance 2.00"
    )
    found.write(tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["image R@10"] == 10


def test_a_failed_write_leaves_the_old_file(tmp_path, statements):
    """An image's name that cannot be encoded, for example."""
    file = tmp_path / "out.csv"
    file.write_text("old")
    broken = Judgements("test", ["\ud800"], np.array([1]), None)
    with pytest.raises(UnicodeEncodeError):
        broken.write(file)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
