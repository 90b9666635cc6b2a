"""Merged experts and experts that choose through ``fairseq-train``: on two ranks as in one process, and resumed."""

import json
from pathlib import Path

import pytest
import torch
from images_and_words import training_words, write_images_and_words
from parallel_runs import SIZES, figures, saved, train_logs, updates_in, write_even_corpus
from workers import Workers

LORY = (
    "--arch", "smoe_lm_tiny", *SIZES, "--moe-expert-count", "8", "--moe-ffn-dim", "16",
    "--mhmoe-routing", "lory", "--mhmoe-segment-length", "4",
)  # fmt: skip


def test_lory_trains_and_resumes_on_two_ranks_as_in_one_process(tmp_path: Path) -> None:
    data = write_even_corpus(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    saving = ("--save-interval-updates", 6)
    [log] = train_logs(1, data, one, *saving, updates=12, model=LORY)
    logs = train_logs(2, data, two, updates=12, model=LORY)
    assert figures(updates_in(logs[0]), "loss", "gnorm") == figures(updates_in(log), "loss", "gnorm")
    assert not any("a2a_rows" in update for update in updates_in(logs[0]))  # every rank has all experts
    assert_equal_weights(two, one)
    (middle,) = one.glob("checkpoint_*_6.pt")
    train_logs(2, data, tmp_path / "resumed", "--restore-file", middle, updates=12, model=LORY)
    assert_equal_weights(tmp_path / "resumed", one)


def assert_equal_weights(folder: Path, other: Path) -> None:
    weights = saved(other)["model"]
    for name, value in saved(folder)["model"].items():
        if not name.endswith("k_proj.bias"):  # its gradient is rounding alone
            torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------------- encoders


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images_and_words(tmp_path_factory.mktemp("images") / "data")


def train_beit3(ranks: int, images: Path, save_dir: Path, *flags: object, updates: int = 6) -> list[dict]:
    """With a global batch of two micro-batches; what each update logged."""
    flags = ("--update-freq", 2 // ranks, "--disable-validation", *flags)
    words = training_words(images, save_dir, *flags, updates=updates)
    log = Workers(ranks).fairseq("fairseq-train", *words, timeout=300)[0]
    lines = [line[line.index("{") :] for line in log.splitlines() if '"num_updates"' in line and "{" in line]
    return [json.loads(line) for line in lines]


def test_experts_choose_on_two_ranks_as_in_one_process(images: Path, tmp_path: Path) -> None:
    flags = ("--mhmoe-routing", "expert-choice")
    one, two = (train_beit3(ranks, images, tmp_path / f"{ranks}", *flags) for ranks in (1, 2))
    assert len(one) >= 6 and [update["loss"] for update in two] == [update["loss"] for update in one]
    assert {float(update["a2a_rows"]) > 0 for update in two if "a2a_rows" in update} == {True}
    assert_equal_weights(tmp_path / "2", tmp_path / "1")


def test_smear_on_two_ranks_resumes_what_it_would_have_done(images: Path, tmp_path: Path) -> None:
    """Which experts are left out is drawn in each process: two ranks are not one with twice the batches."""
    flags = ("--mhmoe-heads-number", 1, "--moe-top-k", 1, "--mhmoe-routing", "smear")
    whole = train_beit3(2, images, tmp_path / "whole", *flags)
    parts = [train_beit3(2, images, tmp_path / "parts", *flags, updates=updates) for updates in (4, 6)]
    assert all("a2a_rows" not in update for update in whole)  # every rank has all experts
    losses = [{update["num_updates"]: update["loss"] for update in of if "loss" in update} for of in (whole, *parts)]
    assert len(losses[0]) == 6 and losses[0] == losses[1] | losses[2] and len(losses[2]) == 2
    assert_equal_weights(tmp_path / "parts", tmp_path / "whole")
