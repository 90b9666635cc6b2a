"""Odd values for every flag that our tasks, criterions, models and optimizer add to ``fairseq-train``."""

import random
from pathlib import Path

import pytest
from forked import Outcome, run_forked
from invocations import write_trained_fixtures, write_untrained_fixtures
from options import NEVER, furnish
from training_calls import Option, training_calls, training_options

pytestmark = pytest.mark.slow  # the fixtures are a dozen trainings
SEED, TRIED = 14, 400
Case = tuple[str, Option, str | None, list[str]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all fixtures."""
    root = tmp_path_factory.mktemp("fuzz") / "fixtures"
    write_untrained_fixtures(root)
    write_trained_fixtures(root)
    return root


def cases(root: Path) -> list[Case]:
    """Every odd value of every flag."""
    return [
        (task, option, value, [*words, option.name if value is None else f"{option.name}={value}"])
        for task, words in training_calls(root).items()
        for option in training_options(task, words)
        for value in option.values
    ]


def problems(case: Case, outcome: Outcome) -> list[str]:
    """What is wrong with how a case ended: it trains, or its last line names the flag and nothing is left."""
    _, option, value, _ = case
    found = [f"changed {path}" for path in outcome.harmed]
    if outcome.status == 0:
        return [*found, "was accepted"] if value in NEVER.get(option.kind, ()) else found
    if outcome.status != 2:
        found.append(f"ended with status {outcome.status}")
    lines = [line for line in outcome.err.splitlines() if line]
    if "Traceback" in outcome.err or not lines or "error: " not in lines[-1]:
        found.append("does not end in one line that says what is wrong")
    elif option.name not in lines[-1] and not (value and len(value) > 2 and value in lines[-1]):
        found.append("does not name the flag")
    return found + [f"left {path}" for path in outcome.left if path != "saved"]  # made by fairseq before anything else


def test_the_trainings_are_right(root: Path, tmp_path: Path) -> None:
    calls = training_calls(root)
    outcomes = run_forked("training_calls:fairseq_train", list(calls.values()), root, tmp_path / "work", furnish)
    for task, outcome in zip(calls, outcomes):
        assert outcome.status == 0, f"{task}\n{outcome.err[-3000:]}"


def test_odd_values_of_our_flags(root: Path, tmp_path: Path) -> None:
    found = random.Random(SEED).sample(cases(root), TRIED)
    outcomes = run_forked(
        "training_calls:fairseq_train", [words for *_, words in found], root, tmp_path / "work", furnish
    )
    wrong = [
        f"{case[0]} {case[3][-1]}: {'; '.join(faults)}\n    {outcome.err.strip()[-600:]}"
        for case, outcome in zip(found, outcomes)
        if (faults := problems(case, outcome))
    ]
    assert not wrong, f"{len(wrong)} of {len(found)} cases\n" + "\n".join(wrong)
