"""Fine-tuning heads against their formulas, row by row."""

import math
from functools import partial

import pytest
import torch

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


def test_initial_values_are_those_of_beit3():
    torch.manual_seed(0)
    assert HEADS["retrieval"]().logit_scale.exp().item() == pytest.approx(1 / 0.07)
    wide = VQAHead(256, 300)
    assert wide.classifier[3].weight.std().item() == pytest.approx(0.02, rel=0.05)
    statements = NLVR2Head(256)
    small = (statements.classifier[3], ImageClassificationHead(256, 300).classifier)
    assert all(layer.weight.abs().max() < 2e-3 for layer in small)
    assert not any(layer.bias.any() for layer in (*small, wide.pooler, wide.classifier[0], statements.classifier[0]))


def test_hidden_units_for_statements_start_different():
    weight = NLVR2Head(256).classifier[0].weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_untrained_one_answer_of_all_is_expected():
    assert VQAHead(256, 300).classifier[3].bias.sigmoid().sum().item() == pytest.approx(1)


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
