"""torchrun itself, as on the command line of docs/parallel.md: training, and a killed rank."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from workers import TRAIN_FLAGS

ROOT = Path(__file__).resolve().parents[2]
MODEL = (
    "--arch", "mhmoe_lm_tiny", "--decoder-layers", 2, "--moe-expert-count", 4, "--tokens-per-sample", 32,
    "--batch-size", 4, "--optimizer", "mhmoe_adam", "--lr", 0.001, "--disable-validation",
    "--ddp-backend", "legacy_ddp", "--distributed-backend", "gloo",
)  # fmt: skip

pytestmark = pytest.mark.slow


def torchrun(folder: Path, *words: object) -> subprocess.Popen:
    """``fairseq-train`` on two ranks; everything they say goes to ``folder/output.txt``."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, "-m", *launcher, "-m", "fairseq_cli.train"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(folder / "output.txt", "w") as output:
        return subprocess.Popen([*command, *map(str, words)], cwd=folder, env=env, stdout=output, stderr=output)


def output(folder: Path) -> str:
    return (folder / "output.txt").read_text(errors="replace")


def train(corpus: Path, folder: Path, max_update: int) -> subprocess.Popen:
    saving = ("--save-dir", folder / "saved", "--save-interval-updates", 2, "--keep-interval-updates", 1)
    return torchrun(folder, corpus, *TRAIN_FLAGS, *MODEL, "--max-update", max_update, *saving)


def test_two_ranks_train_one_model(corpus: Path, tmp_path: Path) -> None:
    assert train(corpus, tmp_path, 4).wait(300) == 0, output(tmp_path)[-4000:]
    assert "training on 2 devices" in output(tmp_path)
    assert "expert parallelism: 2 of 2 processes share the experts of a layer" in output(tmp_path)
    state = torch.load(tmp_path / "saved" / "checkpoint_last.pt", weights_only=True)
    assert state["model"]["decoder.layers.1.moe_layer.experts.fc1_weight"].size(0) == 4
    assert state["optimizer_history"][-1]["num_updates"] == 4


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_torchrun_and_the_run_goes_on(corpus: Path, tmp_path: Path, victim: int) -> None:
    started = train(corpus, tmp_path, 100_000)
    checkpoint = tmp_path / "saved" / "checkpoint_last.pt"
    deadline = time.monotonic() + 240
    while not checkpoint.exists():
        assert started.poll() is None and time.monotonic() < deadline, output(tmp_path)[-4000:]
        time.sleep(0.1)
    os.kill(ranks_of(started)[victim], signal.SIGKILL)
    assert started.wait(120) == 1
    assert re.search(rf"rank\s*: {victim} .*\n.*exitcode\s*: -9", output(tmp_path)), output(tmp_path)[-2000:]
    done = torch.load(checkpoint, weights_only=True)["optimizer_history"][-1]["num_updates"]
    assert train(corpus, tmp_path, done + 2).wait(300) == 0, output(tmp_path)[-4000:]
    assert torch.load(checkpoint, weights_only=True)["optimizer_history"][-1]["num_updates"] == done + 2


def ranks_of(started: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started, by rank."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(started.pid)], capture_output=True, text=True, check=True)
    ranks = {}
    for pid in found.stdout.split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks.update({int(entry.split(b"=")[1]): int(pid) for entry in environment if entry.startswith(b"RANK=")})
    assert sorted(ranks) == [0, 1]
    return [ranks[0], ranks[1]]
