"""Heads: BEiT-3's against their formulas, row by row; the one on a causal model's last token."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from language_models import FAMILIES, small_model, token_rows
from moe_oracle import losses_of

from mhmoe_fairseq.models.heads import ImageClassificationHead, NLVR2Head, RetrievalHead, VQAHead

WIDTH, PATCHES, WORDS = 6, 4, 3
SPLIT = 1 + PATCHES
HEADS = {
    "vqa": lambda: VQAHead(WIDTH, 5),
    "nlvr2": lambda: NLVR2Head(WIDTH),
    "image_classification": lambda: ImageClassificationHead(WIDTH, 7),
    "retrieval": lambda: RetrievalHead(WIDTH),
}


@pytest.fixture
def features():
    return torch.randn(4, SPLIT + WORDS, WIDTH, generator=torch.Generator().manual_seed(5))


def randomised(head):
    """All parameters are drawn anew, so that none is 0 or 1 and every one shows in the output."""
    generator = torch.Generator().manual_seed(7)
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return head


def norm(x, layer):
    mean, variance = x.mean(), x.var(unbiased=False)
    return (x - mean) / (variance + 1e-5).sqrt() * layer.weight + layer.bias


def affine(x, layer):
    return layer.weight @ x + layer.bias


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def two_layers(x, layers):
    first, between, _, second = layers
    return affine(gelu(norm(affine(x, first), between)), second)


def test_vqa_reads_the_class_token(features):
    head = randomised(HEADS["vqa"]())
    expected = [
        two_layers(torch.tanh(affine(norm(row[0], head.norm), head.pooler)), head.classifier) for row in features
    ]
    torch.testing.assert_close(head(features, {"image_positions": SPLIT}), torch.stack(expected))


def test_nlvr2_reads_both_images_and_the_text_with_each(features):
    head = randomised(HEADS["nlvr2"]())
    expected = []
    for left, right in ((features[0], features[2]), (features[1], features[3])):
        joined = torch.cat([left[0], left[SPLIT], right[0], right[SPLIT]])
        expected.append(two_layers(norm(joined, head.norm), head.classifier))
    torch.testing.assert_close(head(features, {"image_positions": SPLIT}), torch.stack(expected))


def test_image_classification_reads_the_mean_patch_without_the_class_token(features):
    head = randomised(HEADS["image_classification"]())
    images = features[:, :SPLIT]
    expected = [affine(norm(sum(row[1:]) / PATCHES, head.norm), head.classifier) for row in images]
    actual = head(images, {"image_positions": SPLIT})
    torch.testing.assert_close(actual, torch.stack(expected))
    torch.testing.assert_close(head(features, {"image_positions": SPLIT}), actual)  # words behind are not patches


@pytest.mark.parametrize("positions, projection", [(SPLIT, "image_projection"), (0, "text_projection")])
def test_retrieval_has_a_projection_for_each_tower(features, positions, projection):
    head = randomised(HEADS["retrieval"]())
    vectors = [getattr(head, projection).weight @ row[0] for row in features]
    expected = [vector / vector.square().sum().sqrt() for vector in vectors]
    torch.testing.assert_close(head(features, {"image_positions": positions}), torch.stack(expected))


@pytest.mark.parametrize(
    "build", [partial(VQAHead, WIDTH, 5), partial(NLVR2Head, WIDTH), partial(ImageClassificationHead, WIDTH, 7)]
)
def test_a_centered_head_reads_what_differs_from_the_mean(features, build):
    head, centered = randomised(build()).eval(), randomised(build(center=True)).eval()
    where = {"image_positions": SPLIT}
    torch.testing.assert_close(centered(features, where), head(features, where))  # no mean yet
    mean = torch.arange(centered.norm.running_mean.numel())
    centered.norm.running_mean.copy_(mean)
    head.norm.register_forward_pre_hook(lambda _, inputs: (inputs[0] - mean,))
    torch.testing.assert_close(centered(features, where), head(features, where))


@pytest.mark.parametrize("name", HEADS)
def test_gradients_reach_every_parameter_and_what_is_read(features, name):
    head = randomised(HEADS[name]())
    features.requires_grad_()
    for positions in (SPLIT, 0) if name == "retrieval" else (SPLIT,):
        head(features, {"image_positions": positions}).square().sum().backward(torch.tensor(0.5))
    if name == "retrieval":
        head.logit_scale.exp().backward()
    assert features.grad[:, 1 if name == "image_classification" else 0].abs().sum() > 0
    for parameter_name, parameter in head.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), parameter_name


@pytest.mark.parametrize("build", [VQAHead, NLVR2Head, ImageClassificationHead])
def test_one_class_is_refused(build):
    with pytest.raises(ValueError, match="at least 2 .*, the data have 1"):
        build(WIDTH, 1)


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
