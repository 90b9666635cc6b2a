"""Records of zero-shot tasks, without lm-eval or a model: means and their errors, what is known, experts by task."""

import contextlib
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
from written_runs import loads
from zero_shot_questions import QUESTIONS, write_tasks_folder

from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.commands.zero_shot import _results
from mhmoe_fairseq.data.zero_shot_tasks import PACKAGED, TASKS, digest_of, open_tasks
from mhmoe_fairseq.evaluation import english_tasks
from mhmoe_fairseq.evaluation.english_tasks import evaluate_english, known_answers
from mhmoe_fairseq.evaluation.packaged_tasks import Scored
from mhmoe_fairseq.evaluation.records import Metric, Record
from mhmoe_fairseq.evaluation.xnli import _mean_over

RIGHT = {"acc": [1, 1, 0], "acc_norm": [1, 0, 0]}  # by question; two questions have TruthfulQA's
LED_BY: list[str | None] = []
MODEL = SimpleNamespace(max_length=64, scorer=SimpleNamespace(set_language=LED_BY.append))
FILES = {name: f"hash of {task.file}" for name, task in TASKS.items()}


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tasks that were scored, each with the answers of ``RIGHT``."""
    names: list[str] = []

    def score_task(model, folder, name, metrics, limit) -> Scored:
        names.append(name)
        questions = QUESTIONS[TASKS[name].file.removesuffix(".jsonl")]
        samples = [
            {"doc": question, **{metric: of[index] for metric, of in RIGHT.items()}}
            for index, question in enumerate(questions)
        ]
        shares = [[sample[metric] for sample in samples] for metric in metrics]
        found = [Metric(100 * statistics.fmean(of), "%", 5.0, len(of)) for of in shares]
        return Scored(dict(zip(metrics, found)), samples, [[0.0]] * len(samples))

    monkeypatch.setattr(english_tasks, "score_task", score_task)
    monkeypatch.setattr(english_tasks, "write_task", lambda *of: None)
    monkeypatch.setattr(english_tasks, "release", lambda: "lm-eval 1")
    return names


def evaluate(folder: Path, *names: str, kept: Record | None = None, **files: str) -> Record:
    files = {name: FILES[name] for name in names} | files
    rows = loads((1, "piqa", [3.0, 0.0]), (1, "rte", [0.0, 1.0]))
    counter = SimpleNamespace(counting=lambda name: contextlib.nullcontext(), loads=rows)
    return evaluate_english(
        MODEL, counter, files, folder, folder, known=known_answers(kept, files), digest="0", scores=folder, limit=None,
        say=lambda line: None,
    )  # fmt: skip


def test_a_mean_has_the_error_of_independent_tasks_and_both_guesses(scored: list[str], tmp_path: Path) -> None:
    record = evaluate(tmp_path, *PACKAGED)
    mean = record.metrics["mean of 12 scores"]
    assert record.main == mean and scored == list(PACKAGED) and list(record.absent) == ["TruthfulQA"]
    assert mean.value == pytest.approx((8 * 200 / 3 + 4 * 100 / 3) / 12) and mean.count == 24
    alone, both = (100 * statistics.pstdev(of) / math.sqrt(3) for of in ([1, 1, 0], [2, 1, 0]))  # of a task's sums
    assert mean.stderr == pytest.approx(math.sqrt(4 * alone**2 + 4 * both**2) / 12)
    for guess in ("chance", "majority"):
        scores = [part["accuracy"].baselines[guess] for part in record.parts.values()]
        assert mean.baselines[guess] == pytest.approx(sum(scores) / 12)
    nine = evaluate(tmp_path, *TASKS, kept=record)
    assert scored[8:] == ["truthfulqa_mc1", "truthfulqa_mc2"] and not nine.absent
    assert list(nine.metrics)[:2] == ["mean of 14 scores", "mean of 12 scores"]
    assert nine.metrics["mean of 12 scores"] == mean
    chance = nine.parts["TruthfulQA mc1"]["accuracy"].baselines["chance"]  # stands for a majority
    gain = 12 * mean.baselines["majority"] + chance + nine.parts["TruthfulQA mc2"]["accuracy"].baselines["chance"]
    assert nine.main.baselines["majority"] == pytest.approx(gain / 14)


def test_what_a_record_has_is_not_scored_again(scored: list[str], tmp_path: Path) -> None:
    first = evaluate(tmp_path, "piqa")
    assert list(first.metrics) == ["mean of 1 of 14 scores", "active experts"]
    assert first.experts == loads((1, None, [3.0, 0.0]), (1, "piqa", [3.0, 0.0]))
    both = evaluate(tmp_path, "rte", kept=first)
    assert scored == ["piqa", "rte"] and list(both.parts) == ["RTE acc", "PIQA acc"]
    assert both.parts["PIQA acc"] == first.parts["PIQA acc"] and both.data["files"]["piqa"] == FILES["piqa"]
    whole, *_ = both.experts.layers
    assert (whole.part, whole.loads, whole.entropy) == (None, [3.0, 1.0], 0.5)
    assert both.metrics["active experts"].value == 100 and first.metrics["active experts"].value == 50
    assert known_answers(both, FILES).keys() == {"piqa", "rte"}
    assert known_answers(both, {**FILES, "rte": "other questions"}).keys() == {"piqa"}
    both.settings["prompts, targets and metric"] = "lm-eval 0"
    assert known_answers(both, FILES) == known_answers(None, FILES) == {}


def test_data_are_the_same_whichever_tasks_are_chosen_but_not_however_many_questions(tmp_path: Path) -> None:
    folder, more = write_tasks_folder(tmp_path / "a"), write_tasks_folder(tmp_path / "b", truthfulqa=True)
    assert digest_of(folder, None) == digest_of(more, None) != digest_of(folder, 2)
    assert len(open_tasks(more, None)) == len(open_tasks(folder, None)) + 2


def test_languages_of_the_same_examples_are_not_independent() -> None:
    accuracies = {code: Metric(75.0, "%", stderr, 4) for code, stderr in (("de", 25.0), ("en", 21.0))}
    rights = {"de": [1.0, 0.0, 1.0, 1.0], "en": [1.0, 0.0, 1.0, 1.0]}
    mean = _mean_over(["de", "en"], accuracies, rights)
    assert (mean.value, mean.count) == (75, 8)
    assert mean.stderr == pytest.approx(100 * statistics.pstdev(rights["de"]) / 2)  # no less than of one language
    assert _mean_over(["de", "en"], accuracies, {**rights, "en": [1.0]}).stderr == 23


def test_answers_with_and_without_the_symbol_of_english_are_told_apart(scored: list[str], tmp_path: Path) -> None:
    plain = evaluate(tmp_path, "piqa")
    counter = SimpleNamespace(counting=lambda name: contextlib.nullcontext(), loads=None)
    led = evaluate_english(
        MODEL, counter, {"piqa": FILES["piqa"]}, tmp_path, tmp_path, known={}, digest="0", scores=tmp_path, limit=None,
        say=lambda line: None, language_symbols=True,
    )  # fmt: skip
    assert LED_BY[-2:] == [None, "en"] and "language symbols" not in plain.settings and led.settings["language symbols"]
    for kept, symbols in ((plain, False), (plain, True), (led, False), (led, True)):
        known = known_answers(kept, {"piqa": FILES["piqa"]}, symbols)
        assert bool(known) == ((kept is led) == symbols)


def test_groups_of_lm_eval_are_not_tasks() -> None:
    results = {
        "results": {"g": {"acc,none": 0.5}, "a": {"acc,none": 1.0}, "b": {"acc,none": 0.0}, "c": {"acc,none": 0.0}},
        "groups": {"g": {"acc,none": 0.5}}, "lm_eval_version": "0",
    }  # fmt: skip
    pytest.importorskip("lm_eval")
    from mhmoe_fairseq.evaluation.lm_eval_model import record_of

    record = record_of(results)
    assert list(record.parts) == ["a", "b", "c"] and record.main.value == pytest.approx(1 / 3)


def test_results_of_lm_eval_are_found_where_it_writes_them(tmp_path: Path) -> None:
    for name in ("out/model/results_1.json", "one_2026.json", "other_2026.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [*_results(str(tmp_path / "out"))] == [tmp_path / "out" / "model" / "results_1.json"]
    assert [*_results(str(tmp_path / "one.json"))] == [tmp_path / "one_2026.json"]


def test_checkpoints_of_one_folder_do_not_share_a_record(tmp_path: Path, capsys) -> None:
    for name in ("one.pt", "two.pt"):
        (tmp_path / name).touch()
    write_tasks_folder(tmp_path / "tasks")
    words = ["--checkpoint", tmp_path / "one.pt", tmp_path / "two.pt", "--tasks-dir", tmp_path / "tasks"]
    pytest.importorskip("lm_eval")
    assert main(["zero-shot", "english", *map(str, words)]) == 2
    assert "one.pt and " in (error := capsys.readouterr().err) and "would share a record" in error
