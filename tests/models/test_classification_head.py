"""The head on a causal language model's last token: what it reads, what it saves, what it starts from."""

import pytest
import torch
import torch.nn.functional as F
from language_models import FAMILIES, small_model, token_rows
from moe_oracle import losses_of

PAD = 1


def classifier(arch="mhmoe_lm_tiny", seed=0, **how):
    model = small_model(arch, seed)
    model.register_classification_head("head", num_classes=3, **how)
    return model


def logits(model, rows):
    return model(rows, classification_head_name="head")[0]


def test_logits_are_a_linear_map_of_the_last_tokens_features():
    model, rows = classifier().eval(), token_rows([9, 4, 1])
    features, _ = model.extract_features(rows)
    head = model.classification_heads["head"]
    for row, length in enumerate((9, 4, 1)):
        by_hand = F.linear(features[row, length - 1], head.weight, head.bias)
        torch.testing.assert_close(logits(model, rows)[row], by_hand)


def test_left_padding_reads_the_last_token_too():
    head = classifier().eval().classification_heads["head"]
    features = torch.randn(2, 4, 32)
    mask = torch.tensor([[True, True, False, False], [False, False, False, True]])
    expected = F.linear(features[[0, 1], [3, 2]], head.weight, head.bias)
    torch.testing.assert_close(head(features, mask), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_logit_and_routes_nowhere(family):
    model = classifier(f"{family}_lm_tiny").eval()
    lengths = [11, 3, 7, 1]
    rows = token_rows(lengths)
    padded = F.pad(rows, (0, 6), value=PAD)
    together, extra = model(padded, classification_head_name="head")
    for row, length in enumerate(lengths):
        torch.testing.assert_close(together[row], logits(model, rows[row : row + 1, :length])[0], atol=1e-5, rtol=0)
    for output in extra["moe"]:
        if output is not None:
            heads = 4 if family == "mhmoe" else 1
            assert output.stats.num_subtokens == sum(lengths) * heads
            assert output.stats.expert_load.sum() == sum(lengths) * heads * 2


def test_auxiliary_losses_come_with_the_logits():
    _, extra = classifier()(token_rows([5, 5]), classification_head_name="head")
    assert extra["moe"][0] is None and losses_of(extra).requires_grad


def test_the_language_model_is_as_before():
    rows = token_rows([9, 4])
    torch.testing.assert_close(classifier().eval()(rows)[0], small_model().eval()(rows)[0], rtol=0, atol=0)
    assert classifier().eval()(rows)[0].shape == (2, 9, 44)


def test_the_heads_start_does_not_change_the_models():
    with_head, without = classifier().state_dict(), small_model().state_dict()
    assert with_head.keys() - without.keys() == {"classification_heads.head.weight", "classification_heads.head.bias"}
    assert all(torch.equal(with_head[name], without[name]) for name in without)


def test_dropout_of_the_head_is_for_training():
    model, rows = classifier(dropout=0.5), token_rows([6, 3])
    model.train()
    assert not torch.equal(logits(model, rows), logits(model, rows))
    model.eval()
    assert torch.equal(logits(model, rows), logits(model, rows))


def test_the_head_works_in_its_own_precision():
    """Features may be of 16 bits, as some norms leave them under --mhmoe-precision."""
    head = classifier().classification_heads["head"]
    features, mask = torch.randn(2, 4, 32).bfloat16(), torch.zeros(2, 4, dtype=torch.bool)
    torch.testing.assert_close(head.eval()(features, mask), head(features.float(), mask), rtol=0, atol=0)


@pytest.mark.parametrize(
    "how, message",
    [
        ({"num_classes": 1}, r"--num-classes \(1\) must be at least 2"),
        ({"num_classes": 3, "dropout": 1.0}, r"--mhmoe-head-dropout \(1.0\) must be in \[0, 1\)"),
    ],
)
def test_bad_flags(how, message):
    with pytest.raises(ValueError, match=message):
        small_model().register_classification_head("head", **how)


# ---------------------------------------------------------------------- checkpoints


def test_a_head_is_saved_and_loaded(tmp_path):
    saved, loaded = classifier(seed=1).eval(), classifier(seed=2, may_be_new=False).eval()
    torch.save(saved.state_dict(), tmp_path / "model.pt")
    loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    rows = token_rows([6, 3])
    assert torch.equal(logits(saved, rows), logits(loaded, rows))


def test_a_language_models_checkpoint_leaves_a_new_head_as_it_is():
    model, other = classifier(seed=1), small_model(seed=2)
    before = model.classification_heads["head"].weight.clone()
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(model.classification_heads["head"].weight, before)
    assert torch.equal(model.decoder.embed_tokens.weight, other.decoder.embed_tokens.weight)


def test_anything_else_that_is_missing_or_unexpected_is_an_error():
    state = small_model(seed=2).state_dict()
    with pytest.raises(RuntimeError, match="Missing key.*classification_heads.head.weight"):
        classifier(may_be_new=False).load_state_dict(dict(state), strict=True)
    half = {**state, "classification_heads.head.weight": torch.zeros(3, 32)}
    with pytest.raises(RuntimeError, match="Missing key.*classification_heads.head.bias"):
        classifier().load_state_dict(half, strict=True)
    with pytest.raises(RuntimeError, match="Unexpected key.*classification_heads.other.weight"):
        classifier().load_state_dict({**state, "classification_heads.other.weight": torch.zeros(3, 32)}, strict=True)
    state.pop("decoder.layers.0.self_attn.q_proj.weight")
    with pytest.raises(RuntimeError, match="Missing key.*q_proj.weight"):
        classifier().load_state_dict(state, strict=True)
