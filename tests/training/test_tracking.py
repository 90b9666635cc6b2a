"""Stock fairseq's --tensorboard-logdir and --wandb-project carry what our criterion logs (docs/tracking.md)."""

import importlib.util
from pathlib import Path

import pytest
from console import train, write_corpus

TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}
NAMES = ("loss", "ppl", "gate_loss", "z_loss", "moe_active", "moe_load_max", "moe_overflow", "moe_entropy")


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_has_the_numbers_of_the_log(tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(TRACKERS[tracker]) is None:
        pytest.skip(f"needs {TRACKERS[tracker]}, an optional package: pip install {TRACKERS[tracker]}")
    for name, value in (("MODE", "offline"), ("DIR", tmp_path), ("SILENT", "true"), ("NAME", "first-run")):
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    flags = {"tensorboard": ("--tensorboard-logdir", tmp_path / "board"), "wandb": ("--wandb-project", "mhmoe")}
    sizes = ("--decoder-embed-dim", 32, "--log-interval", 1, "--no-save")
    data = write_corpus(tmp_path)
    train(data, tmp_path / "run", "mhmoe_lm_tiny", *sizes, *flags[tracker], max_update=3, real=True)
    if tracker == "tensorboard":
        found = b"".join(path.read_bytes() for path in (tmp_path / "board" / "train_inner").iterdir())
        assert all(name.encode() in found for name in NAMES)
    else:
        (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
        found = file.read_bytes()
        assert all(f"train_inner/{name}".encode() in found for name in NAMES) and b"first-run" in found
