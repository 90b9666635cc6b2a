"""Pre-training on images and text on two ranks with shared experts: the same training as in one process."""

import json
from pathlib import Path

import pytest
import torch
from images_and_words import training_words, write_images_and_words
from parallel_runs import figures, updates_in
from workers import Workers

FIGURES = ("loss", "image_loss", "text_loss", "pair_image_loss", "pair_text_loss", "gate_loss", "gnorm", "moe_entropy")
COUNTS = {"train": {"image": 9, "text": 32, "pair": 20}, "valid": {"image": 3, "text": 12, "pair": 5}}
ODD = {"train": {"image": 2, "text": 11, "pair": 5}, "valid": {"image": 1, "text": 9, "pair": 3}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images_and_words(tmp_path_factory.mktemp("images") / "data", COUNTS)


def train(ranks: int, data: Path, save_dir: Path, *flags: object, updates: int) -> list[str]:
    words = training_words(data, save_dir, "--update-freq", 2 // ranks, *flags, updates=updates)
    return Workers(ranks).fairseq("fairseq-train", *words, timeout=300)


def parameters(save_dir: Path) -> dict[str, torch.Tensor]:
    state = torch.load(save_dir / "checkpoint_last.pt", weights_only=True)["model"]
    # Keys' biases have a gradient of zero but for rounding, which Adam makes large.
    return {name: value for name, value in state.items() if "k_proj" not in name or not name.endswith("bias")}


def valid_records(log: str) -> list[dict[str, str]]:
    return [json.loads(line[line.index("{") :]) for line in log.splitlines() if '"valid_ppl"' in line]


def test_two_ranks_train_as_one_process(data: Path, tmp_path: Path) -> None:
    """An epoch is 8 batches, so that no rank runs out before the other."""
    one, *_ = train(1, data, tmp_path / "one", updates=6)
    two, *_ = train(2, data, tmp_path / "two", updates=6)
    assert len(updates_in(one)) == 6 and '"a2a_rows"' in two
    assert figures(updates_in(two), *FIGURES) == figures(updates_in(one), *FIGURES)
    names = [f"valid_{name}" for name in FIGURES if name != "gnorm"]
    for record, other in zip(valid_records(two), valid_records(one), strict=True):
        assert {name: record[name] for name in names} == {name: other[name] for name in names}
    expected, found = parameters(tmp_path / "one"), parameters(tmp_path / "two")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=2e-5), name


def test_a_rank_without_a_batch_holds_nobody_up(tmp_path: Path) -> None:
    """Three batches in training, three in validation, of which two have no image of their own."""
    data = write_images_and_words(tmp_path / "data", ODD)
    (log, _) = train(2, data, tmp_path / "run", "--update-freq", 1, "--max-epoch", 2, updates=20)
    assert [update["num_updates"] for update in updates_in(log)] == ["1", "2", "3", "4"]
    (alone,) = train(1, data, tmp_path / "alone", "--update-freq", 2, "--max-epoch", 2, updates=20)
    assert [record["valid_ppl"] for record in valid_records(log)] == [
        record["valid_ppl"] for record in valid_records(alone)
    ]
