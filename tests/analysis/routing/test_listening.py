"""Which experts every position of images and text chose, against the layers' own counts and slow references."""

from itertools import product

import pytest
import torch
from beit3_models import IMAGE_POSITIONS, KINDS, beit3_batch, small_beit3
from language_models import small_model, token_rows

from mhmoe_fairseq.analysis.routing.listening import GROUPS, PositionCounts, RoutedCall, expert_pools, listening
from mhmoe_fairseq.evaluation.records import ExpertLoads, LayerLoads, Metric, Record

LENGTHS = [5, 2, 7]


def model_of(experts="shared", heads=2):
    flags = {"mhmoe_modality_experts": experts, "mhmoe_heads_number": heads, "moe_expert_count": 6, "moe_top_k": 2}
    return small_beit3(encoder_layers=3, moe_freq=1, **flags).eval()


def batch_of(kind, seed=0):
    batch = beit3_batch(kind, LENGTHS, seed=seed)
    return {key: value.float() if key == "images" else value for key, value in batch.items()}


@pytest.mark.parametrize("experts, kind", [*product(["shared", "separate"], KINDS), ("language model", "text")])
@torch.no_grad()
def test_choices_add_up_to_the_layers_loads(kind, experts):
    if experts == "language model":
        flags = {"mhmoe_heads_number": 2, "moe_expert_count": 6, "moe_top_k": 2}
        model, inputs = small_model(decoder_layers=3, moe_freq=1, **flags).eval(), {"src_tokens": token_rows(LENGTHS)}
    else:
        model, inputs = model_of(experts), batch_of(kind)
    calls = []
    with listening(model, calls.append):
        _, extra = model(**inputs)
    (call,) = calls
    image, text = 0 if kind == "text" else IMAGE_POSITIONS, 0 if kind == "image" else max(LENGTHS)
    assert list(call.groups) == (["image of pairs", "text of pairs"] if kind == "pair" else [kind])
    is_real = sum(call.groups.values()) == 1  # no position belongs to two groups
    assert is_real.shape == (3, image + text)
    assert int((~is_real).sum()) == (0 if kind == "image" else 3 * max(LENGTHS) - sum(LENGTHS))
    assert list(expert_pools(model)) == [0, 1, 2] == sorted(call.choices)
    for layer, choices in call.choices.items():
        assert choices.shape == (*is_real.shape, 2, 2)
        load = torch.bincount(choices[is_real].flatten(), minlength=call.num_experts)
        stats = extra["moe"][layer].stats
        assert torch.equal(load, stats.expert_load.flatten().long())
        assert float(call.entropies[layer][is_real].sum()) == pytest.approx(float(stats.entropy.sum()), rel=1e-5)
        assert torch.allclose(call.weights[layer][is_real].sum(-1), torch.ones(int(is_real.sum()), 2))
    if experts == "separate":
        is_image = torch.arange(image + text) < image
        assert all(bool((choices[:, is_image] < 6).all()) for choices in call.choices.values())
        assert all(bool((choices[:, ~is_image] >= 6).all()) for choices in call.choices.values())


@torch.no_grad()
def test_a_positions_choices_are_those_of_its_own_features():
    """What a batch's row chose is what the row chooses alone."""
    model = model_of()
    batch = batch_of("pair")
    calls = []
    with listening(model, calls.append):
        model(**batch)
        for row, length in enumerate(LENGTHS):
            model(text_tokens=batch["text_tokens"][row : row + 1, :length], images=batch["images"][row : row + 1])
    together, *alone = calls
    for row, length in enumerate(LENGTHS):
        for layer, choices in alone[row].choices.items():
            assert torch.equal(together.choices[layer][row, : IMAGE_POSITIONS + length], choices[0])


@torch.no_grad()
def test_nothing_is_heard_outside():
    model = model_of()
    calls = []
    with listening(model, calls.append):
        pass
    model(**batch_of("text"))
    assert calls == []


def test_distinct_experts():
    choices = torch.randint(0, 7, (5, 4, 3, 2), generator=torch.Generator().manual_seed(0))
    counts = RoutedCall({}, {1: choices}, 7).distinct(1)
    for row in range(5):
        for position in range(4):
            assert int(counts[row, position]) == len(set(choices[row, position].flatten().tolist()))


@pytest.mark.parametrize("experts", ["shared", "separate"])
@torch.no_grad()
def test_groups_against_counting_one_by_one(experts):
    model = model_of(experts)
    calls, counts = [], PositionCounts(model)
    with listening(model, lambda call: (calls.append(call), counts.add(call))):
        for kind in KINDS:
            model(**batch_of(kind))
    whole = ExpertLoads([LayerLoads(layer, [1.0] * 6) for layer in (0, 1, 2)])
    routing = counts.added_to(Record("masked", "valid", {"loss": Metric(1.0, "bits/position")}, experts=whole))
    assert list(routing.parts) == routing.experts.parts == list(GROUPS) and routing.experts.of(None) == whole
    image, text, pair = calls
    split = IMAGE_POSITIONS
    rows = {
        "image": [(image, row, at) for row in range(3) for at in range(split)],
        "text": [(text, row, at) for row in range(3) for at in range(LENGTHS[row])],
        "image of pairs": [(pair, row, at) for row in range(3) for at in range(split)],
        "text of pairs": [(pair, row, split + at) for row in range(3) for at in range(LENGTHS[row])],
    }
    for group in GROUPS:
        assert routing.parts[group]["experts per position"].count == len(rows[group])
        for layer, found in enumerate(routing.experts.of(group).layers):
            assert found.pool == (None if experts == "shared" else group.split()[0])
            load, distinct = [0] * 12, 0
            for call, row, position in rows[group]:
                chosen = call.choices[layer][row, position].flatten().tolist()
                distinct += len(set(chosen))
                for expert in chosen:
                    load[expert] += 1
            first = 6 if experts == "separate" and found.pool == "text" else 0
            assert found.loads == load[first : first + 6] and sum(load) == sum(found.loads)
            means = routing.settings["experts_per_position"][group]
            assert means[layer] == pytest.approx(distinct / len(rows[group]))
    assert routing.settings["most_experts"] == 4


@torch.no_grad()
def test_a_layer_that_does_not_tell_its_choices_is_refused_by_name():
    model = model_of()
    model.beit3.encoder.layers[1].moe_layer = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"layer 2 \(Identity\) does not tell which experts"):
        with listening(model, print):
            pass
