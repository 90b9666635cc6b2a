"""Training, evaluation and resuming give what they gave when the references were written.

A reference is written anew only where a named fault, once mended, changes it: see CONTRIBUTING.md. The tolerances
leave room for the sums of other processors, in other orders, and for nothing else.
"""

from pathlib import Path
from typing import Any

import pytest
from golden_runs import KINDS, RELEASE, SAVED, Figures, evaluate, mask_kind, read_references, train, unpack_checkpoint

TOLERANCE = 1e-5  # relative; losses, balance and z-losses, log-probabilities
# Norms over a few values can magnify what a sum in another order leaves: up to 3e-6 between the kernels of one machine.
GRADIENT_TOLERANCE = 3e-5
QUICK = ("dense", "mhmoe_params", "beit3")
SOME_KINDS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]


def assert_same(actual: Figures, expected: Figures) -> None:
    """The same figures, each close at every update."""
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        tolerance = GRADIENT_TOLERANCE if name == "gnorm" else TOLERANCE
        assert actual[name] == pytest.approx(values, rel=tolerance, abs=0), name


def kept(name: str) -> dict[str, Any]:
    return read_references(name)[RELEASE]


@pytest.mark.parametrize("name", SOME_KINDS)
def test_twenty_updates(golden_data: Path, tmp_path: Path, name: str) -> None:
    assert_same(train(KINDS[name], golden_data, tmp_path / "run"), kept(name)["dropout 0"])


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_twenty_updates_with_dropout(golden_data: Path, tmp_path: Path, name: str) -> None:
    expected = kept(name)["dropout 0.1"].get(mask_kind())
    if expected is None:
        pytest.skip(
            "the dropout masks that torch draws on this processor have no references; would run on another one "
            "(AMD's and Intel's differ), or here after tests/golden/write_references.py"
        )
    assert_same(train(KINDS[name], golden_data, tmp_path / "run", dropout=0.1), expected)


@pytest.mark.parametrize("name", KINDS)
def test_the_kept_checkpoint_evaluates(golden_data: Path, tmp_path: Path, name: str) -> None:
    found = evaluate(KINDS[name], golden_data, unpack_checkpoint(name, tmp_path))
    expected = read_references(name)["evaluation"]
    assert found.keys() == expected.keys()
    assert found["bits"] == pytest.approx(expected["bits"], rel=TOLERANCE, abs=0)
    assert found.get("log_probs", []) == pytest.approx(expected.get("log_probs", []), rel=TOLERANCE, abs=0)


@pytest.mark.parametrize("name", KINDS)
def test_the_kept_checkpoint_resumes(golden_data: Path, tmp_path: Path, name: str) -> None:
    start = unpack_checkpoint(name, tmp_path)
    assert_same(train(KINDS[name], golden_data, tmp_path / "run", start=start), kept(name)["resumed"])


@pytest.mark.parametrize("name", KINDS)
def test_the_references_of_resuming_are_those_of_the_whole_training(name: str) -> None:
    whole, resumed = (read_references(name)["fairseq-fixed"][part] for part in ("dropout 0", "resumed"))
    assert resumed == {figure: values[SAVED:] for figure, values in whole.items()}
