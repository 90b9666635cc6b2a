"""Experts are counted while a model is evaluated: by part, by pool, and over batches."""

import pytest
import torch
from beit3_models import IMAGE_POSITIONS, beit3_batch, small_beit3
from language_models import small_model

from mhmoe_fairseq.evaluation.expert_loads import LoadCounter

HEADS = 4


@torch.no_grad()
def test_parts_add_up_to_the_whole_and_nothing_is_counted_outside() -> None:
    model = small_model("mhmoe_lm_tiny", moe_top_k=2).eval()
    layers = model.decoder.layers
    counter = LoadCounter(layers)
    tokens = torch.randint(4, 44, (2, 7))
    model(tokens)
    for part, rows in (("de", tokens), ("en", tokens[:1]), ("en", tokens[:, :3])):
        with counter.counting(part):
            outputs = model(rows)[1]["moe"]
    loads = counter.loads
    moe = [index for index, layer in enumerate(layers) if layer.is_moe_layer]
    heads = layers[moe[0]].moe_layer.config.num_heads
    assert loads.parts == ["de", "en"]
    for part, positions in (("de", 14), ("en", 13), (None, 27)):
        rows = loads.of(part).layers
        assert [row.layer for row in rows] == moe
        assert all(sum(row.loads) == positions * heads * 2 for row in rows)
    last = outputs[moe[-1]].stats
    assert 0 < loads.of("en").layers[-1].entropy <= torch.log(torch.tensor(float(len(last.expert_load))))
    for one, other, both in zip(loads.of("de").layers, loads.of("en").layers, loads.of().layers):
        assert [a + b for a, b in zip(one.loads, other.loads)] == both.loads
        weighted = (14 * one.entropy + 13 * other.entropy) / 27
        assert both.entropy == pytest.approx(weighted)


@torch.no_grad()
def test_pools_have_rows_of_their_own_where_something_came() -> None:
    model = (
        small_beit3(mhmoe_modality_experts="separate", moe_expert_count=4, encoder_layers=4, moe_top_k=4)
        .double()
        .eval()
    )
    counter = LoadCounter(model.beit3.encoder.layers)
    for kind in ("pair", "image"):
        with counter.counting(kind):
            model(**beit3_batch(kind, [2]))
    assert [row.name for row in counter.loads.of("pair").layers] == ["2 image", "2 text", "4 image", "4 text"]
    assert [row.name for row in counter.loads.of("image").layers] == ["2 image", "4 image"]
    loads = [row.loads for row in counter.loads.of().layers]
    assert loads == [[2 * IMAGE_POSITIONS * HEADS] * 4, [2 * HEADS] * 4] * 2
    assert counter.loads.of().max_over_mean() == counter.loads.of().active() == [1.0] * 4


@torch.no_grad()
def test_tokens_that_are_dropped_and_models_without_experts() -> None:
    model = small_model("mhmoe_lm_tiny", mhmoe_routing="capacity", moe_eval_capacity_token_fraction=0.05).eval()
    counter = LoadCounter(model.decoder.layers)
    with counter.counting():
        outputs = model(torch.randint(4, 44, (2, 7)))[1]["moe"]
    [row, *_] = counter.loads.layers
    assert counter.loads.parts == [] and row.dropped == outputs[row.layer].stats.dropped > 0
    assert row.overflow == pytest.approx(float(row.dropped / sum(row.loads)))
    dense = small_model("dense_lm_tiny").eval()
    counter = LoadCounter(dense.decoder.layers)
    with counter.counting("de"):
        dense(torch.randint(4, 44, (1, 3)))
    assert counter.loads is None
