"""A rank that dies, raises or freezes: the training ends by itself, its checkpoint loads, and it goes on from there.

``KILL_SEED=N`` chooses other moments for the kills.
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from killable import Ranks
from workers import TRAIN_FLAGS

SEED = int(os.environ.get("KILL_SEED", "1"))
BOUND = 120  # seconds in which the other ranks must have ended
MODEL = (
    "--arch", "mhmoe_lm_tiny", "--decoder-layers", 2, "--moe-expert-count", 8, "--tokens-per-sample", 32,
    "--batch-size", 4, "--optimizer", "mhmoe_adam", "--lr", 0.001, "--disable-validation",
)  # fmt: skip


class Run:
    """A training into ``folder`` that may be started again and again."""

    def __init__(self, data: Path, folder: Path, *flags: object, size: int = 2) -> None:
        self.data, self.folder, self.flags, self.size = data, folder, flags, size
        self.starts = 0

    @property
    def checkpoint(self) -> Path:
        return self.folder / "saved" / "checkpoint_last.pt"

    def start(self, max_update: int, **how: object) -> Ranks:
        self.starts += 1
        saving = ("--save-dir", self.checkpoint.parent, "--save-interval-updates", 2, "--keep-interval-updates", 1)
        words = (self.data, *TRAIN_FLAGS, *MODEL, "--max-update", max_update, *saving, *self.flags)
        return Ranks(self.folder / f"start-{self.starts}", self.size, *words, **how)

    def saved_updates(self) -> int:
        """Updates in the checkpoint, which must load whole."""
        state = torch.load(self.checkpoint, weights_only=True)
        assert all(tensor.isfinite().all() for tensor in state["model"].values())
        assert state["last_optimizer_state"]["state"]
        return state["optimizer_history"][-1]["num_updates"]

    def must_resume(self) -> None:
        """Two more updates from the checkpoint."""
        done = self.saved_updates()
        ranks = self.start(done + 2)
        assert ranks.end() == [0] * self.size, ranks.output()[-4000:]
        assert f"Loaded checkpoint {self.checkpoint}" in ranks.output()
        assert self.saved_updates() == done + 2


def others_end(ranks: Ranks, victim: int) -> str:
    """All ranks but the victim must end by themselves, not well, and say why; the output of one of them."""
    statuses = ranks.end(BOUND)
    assert statuses.pop(victim) == -signal.SIGKILL
    assert all(status is not None and status > 0 for status in statuses), statuses
    output = ranks.output(0 if victim else 1)
    assert "lost the connection to another rank" in output or "the training ends, because" in output, output[-4000:]
    return output


def test_killed_in_training(corpus: Path, tmp_path: Path) -> None:
    run = Run(corpus, tmp_path)
    ranks = run.start(1000)
    ranks.until(lambda: ranks.updates() >= 3 and run.checkpoint.exists())
    ranks.kill(1)
    assert "rank 1 (" in others_end(ranks, 1)
    run.must_resume()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_killed_at_a_random_moment_of_training(corpus: Path, tmp_path: Path, number: int) -> None:
    moment = random.Random(f"training {SEED} {number}")
    run = Run(corpus, tmp_path)
    ranks = run.start(100_000)
    ranks.until(lambda: ranks.updates() >= 1 and run.checkpoint.exists())
    time.sleep(moment.uniform(0, 3))
    victim = moment.randrange(2)
    ranks.kill(victim)
    others_end(ranks, victim)
    run.must_resume()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_killed_at_a_random_moment_of_saving(corpus: Path, tmp_path: Path, number: int) -> None:
    """The moment is drawn from the gathering of the experts on, and reaches over the copies to the next update."""
    moment = random.Random(f"saving {SEED} {number}")
    # A larger model, which takes some time to save.
    run = Run(corpus, tmp_path, "--decoder-embed-dim", 256, "--decoder-ffn-embed-dim", 1024)
    ranks = run.start(100_000, beforehand=say_when_saving)
    ranks.until(lambda: run.checkpoint.exists())
    saves = ranks.output().count("saving begins") + moment.randint(1, 3)
    ranks.until(lambda: ranks.output().count("saving begins") >= saves)
    time.sleep(moment.uniform(0, 0.6))
    victim = moment.choice([0, 0, 1])  # mostly the one that writes
    ranks.kill(victim)
    others_end(ranks, victim)
    run.must_resume()


def say_when_saving(rank: int) -> None:
    """Write a line when the gathering of experts begins."""
    from fairseq.trainer import Trainer

    stock = Trainer.consolidate_optimizer

    def consolidate_optimizer(self: Trainer) -> None:
        print("saving begins", flush=True)
        stock(self)

    Trainer.consolidate_optimizer = consolidate_optimizer
