"""Captions token by token equal the whole sequence at once."""

import pytest
import torch
from beit3_models import FAMILIES, beit3_batch, small_beit3


def model_of(arch, **flags):
    return small_beit3(arch, encoder_layers=3, moe_freq=0 if arch.startswith("dense") else 1, **flags).eval()


def images_of(rows, seed=0):
    return beit3_batch("image", [1] * rows, seed=seed)["images"].float()


def tokens_of(rows, length, seed=0):
    tokens = torch.randint(4, 44, (rows, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 0
    return tokens


def whole(model, images, tokens):
    """The scores of what follows ``tokens``, from the sequence with a mask at its end."""
    masks = torch.full((len(tokens), 1), model.dictionary.index("<mask>"))
    features, _ = model(text_tokens=torch.cat([tokens, masks], dim=1), images=images, attention="caption")
    return model.text_logits(features[:, -1])


@pytest.mark.parametrize("experts", ["shared", "separate"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_step_equals_the_whole_sequence(family, experts):
    model = model_of(f"{family}_beit3_tiny", mhmoe_modality_experts=None if family == "dense" else experts)
    images, tokens = images_of(3), tokens_of(3, 11)
    state = model.start_captions(images)
    for step in range(11):
        scores = model.next_token_logits(state, tokens[:, step])
        torch.testing.assert_close(scores, whole(model, images, tokens[:, : step + 1]), rtol=0, atol=1e-5)
    assert state.num_tokens == 11
    with pytest.raises(ValueError, match="a text of 13 tokens; --max-text-length is 12"):
        model.next_token_logits(state, tokens[:, 0])


@torch.no_grad()
def test_rows_follow_the_beam():
    model = model_of("mhmoe_beit3_tiny")
    images, tokens = images_of(2), tokens_of(2, 3)
    state = model.start_captions(images)
    model.next_token_logits(state, tokens[:, 0])
    model.next_token_logits(state, tokens[:, 1])
    rows = torch.tensor([1, 1, 0])  # two hypotheses of the second image, one of the first
    state.reorder(rows)
    new = torch.tensor([9, 10, 11])
    scores = model.next_token_logits(state, new)
    sequences = torch.cat([tokens[rows, :2], new[:, None]], dim=1)
    torch.testing.assert_close(scores, whole(model, images[rows], sequences), rtol=0, atol=1e-5)


@torch.no_grad()
def test_images_expand_before_the_first_token():
    model = model_of("dense_beit3_tiny")
    images = images_of(2)
    state = model.start_captions(images)
    rows = torch.tensor([0, 0, 1, 1])
    state.reorder(rows)
    begin = torch.zeros(4, dtype=torch.long)
    scores = model.next_token_logits(state, begin)
    torch.testing.assert_close(scores, whole(model, images[rows], begin[:, None]), rtol=0, atol=1e-5)


def test_steps_keep_no_graph_and_leave_the_model_as_it_is():
    model = model_of("mhmoe_beit3_tiny")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = model.start_captions(images_of(1))
    assert not model.next_token_logits(state, torch.tensor([0])).requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
