"""Fine-tuning a really trained language model, ``fairseq-validate`` on it, and ``mhmoe evaluate``."""

import json
import re

import pytest
import torch
from console import USER_DIR, evaluation_record, run_console
from labelled import training_words, write_task

from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.evaluation.records import read_record


@pytest.fixture(scope="module")
def fine_tuned(trained_model, tmp_path_factory):
    """The folder of a fine-tuned model, its data in ``data``, its log in ``log``."""
    root = tmp_path_factory.mktemp("fine-tuned")
    data = write_task(root, trained_model)
    flags = ("--finetune-from-model", trained_model.checkpoint)
    log = run_console("fairseq-train", *training_words(data, root, *flags, updates=48), cwd=root)
    (root / "log").write_text(log)
    return root


def logged(log, subset):
    """What every validation of a subset logged."""
    return [json.loads(line) for line in re.findall(rf"[|:] ?{subset} ?[|:] ?(\{{.*\}})", log)]


def classify(capsys, *arguments):
    status = main(["evaluate", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_fine_tuning_learns_and_logs_each_subset(fine_tuned):
    log = (fine_tuned / "log").read_text()
    assert "loading pretrained model from" in log and "it starts from its initial weights" in log
    for subset in ("valid_en", "valid_fr"):
        last = logged(log, subset)[-1]
        assert float(last[f"{subset}_accuracy"]) > 90
        assert {"loss", "gate_loss", "z_loss", "moe_active", "moe_load_max", "moe_overflow", "moe_entropy"} <= {
            name.removeprefix(f"{subset}_") for name in last
        }


def test_the_best_checkpoint_is_the_most_accurate_on_the_first_subset(fine_tuned):
    scores = [float(entry["valid_en_accuracy"]) for entry in logged((fine_tuned / "log").read_text(), "valid_en")]
    best = torch.load(fine_tuned / "checkpoint_best.pt", weights_only=True)
    assert best["extra_state"]["best"] == pytest.approx(max(scores), abs=0.01)
    assert best["task_state"] == {"classes": ["place", "time"]}
    assert best["model"]["classification_heads.sentence_classification_head.weight"].shape == (2, 64)


def test_classify_agrees_with_fairseq_validate(fine_tuned, capsys):
    checkpoint = fine_tuned / "checkpoint_last.pt"
    output = run_console(
        "fairseq-validate", fine_tuned / "data", "--user-dir", USER_DIR, "--task", "mhmoe_sentence_classification",
        "--path", checkpoint, "--valid-subset", "valid_en,valid_fr", "--batch-size", 7, "--cpu", "--log-format", "json",
        cwd=fine_tuned,
    )  # fmt: skip
    validated = {name: float(logged(output, name)[0][f"{name}_accuracy"]) for name in ("valid_en", "valid_fr")}
    status, out, err = classify(capsys, checkpoint)
    assert (status, err) == (0, "")
    record = read_record(fine_tuned / "record-valid.json")  # there is no test split
    assert {f"valid_{code}": round(value, 2) for code, value in record.values("accuracy").items()} == validated
    mean = sum(validated.values()) / 2
    assert record.main.count == 96 and record.main.value == pytest.approx(mean, abs=0.01)
    assert record.metrics["mean over languages"].value == pytest.approx(mean, abs=0.01)
    assert len(record.data["digest"]) == 64 and record.data["languages"] == []
    assert record.experts.parts == ["en", "fr"] and "| valid, all |" in out


def test_predictions_do_not_depend_on_batches_or_preparation(fine_tuned, capsys, tmp_path):
    checkpoint = fine_tuned / "checkpoint_last.pt"
    classify(capsys, checkpoint, "--splits", "valid_fr", "--predictions", tmp_path / "one", "--max-tokens", 1)
    texts = ("--input", f"fr={fine_tuned / 'two.jsonl'}", "--label-field", "label", "--output", tmp_path / "two")
    record = evaluation_record(tmp_path, checkpoint, *texts)
    one, two = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in ("one", "two"))
    rows = [json.loads(line) for line in (fine_tuned / "two.jsonl").read_text().splitlines()]
    assert [record["label"] for record in one] == [record["label"] for record in two] == [row["label"] for row in rows]
    assert [record["prediction"] for record in one] == [record["prediction"] for record in two]
    for first, second in zip(one, two):
        assert first["probabilities"] == pytest.approx(second["probabilities"], abs=1e-5)
        assert sum(first["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    right = sum(record["label"] == record["prediction"] for record in two)
    assert record.values("accuracy") == {"fr": pytest.approx(100 * right / 48)} and record.split == "input"


def test_texts_without_labels(fine_tuned, capsys, tmp_path):
    text = "The farmer opens the letter before dawn 7."
    long = "\n".join([text] * 9)
    (tmp_path / "new.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": long}) + "\n")
    arguments = ("--input", f"en={tmp_path / 'new.jsonl'}", "--predictions", tmp_path / "out.jsonl")
    status, _, err = classify(capsys, fine_tuned, *arguments[:2])
    assert status == 2 and "has no labels to score by: give --label-field NAME, or --output FILE" in err
    status, out, _ = classify(capsys, fine_tuned, *arguments)
    assert (status, out) == (0, "examples: 2\nexamples that were too long, cut: 1\n")
    record = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert record["label"] is None and record["prediction"] == "time"


def test_bad_input_is_one_line(fine_tuned, trained_model, capsys, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"premise": "a", "hypothesis": "b", "label": "often"}\n')
    (tmp_path / "ids.jsonl").write_text('{"text": "a", "label": 0}\n')
    (tmp_path / "broken.pt").write_bytes((fine_tuned / "checkpoint_last.pt").read_bytes()[:5000])
    pairs = ("--input", f"en={tmp_path / 'pairs.jsonl'}")
    for arguments, message in (
        ((trained_model.checkpoint, *pairs), "--input: has no meaning for a checkpoint of task mhmoe_language_model"),
        ((tmp_path,), "no model.pt or checkpoint_best.pt or checkpoint_last.pt in"),
        ((tmp_path / "broken.pt",), "broken.pt: no readable checkpoint"),
        ((fine_tuned, "--data", tmp_path), f"{tmp_path}/dict.txt is missing"),
        ((fine_tuned, "--splits", "test_de"), "input0/test_de.idx is missing"),
        ((fine_tuned, "--input", "one.jsonl"), "--input one.jsonl: must be LANG=FILE"),
        ((fine_tuned, "--input", f"xx={tmp_path / 'pairs.jsonl'}"), "--input xx: no such language"),
        ((fine_tuned, *pairs), "pairs.jsonl:1: no field 'text'; it has premise, hypothesis, label"),
        ((fine_tuned, *pairs, "--text-fields", "premise", "hypothesis"), "was trained with 1 fields, here are 2"),
        (
            (fine_tuned, *pairs, "--text-fields", "premise", "--label-field", "label"),
            "pairs.jsonl:1: field 'label' is 'often', must be one of place, time",
        ),
        (
            (fine_tuned, "--input", f"en={tmp_path / 'ids.jsonl'}", "--label-field", "label"),
            "ids.jsonl:1: field 'label' is '0', a number, and the classes are names (place, time)",
        ),
        ((fine_tuned, "--label-field", "label"), "--label-field needs --input"),
        (
            (fine_tuned, "--splits", "valid_fr", "test_fr"),
            "(valid_fr) is not the only one of its language",
        ),
        ((fine_tuned, "--input", "fr=a", "en=b", "fr=c"), "--input (fr) is not the only one of its language, fr"),
        ((fine_tuned, *pairs, "--splits", "valid_fr"), "--splits has no meaning with --input"),
        ((fine_tuned, "--max-tokens", 0), "--max-tokens (0) must be at least 1"),
    ):
        status, out, err = classify(capsys, *arguments)
        assert status == 2 and out == "" and message in err, err
        assert err.startswith("mhmoe evaluate: error: ") and err.count("\n") == 1, err


def test_a_checkpoint_is_not_evaluated_with_classes_in_another_order(fine_tuned, capsys, tmp_path):
    data = tmp_path / "data"
    (data / "label").mkdir(parents=True)
    (data / "dict.txt").write_bytes((fine_tuned / "data" / "dict.txt").read_bytes())
    (data / "label" / "dict.txt").write_text("time 1\nplace 1\n")
    status, _, err = classify(capsys, fine_tuned, "--data", data)
    assert status == 2 and "has the classes time, place; the checkpoint's are place, time, in this order" in err


def test_a_classifier_does_not_continue_text(fine_tuned, capsys):
    assert main(["generate", str(fine_tuned), "--prompt", "The river", "--max-len-b", "9"]) == 2
    assert "mhmoe generate: error: the model was fine-tuned to classify" in capsys.readouterr().err
