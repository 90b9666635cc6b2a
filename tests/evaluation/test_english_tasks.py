"""``mhmoe zero-shot english``: scores of direct scoring, means and guesses, and a model that prefers nothing."""

import json
import math
import shutil
from pathlib import Path

import pytest
from harness import direct_scores, line_ids
from zero_shot_questions import FIRST_IS_RIGHT, QUESTIONS, write_tasks_folder

from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.data.zero_shot_tasks import PACKAGED, TASKS
from mhmoe_fairseq.evaluation.records import read_record

pytest.importorskip("lm_eval", reason="lm-eval is an optional package")

from mhmoe_fairseq.evaluation.lm_eval_model import MHMoEHarnessModel  # noqa: E402


def run(trained_model, root: Path, *words: str, truthfulqa: bool = False):
    """The record, the text that was said and the folder of scores."""
    (root / "run").mkdir()
    shutil.copy(trained_model.checkpoint, root / "run" / "model.pt")
    tasks, said = write_tasks_folder(root / "tasks", truthfulqa=truthfulqa), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mhmoe_fairseq.commands.zero_shot.say", said.append)
        status = main([
            "zero-shot", "english", "--checkpoint", str(root / "run"), "--data", str(trained_model.data), "--cpu",
            "--tasks-dir", str(tasks), "--out", str(root / "out"), *words,
        ])  # fmt: skip
    assert status == 0
    return read_record(root / "run" / "record-zero-shot-english.json"), "\n".join(said), root / "out" / "scores" / "run"


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
    assert record.main.value == pytest.approx(sum(values.values()) / 3) and list(record.metrics) == ["accuracy"]
    assert record.settings["accuracy"] == "mean of 3 scores of 2 tasks" and "TruthfulQA" in record.absent
    cut = record.settings["cut texts"]
    assert cut["boolq"] == {"cut": 6, "scored": 6} and cut["openbookqa"] == {"cut": 0, "scored": 12}
    assert "6 of 18 texts were longer than 64 tokens" in said and "Absent: " in said
    assert record.parts["OpenBookQA acc"]["accuracy"].baselines == pytest.approx({"chance": 25, "majority": 200 / 3})


@pytest.mark.parametrize("truthfulqa", [False, True])
def test_a_model_of_constant_scores_takes_the_first_answer(trained_model, tmp_path, monkeypatch, truthfulqa) -> None:
    constant = lambda self, requests, **_: [(-1.0, False)] * len(requests)  # noqa: E731
    monkeypatch.setattr(MHMoEHarnessModel, "_loglikelihood_tokens", constant)
    record, _, _ = run(trained_model, tmp_path, truthfulqa=truthfulqa)
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
