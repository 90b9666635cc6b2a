"""Perplexity of a split against scoring every target by hand, the domains of a mix one by one; masked positions."""

import argparse
import json
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
from mhmoe_fairseq.evaluation.records import Metric
from mhmoe_fairseq.tasks.language_modeling import MHMoELanguageModelingTask

BLOCK = 16


def random_lines(count: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [[*generator.integers(4, 44, size=generator.integers(1, 9)).tolist(), 2] for _ in range(count)]


def write_split(folder: Path, split: str, lines: list[list[int]]) -> None:
    builder = MMapIndexedDatasetBuilder(str(folder / f"{split}.bin"), dtype=np.uint16)
    for line in lines:
        builder.add_item(torch.tensor(line))
    builder.finalize(str(folder / f"{split}.idx"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    small_dictionary().save(str(tmp_path / "dict.txt"))
    write_split(tmp_path, "valid", random_lines(23))
    return tmp_path


def opened(data: Path, add_bos_token: bool = False) -> Opened:
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
    return Opened(model, task, {"task": {"_name": "mhmoe_language_modeling"}}, data / "checkpoint.pt")


@torch.no_grad()
def bits_by_hand(model: torch.nn.Module, lines: list[list[int]], add_bos_token: bool = False) -> tuple[float, int]:
    """The cross entropy of all tokens in blocks, and their number."""
    stream = [token for line in lines for token in line]
    nats, eos, bos = 0.0, Dictionary().eos(), Dictionary().bos()
    for start in range(0, len(stream), BLOCK):
        block = stream[start : start + BLOCK]
        # fairseq reads the token before a block, </s> before the first; <s> comes in front of that.
        source = [*([bos] if add_bos_token else []), stream[start - 1] if start else eos, *block[:-1]]
        log_probs = model(torch.tensor([source]))[0][0].log_softmax(-1)
        nats -= float(log_probs[-len(block) :].gather(1, torch.tensor(block)[:, None]).double().sum())
    return nats / math.log(2), len(stream)


@pytest.mark.parametrize("add_bos_token", [False, True])
def test_every_token_of_the_text_is_a_target_and_nothing_else(data: Path, add_bos_token: bool) -> None:
    found = opened(data, add_bos_token)
    bits, tokens = bits_by_hand(found.model, random_lines(23), add_bos_token)
    counter = LoadCounter(found.layers)
    record = evaluate_text(found, "valid", counter, max_tokens=None, batch_size=3)
    assert {metric.count for metric in record.metrics.values()} == {tokens} and record.parts == {}
    assert record.metrics["loss"].value == pytest.approx(bits / tokens, rel=1e-5)
    assert record.metrics["perplexity"].value == 2 ** record.metrics["loss"].value
    positions = tokens + (math.ceil(tokens / BLOCK) if add_bos_token else 0)
    moe = next(layer.moe_layer.config for layer in found.layers if layer.is_moe_layer)
    assert {sum(row.loads) for row in counter.loads.layers} == {positions * moe.num_heads * moe.top_k}


@pytest.mark.parametrize("wrong", [(), ("valid_second",)], ids=["all fit", "one does not"])
def test_domains_are_scored_one_by_one_and_the_total_is_their_sum(data: Path, wrong: tuple[str, ...]) -> None:
    lines = {"first": random_lines(23)[:7], "second": random_lines(23)[7:]}
    write_split(data, "valid", [*lines["first"], [2], *lines["second"]])
    splits = {}
    for size, (domain, text) in zip((700, 2100), lines.items()):
        write_split(data, f"valid_{domain}", text)
        splits[f"valid_{domain}"] = {"bytes": size, "tokens": sum(map(len, text)) + (f"valid_{domain}" in wrong)}
    manifest = {"source": {"name": "a mix"}, "files": {"dict.txt": {"sha256": "0"}}, "splits": splits}
    (data / "manifest.json").write_text(json.dumps(manifest))
    found = opened(data)
    counter = LoadCounter(found.layers)
    record = evaluate_text(found, "valid", counter, max_tokens=None, batch_size=3)
    bits, tokens = zip(*(bits_by_hand(found.model, text) for text in lines.values()))
    expected = {"first": (bits[0], tokens[0], 700), "second": (bits[1], tokens[1], 2100)}
    assert list(record.parts) == counter.loads.parts == list(expected)
    for name, (cost, count, size) in [*expected.items(), ("all", (sum(bits), sum(tokens), 2800))]:
        metrics = record.metrics if name == "all" else record.parts[name]
        assert metrics["loss"].count == count
        assert metrics["loss"].value == pytest.approx(cost / count, rel=1e-5)
        fits = not wrong or name == "first"
        assert metrics.get("bits/byte") == (
            Metric(pytest.approx(cost / size, rel=1e-5), "bits/byte", count=size) if fits else None
        )
    moe = next(layer.moe_layer.config for layer in found.layers if layer.is_moe_layer)
    for part, count in (("first", tokens[0]), ("second", tokens[1]), (None, sum(tokens))):
        assert {sum(row.loads) for row in counter.loads.of(part).layers} == {count * moe.num_heads * moe.top_k}


def test_metrics_of_a_text() -> None:
    metrics = Score(30, 120.0, characters=60.0).metrics("token")
    assert {name: (metric.value, metric.unit) for name, metric in metrics.items()} == {
        "perplexity": (16.0, "perplexity"), "loss": (4.0, "bits/token"), "bits/character": (2.0, "bits/character"),
    }  # fmt: skip


def test_a_model_that_diverged_has_an_infinite_perplexity() -> None:
    for bits, perplexity in ((1023.0, 2.0**1023), (1024.0, math.inf), (5000.0, math.inf)):
        assert Score(1, bits).metrics("token")["perplexity"].value == perplexity


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
