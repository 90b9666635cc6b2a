"""``mhmoe checkpoint pack``: evaluated as before, much smaller, and what cannot be packed."""

from pathlib import Path

import pytest
import torch
from console import train
from trained_model import TrainedModel

from mhmoe_fairseq.checkpoints.open import open_model
from mhmoe_fairseq.commands.main import main as mhmoe
from mhmoe_fairseq.evaluation.records import read_record

FLAGS = "--sample-break-mode eos --tokens-per-sample 64 --batch-size 16 --decoder-embed-dim 64 --lr 0.005".split()


@pytest.fixture(scope="module")
def checkpoint(trained_model: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ternary model after some updates."""
    folder = tmp_path_factory.mktemp("ternary")
    train(trained_model.data, folder, "mhmoe_lm_tiny", *FLAGS, "--mhmoe-quantize", "all", max_update=6)
    return folder / "checkpoint_last.pt"


def checkpoint_command(*words: object) -> int:
    return mhmoe(["checkpoint", *map(str, words)])


def evaluated(checkpoint: Path, data: Path, record: Path, *words: str) -> float:
    assert mhmoe(["evaluate", str(checkpoint), "--data", str(data), "--record", str(record), *words]) == 0
    return read_record(record).main.value


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_packed_model_scores_as_before(
    precision: str, checkpoint: Path, trained_model: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert checkpoint_command("pack", checkpoint, tmp_path / "packed.safetensors") == 0
    said = capsys.readouterr().out
    assert checkpoint_command("convert", tmp_path / "packed.safetensors", tmp_path / "back.pt") == 0
    assert checkpoint_command("pack", checkpoint, tmp_path / "packed.pt") == 0
    files = checkpoint, tmp_path / "packed.pt", tmp_path / "back.pt"
    scores = [evaluated(file, trained_model.data, tmp_path / "a.json", "--precision", precision) for file in files]
    assert scores[0] == scores[1] == scores[2]

    states = [open_model(file, trained_model.data, precision=precision).model.state_dict() for file in files]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())
    weights = torch.load(checkpoint, weights_only=True)["model"]
    del weights["decoder.output_projection.weight"]  # the embedding's
    total = sum(value.numel() for value in weights.values() if value.is_floating_point())
    assert f"{total:,} parameters" in said
    assert (tmp_path / "packed.pt").stat().st_size < 0.4 * sum(value.nbytes for value in weights.values())


def test_what_cannot_be_packed_or_done_with_packed_weights(
    checkpoint: Path, trained_model: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def refusal(*words: object) -> str:
        assert checkpoint_command(*words) != 0
        line = capsys.readouterr().err.strip()
        assert "\n" not in line
        return line

    packed = tmp_path / "packed.pt"
    assert checkpoint_command("pack", checkpoint, packed) == 0
    capsys.readouterr()
    assert "--overwrite" in refusal("pack", checkpoint, packed)
    assert f"{packed} is packed" in refusal("pack", packed, tmp_path / "again.pt")
    assert f"{packed} is packed" in refusal("average", "--inputs", packed, packed, "--output", tmp_path / "mean.pt")
    assert "a model without --mhmoe-quantize" in refusal("pack", trained_model.checkpoint, tmp_path / "other.pt")
    words = [*FLAGS, "--mhmoe-quantize", "all", "--finetune-from-model", packed]
    log = train(trained_model.data, tmp_path / "run", "mhmoe_lm_tiny", *words, max_update=1, check=False)
    assert "packed 1.58-bit weights cannot be trained" in log
