"""Zero-shot XNLI on a local file: official prompts by inclusion, scores of direct scoring."""

import json
import shutil
from pathlib import Path

import pytest
from harness import direct_scores, line_ids
from labelled import write_jsonl

from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.evaluation.records import read_record

pytest.importorskip("lm_eval", reason="lm-eval is an optional package")

import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from mhmoe_fairseq.data.xnli import read_xnli  # noqa: E402
from mhmoe_fairseq.evaluation.xnli import write_tasks  # noqa: E402

# The official prompts, as lm-eval's README gives them: premise, question word, label, hypothesis.
PROMPTS = {
    "en": "{premise}, right? {label}, {hypothesis}",
    "de": "{premise}, richtig? {label}, {hypothesis}",
    "zh": "{premise}, 正确? {label}, {hypothesis}",
}
WORDS = {"en": ("Yes", "Also", "No"), "de": ("Ja", "Auch", "Nein"), "zh": ("是的", "所以", "不是的")}
EXAMPLES = {
    "en": [("The river", "A letter", 0), ("The doctor waits", "The doctor", 2), ("A window", "The winter", 1)],
    "de": [("Der Fluss", "Ein Brief", 2), ("Das Tor", "Der Arzt", 1)],
    "zh": [("河", "信", 0), ("门", "医", 1), ("冬天", "天", 2)],
}


@pytest.fixture(scope="module")
def xnli_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xnli")
    for code, rows in EXAMPLES.items():
        lines = [{"premise": one, "hypothesis": two, "label": label} for one, two, label in rows]
        write_jsonl(folder / f"{code}.jsonl", lines)
    return folder


@pytest.fixture(scope="module")
def result(trained_model, xnli_dir, tmp_path_factory):
    """The command on two checkpoints: (its text, its folder, the second one's)."""
    out = tmp_path_factory.mktemp("out")
    twin = tmp_path_factory.mktemp("twin")
    shutil.copy(trained_model.checkpoint, twin / "model.pt")
    text: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mhmoe_fairseq.commands.zero_shot.say", text.append)
        status = main([
            "zero-shot", "xnli", "--checkpoint", str(trained_model.folder), str(twin),
            "--data", str(trained_model.data),
            "--xnli-dir", str(xnli_dir), "--out", str(out), "--cpu",
        ])  # fmt: skip
    assert status == 0
    return "\n".join(text), out, twin


def test_scores_equal_direct_scoring(result, hub, trained_model):
    _, out, twin = result
    records = [read_record(folder / "record-zero-shot-xnli.json") for folder in (trained_model.folder, twin)]
    assert records[0].checkpoint["sha256"] == records[1].checkpoint["sha256"]
    names = sorted(path.name for path in (out / "scores").iterdir())
    assert len(names) == 2
    for code, rows in EXAMPLES.items():
        kept = json.loads((out / "scores" / names[0] / f"{code}.json").read_text(encoding="utf-8"))
        right = 0
        for (premise, hypothesis, label), example in zip(rows, kept, strict=True):
            texts = [PROMPTS[code].format(premise=premise, label=word, hypothesis=hypothesis) for word in WORDS[code]]
            ids = [line_ids(hub, text) for text in texts]
            assert max(map(len, ids)) <= 64
            expected = [direct_scores(hub, tokens).sum().item() for tokens in ids]
            assert example["log_probs"] == pytest.approx(expected, rel=1e-6)
            assert example["label"] == label
            right += expected.index(max(expected)) == label
        for record in records:
            accuracy = record.parts[code]["accuracy"]
            assert accuracy.value == pytest.approx(100 * right / len(rows)) and accuracy.count == len(rows)
            assert sum(record.settings["predicted"][code].values()) == len(rows)


def test_the_table_has_ours_and_the_papers(result, trained_model):
    text, _, _ = result
    lines = text.splitlines()
    [header] = [line for line in lines if line.startswith("| model")]
    assert header.split() == "| model | de | en | zh | avg |".split()
    assert sum(line.startswith("| ours: ") for line in lines) == 2
    paper = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in lines if line.startswith("| paper: ")}
    assert [cell.strip() for cell in paper["paper: mhmoe-params"]] == ["33.2", "40.1", "33.5", "34.7"]
    assert [cell.strip() for cell in paper["paper: dense"]] == ["33.3", "35.1", "32.9", "33.5"]
    assert len(paper) == 5 and "chance 33.3" in text and "beside ours, not mixed" in text
    record = read_record(trained_model.folder / "record-zero-shot-xnli.json")
    assert set(record.data["files"]) == set(EXAMPLES) and record.data["split"] == "validation"
    assert list(record.metrics) == ["accuracy", "active experts"]  # three languages are not the paper's fourteen
    assert {*record.experts.parts} == {*EXAMPLES}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_tasks_change_the_data_set_and_splits_only(xnli_dir, tmp_path, split):
    sets = read_xnli(xnli_dir, split)
    names = write_tasks(tmp_path, sets, split)
    ours = TaskManager(include_path=str(tmp_path), include_defaults=False).load(names)["tasks"]
    changed = {"dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split"}
    for name in names:
        from lm_eval.tasks._yaml_loader import load_yaml

        official = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "xnli" / f"{name}.yaml", resolve_func=False)
        written = load_yaml(tmp_path / f"{name}.yaml", resolve_func=False)
        apart = {key for key in {*official, *written} if official.get(key) != written.get(key)}
        assert apart <= changed and {"dataset_path", "dataset_kwargs"} <= apart
        code = name.removeprefix("xnli_")
        docs = list(ours[name].eval_docs)
        expected = [{"premise": one, "hypothesis": two, "label": label} for one, two, label in EXAMPLES[code]]
        assert [dict(doc) for doc in docs] == expected
        first = ours[name].doc_to_choice(docs[0])
        one, two, _ = EXAMPLES[code][0]
        assert first == [PROMPTS[code].format(premise=one, label=word, hypothesis=two) for word in WORDS[code]]
        assert ours[name].doc_to_text(docs[0]) == ""


def test_all_fifteen_languages_have_a_task(tmp_path):
    from mhmoe_fairseq.data.languages import XNLI_LANGUAGES

    for number, code in enumerate(XNLI_LANGUAGES):
        write_jsonl(tmp_path / f"{code}.jsonl", [{"premise": f"a {number}", "hypothesis": "b", "label": "neutral"}])
    names = write_tasks(tmp_path / "tasks", read_xnli(tmp_path, "validation"), "validation")
    assert names == [f"xnli_{code}" for code in XNLI_LANGUAGES]
