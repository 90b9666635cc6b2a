"""Which experts every position of images and text chose, against the layers' own counts and slow references."""

from __future__ import annotations

import pytest
import torch
from beit3_models import IMAGE_POSITIONS, KINDS, beit3_batch, small_beit3

from mhmoe_fairseq.analysis.routing.expert_choices import distinct_experts, expert_layers, num_experts, recorded_choices
from mhmoe_fairseq.analysis.routing.modality_routing import GROUPS, GroupCounts, ModalityRouting, group_positions

LENGTHS = [5, 2, 7]


def model_of(experts="shared", heads=2):
    flags = {"mhmoe_modality_experts": experts, "mhmoe_heads_number": heads, "moe_expert_count": 6, "moe_top_k": 2}
    return small_beit3(encoder_layers=3, moe_freq=1, **flags).eval()


def batch_of(kind, seed=0):
    batch = beit3_batch(kind, LENGTHS, seed=seed)
    return {key: value.float() if key == "images" else value for key, value in batch.items()}


@pytest.mark.parametrize("experts", ["shared", "separate"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_choices_add_up_to_the_layers_loads(kind, experts):
    model = model_of(experts)
    with recorded_choices(model) as calls:
        _, extra = model(**batch_of(kind))
    (call,) = calls
    text = 0 if kind == "image" else max(LENGTHS)
    assert (call.modality, call.image_positions) == (kind, 0 if kind == "text" else IMAGE_POSITIONS)
    assert call.is_real.shape == (3, call.image_positions + text)
    assert int((~call.is_real).sum()) == (0 if kind == "image" else 3 * max(LENGTHS) - sum(LENGTHS))
    assert expert_layers(model) == [0, 1, 2] == sorted(call.choices)
    for layer, choices in call.choices.items():
        assert choices.shape == (*call.is_real.shape, 2, 2)
        load = torch.bincount(choices[call.is_real].flatten(), minlength=num_experts(model))
        assert torch.equal(load, extra["moe_stats"][layer].expert_load.flatten().long())
    if experts == "separate":
        is_image = torch.arange(call.is_real.size(1)) < call.image_positions
        assert all(bool((choices[:, is_image] < 6).all()) for choices in call.choices.values())
        assert all(bool((choices[:, ~is_image] >= 6).all()) for choices in call.choices.values())


@torch.no_grad()
def test_a_positions_choices_are_those_of_its_own_features():
    """What a batch's row chose is what the row chooses alone."""
    model = model_of()
    batch = batch_of("pair")
    with recorded_choices(model) as calls:
        model(**batch)
        for row, length in enumerate(LENGTHS):
            model(text_tokens=batch["text_tokens"][row : row + 1, :length], images=batch["images"][row : row + 1])
    together, *alone = calls
    for row, length in enumerate(LENGTHS):
        for layer, choices in alone[row].choices.items():
            assert torch.equal(together.choices[layer][row, : IMAGE_POSITIONS + length], choices[0])


@torch.no_grad()
def test_nothing_is_recorded_outside():
    model = model_of()
    with recorded_choices(model) as calls:
        pass
    model(**batch_of("text"))
    assert calls == []


def test_distinct_experts():
    choices = torch.randint(0, 7, (5, 4, 3, 2), generator=torch.Generator().manual_seed(0))
    counts = distinct_experts(choices, 7)
    for row in range(5):
        for place in range(4):
            assert int(counts[row, place]) == len(set(choices[row, place].flatten().tolist()))


@torch.no_grad()
def test_groups_against_counting_one_by_one():
    model = model_of()
    with recorded_choices(model) as calls:
        for kind in KINDS:
            model(**batch_of(kind))
    counts = GroupCounts([0, 2], num_experts(model))
    for call in calls:
        counts.add(call)
    routing = counts.routing(("a", "b", "valid"), 4)
    assert routing.groups == list(GROUPS)
    assert routing.positions == [3 * IMAGE_POSITIONS, sum(LENGTHS), 3 * IMAGE_POSITIONS, sum(LENGTHS)]
    image, text, pair = calls
    split = IMAGE_POSITIONS
    rows = {
        "image": [(image, row, place) for row in range(3) for place in range(split)],
        "text": [(text, row, place) for row in range(3) for place in range(LENGTHS[row])],
        "image of pairs": [(pair, row, place) for row in range(3) for place in range(split)],
        "text of pairs": [(pair, row, split + place) for row in range(3) for place in range(LENGTHS[row])],
    }
    for group, name in enumerate(routing.groups):
        for place, layer in enumerate([0, 2]):
            load, distinct = [0] * 6, 0
            for call, row, position in rows[name]:
                chosen = call.choices[layer][row, position].flatten().tolist()
                distinct += len(set(chosen))
                for expert in chosen:
                    load[expert] += 1
            assert routing.load[group][place] == load
            assert routing.distinct[group][place] == pytest.approx(distinct / len(rows[name]))


def test_overlap_by_hand():
    load = [[[8.0, 0.0]], [[2.0, 6.0]]]
    routing = ModalityRouting("a", "b", "valid", [1], ["image", "text"], [4, 4], load, [[1.0], [1.5]], 2)
    assert routing.overlap_LGG().tolist() == [[[1.0, 0.25], [0.25, 1.0]]]


@torch.no_grad()
def test_padding_belongs_to_no_group():
    model = model_of()
    with recorded_choices(model) as calls:
        model(**batch_of("pair"))
    masks = dict(group_positions(calls[0]))
    assert torch.equal(masks["image of pairs"] | masks["text of pairs"], calls[0].is_real)
    assert not (masks["image of pairs"] & masks["text of pairs"]).any()
