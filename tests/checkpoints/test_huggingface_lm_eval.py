"""lm-eval finds in an exported folder what it finds in the checkpoint, in tasks of every kind."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness_tasks import summary, write_tasks
from trained_model import TrainedModel

from mhmoe_fairseq.commands.main import main as mhmoe

for _package in ("lm_eval", "tokenizers", "accelerate"):
    pytest.importorskip(_package, reason=f"needs pip install {_package}")
pytest.importorskip("transformers", reason="needs pip install transformers", minversion="5.10")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from mhmoe_fairseq.evaluation.lm_eval_model import MHMoEHarnessModel  # noqa: E402

PROBE = Path(__file__).parents[1] / "support" / "lm_eval_probe.py"
TASKS = ("local_choice", "local_rolling", "local_until")


def questions(lines: list[str]) -> list[dict[str, Any]]:
    """Lines of the held-out text cut in two, with the ends of others as wrong answers; and odd ones."""
    cut = [(" ".join(words[:3]), " ".join(words[3:])) for words in map(str.split, lines)]
    ends = [end for _, end in cut]
    rows = [
        {"question": start, "choices": [end, ends[row - 1], ends[row - 2]], "answer": 0}
        for row, (start, end) in enumerate(cut)
    ]
    several = "\n".join(lines[:3])
    odd = [
        (f"{several}\n{cut[4][0]}", ends[4]),  # several lines
        (" ".join(lines), ends[5]),  # longer than the model's positions
        (f"  The  river\t{lines[0]} ", ends[6]),  # white space that the tokenizers take away
        ("Größe, e\u0301 😀 中文", ends[7]),  # bytes
        ("The doctor", f"opens it.\n{lines[2]}\n"),  # a choice of several lines
    ]
    return rows + [{"question": start, "choices": [end, "qq zz", ends[0]], "answer": 0} for start, end in odd]


@pytest.fixture(scope="module")
def both(trained_model: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict, list[str]]:
    """What lm-eval finds here and there, task by task, and the texts of the rolling task."""
    folder = tmp_path_factory.mktemp("lm-eval")
    rows = questions(trained_model.held_out_lines(16))
    tasks = write_tasks(folder, rows)
    assert mhmoe(["checkpoint", "export", "--format", "hf", str(trained_model.checkpoint), str(folder / "hf")]) == 0
    environment = {**os.environ, "HF_HOME": str(folder / "home")}
    command = [sys.executable, PROBE, str(folder / "hf"), str(tasks), str(folder / "found.json")]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    theirs = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    results = simple_evaluate(
        "mhmoe", f"checkpoint={trained_model.checkpoint}", tasks=[*TASKS], batch_size=4, device="cpu",
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    ours = {task: summary(results, task) for task in TASKS}
    return ours, theirs, [f"{row['question']} {row['choices'][0]}" for row in rows]


@pytest.mark.parametrize("task", TASKS)
def test_scores_elsewhere_are_ours(both: tuple[dict, dict, list[str]], task: str) -> None:
    ours, theirs, texts = both
    assert len(ours[task]["answers"]) == len(texts)
    numbers = {name: value for name, value in ours[task]["scores"].items() if isinstance(value, float)}
    assert numbers and {name: theirs[task]["scores"][name] for name in numbers} == pytest.approx(numbers, rel=1e-5)


def test_log_likelihoods_elsewhere_are_ours(both: tuple[dict, dict, list[str]]) -> None:
    """Of every choice, and whether it is the greedy one, which some are and some are not."""
    ours, theirs = ([answer[0] for row in found["local_choice"]["answers"] for answer in row] for found in both[:2])
    assert [score for score, _ in theirs] == pytest.approx([score for score, _ in ours], rel=1e-5)
    assert [greedy for _, greedy in theirs] == [greedy for _, greedy in ours]


def test_rolling_log_likelihoods_elsewhere_are_ours(
    both: tuple[dict, dict, list[str]], trained_model: TrainedModel
) -> None:
    """With add_bos_token=False; lm-eval's default scores a ``</s>`` in front of every text, as of an empty line."""
    ours, theirs, texts = both
    sums = [[row[0][0] for row in found["local_rolling"]["answers"]] for found in (ours, theirs)]
    assert sums[1] == pytest.approx(sums[0], rel=1e-5)
    by_default = [row[0][0] for row in theirs["rolling with defaults"]["answers"]]
    lm = MHMoEHarnessModel(checkpoint=str(trained_model.checkpoint), device="cpu")
    requests = [type("Request", (), {"args": (f"\n{text}",)}) for text in texts]
    assert by_default == pytest.approx(lm.loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-5)
    assert min(abs(one - other) for one, other in zip(by_default, sums[0])) > 0.1


def test_generations_elsewhere_are_ours(both: tuple[dict, dict, list[str]]) -> None:
    ours, theirs = ([row[0][0] for row in found["local_until"]["answers"]] for found in both[:2])
    assert ours == theirs and len(set(theirs)) > 3
