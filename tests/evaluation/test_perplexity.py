"""Perplexity of a split against scoring every target by hand; of several languages, and of masked positions."""

import argparse
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from language_models import small_dictionary, small_model

from mhmoe_fairseq.checkpoints.open import Opened
from mhmoe_fairseq.evaluation.expert_loads import LoadCounter
from mhmoe_fairseq.evaluation.perplexity import Score, evaluate_text, guess, part_scores, together
from mhmoe_fairseq.tasks.language_modeling import MHMoELanguageModelingTask

BLOCK = 16


def random_lines(count: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [[*generator.integers(4, 44, size=generator.integers(1, 9)).tolist(), 2] for _ in range(count)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    small_dictionary().save(str(tmp_path / "dict.txt"))
    builder = MMapIndexedDatasetBuilder(str(tmp_path / "valid.bin"), dtype=np.uint16)
    for line in random_lines(23):
        builder.add_item(torch.tensor(line))
    builder.finalize(str(tmp_path / "valid.idx"))
    return tmp_path


@pytest.mark.parametrize("add_bos_token", [False, True])
def test_every_token_of_the_text_is_a_target_and_nothing_else(data: Path, add_bos_token: bool) -> None:
    parser = argparse.ArgumentParser()
    MHMoELanguageModelingTask.add_args(parser)
    args = parser.parse_args([str(data)])
    settings = {
        "tpu": False, "seed": 1, "dataset_impl": None, "use_plasma_view": False, "plasma_path": "", "batch_size": None,
        "batch_size_valid": None, "data_buffer_size": 0, "sample_break_mode": "none", "tokens_per_sample": BLOCK,
        "add_bos_token": add_bos_token,
    }  # fmt: skip
    vars(args).update(settings)
    task = MHMoELanguageModelingTask.setup_task(args)
    model = small_model("mhmoe_lm_tiny", dictionary=task.dictionary, tokens_per_sample=32).eval()
    with torch.no_grad():  # an untrained model finds every word alike
        model.decoder.output_projection.weight.mul_(20)
    stream = [token for line in random_lines(23) for token in line]
    nats, eos, bos = 0.0, Dictionary().eos(), Dictionary().bos()
    for start in range(0, len(stream), BLOCK):
        block = stream[start : start + BLOCK]
        # fairseq reads the token before a block, </s> before the first; <s> comes in front of that.
        source = [*([bos] if add_bos_token else []), stream[start - 1] if start else eos, *block[:-1]]
        with torch.no_grad():
            log_probs = model(torch.tensor([source]))[0][0].log_softmax(-1)
        nats -= float(log_probs[-len(block) :].gather(1, torch.tensor(block)[:, None]).double().sum())
    opened = Opened(model, task, {"task": {"_name": "mhmoe_language_modeling"}}, data / "checkpoint.pt")
    counter = LoadCounter(opened.layers)
    metrics = evaluate_text(opened, "valid", counter, max_tokens=None, batch_size=3).metrics
    assert {metric.count for metric in metrics.values()} == {len(stream)}
    assert metrics["loss"].value == pytest.approx(nats / len(stream) / math.log(2), rel=1e-5)
    assert metrics["perplexity"].value == 2 ** metrics["loss"].value
    positions = len(stream) + (math.ceil(len(stream) / BLOCK) if add_bos_token else 0)
    moe = next(layer.moe_layer.config for layer in opened.layers if layer.is_moe_layer)
    assert {sum(row.loads) for row in counter.loads.layers} == {positions * moe.num_heads * moe.top_k}


def test_metrics_of_a_text() -> None:
    metrics = Score(30, 120.0, characters=60.0).metrics("token")
    assert {name: (metric.value, metric.unit) for name, metric in metrics.items()} == {
        "perplexity": (16.0, "perplexity"), "loss": (4.0, "bits/token"), "bits/character": (2.0, "bits/character"),
    }  # fmt: skip


def test_parts_count_by_their_targets() -> None:
    texts = [Score(30, 60.0, characters=60.0), Score(10, 60.0, characters=15.0)]
    assert together(texts) == Score(40, 120.0, None, 75.0)
    assert together([texts[0], Score(10, 60.0)]).characters is None
    assert together([Score(30, 60.0, 15), Score(10, 60.0, 1)]) == Score(40, 120.0, 16)


def test_losses_of_masked_positions_are_bits() -> None:
    sums = {"image_targets": 8, "image_loss": 8 * 3 * math.log(2), "image_correct": 2, "text_targets": 0}
    assert part_scores(sums) == {"image": Score(8, pytest.approx(24.0), 2)}


def test_a_metric_stands_beside_a_guess_without_context() -> None:
    assert guess([2, 1, 1]) == Score(4, 6.0, 2) and guess([5]) == Score(5, 0.0, 5)
    metrics = Score(8, 24.0, 2).metrics("position", Score(8, 32.0, 1))
    assert [(name, metric.value, metric.baselines["without context"]) for name, metric in metrics.items()] == [
        ("perplexity", 8.0, 16.0), ("loss", 3.0, 4.0), ("accuracy", 25.0, 12.5),
    ]  # fmt: skip
