"""A dense BEiT-3 equals TorchScale's own with the same weights: attention, whole model, gradients."""

import pytest
import torch
from beit3_models import IMAGE_POSITIONS, IMAGES, KINDS, beit3_batch, beit3_dictionary, small_beit3
from torchscale.architecture.config import EncoderConfig
from torchscale.component.multihead_attention import MultiheadAttention
from torchscale.component.multiway_network import set_split_position
from torchscale.model.BEiT3 import BEiT3

from mhmoe_fairseq.torchscale_ext.attention import KeyValueCache, MultiwaySelfAttention, visible_keys
from mhmoe_fairseq.torchscale_ext.settings import EncoderSettings

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # TorchScale's softmax is float32 whatever the input
DIM, HEADS, LENGTH = 32, 4, 7


def their_beit3(ours, **config):
    """TorchScale's model with the weights of ours."""
    theirs = BEiT3(
        EncoderConfig(
            encoder_layers=2,
            encoder_embed_dim=32,
            encoder_attention_heads=2,
            encoder_ffn_embed_dim=64,
            multiway=True,
            vocab_size=len(beit3_dictionary()),
            no_output_layer=True,
            img_size=IMAGES["img_size"],
            patch_size=IMAGES["patch_size"],
            max_source_positions=IMAGES["max_text_length"] + 2,
            **config,
        )
    ).double()
    theirs.load_state_dict(ours.beit3.state_dict())
    return theirs.eval()


def blocked(batch, attention):
    """unilm's mask for captioning: 1 where blocked."""
    if attention == "full":
        return None
    split = IMAGE_POSITIONS if "images" in batch else 0
    length = split + batch["text_tokens"].size(1)
    mask = torch.zeros(length, length, dtype=torch.long)
    mask[split:, split:] = torch.ones(length - split, length - split, dtype=torch.long).triu(1)
    mask[:split, split:] = 1
    return mask


@pytest.mark.parametrize(
    "kind, attention", [*((kind, "full") for kind in KINDS), ("pair", "caption"), ("text", "caption")]
)
@pytest.mark.parametrize("norms", [{}, {"no_subln": True}, {"deepnorm": True}], ids=str)
def test_the_dense_model_and_its_gradients(kind, attention, norms):
    ours = small_beit3("dense_beit3_tiny", **norms).double().eval()
    theirs = their_beit3(ours, subln=not norms, deepnorm="deepnorm" in norms)
    batch = beit3_batch(kind, [6, 4], masked=True)
    features, extra = ours(**batch, attention=attention)
    tokens = batch.get("text_tokens")
    expected = theirs(
        textual_tokens=tokens,
        visual_tokens=batch.get("images"),
        text_padding_position=None if tokens is None else tokens.eq(1),
        vision_masked_position=batch.get("masked_patches"),
        attn_mask=blocked(batch, attention),
    )["encoder_out"]
    real = torch.ones(features.shape[:2], dtype=torch.bool) if extra["padding_mask"] is None else ~extra["padding_mask"]
    torch.testing.assert_close(features[real], expected[real], **CLOSE)
    for output in (features, expected):
        (output[real] * torch.linspace(-1, 1, 32)).sum().backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    compared = 0
    for name, parameter in ours.beit3.named_parameters():
        if their_gradients[name] is None:
            assert parameter.grad is None, name
            continue
        expected_gradient = their_gradients[name]
        error = (parameter.grad - expected_gradient).abs().max()
        assert error <= 1e-4 * expected_gradient.abs().max() + 1e-6, (name, error)
        compared += 1
    assert compared > 30


def both_attentions(subln):
    torch.manual_seed(0)
    sizes = {"encoder_embed_dim": DIM, "encoder_attention_heads": HEADS, "subln": subln}
    ours = MultiwaySelfAttention(EncoderSettings(**sizes), DIM, HEADS).double().eval()
    theirs = (
        MultiheadAttention(EncoderConfig(multiway=True, **sizes), DIM, HEADS, self_attention=True, subln=subln)
        .double()
        .eval()
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("subln", [False, True])
@pytest.mark.parametrize("split", [0, 3, LENGTH])
def test_attention_of_two_modalities(split, subln):
    ours, theirs = both_attentions(subln)
    theirs.apply(set_split_position(-1 if split == LENGTH else split))
    padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    padding[0, 5:] = split < LENGTH
    inputs = torch.randn(2, LENGTH, DIM, dtype=torch.double)
    results = []
    for run in (
        lambda x: ours(x, split, visible=visible_keys("full", split, LENGTH, padding, x.device)),
        lambda x: theirs(x, x, x, key_padding_mask=padding)[0],
    ):
        x = inputs.clone().requires_grad_()
        output = run(x)
        (output * torch.linspace(-1, 1, DIM)).sum().backward()
        results.append((output, x.grad))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, **CLOSE)
    for (name, ours_p), theirs_p in zip(ours.named_parameters(), theirs.parameters()):
        assert (ours_p.grad is None) == (theirs_p.grad is None), name
        if ours_p.grad is not None:
            torch.testing.assert_close(ours_p.grad, theirs_p.grad, **CLOSE)


def test_cached_keys_equal_the_whole_sequence():
    ours, _ = both_attentions(True)
    x = torch.randn(2, LENGTH, DIM, dtype=torch.double)
    split = 3
    whole = ours(x, split, visible=visible_keys("caption", split, LENGTH, None, x.device))
    cache = KeyValueCache()
    parts = [ours(x[:, :split], split, cache=cache)]
    parts += [ours(x[:, index : index + 1], 0, cache=cache) for index in range(split, LENGTH)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-12)


def test_what_captions_see():
    seen = visible_keys("caption", 2, 5, None, torch.device("cpu")).int().tolist()
    assert seen == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    with pytest.raises(ValueError, match=r"attention \('causal'\) must be one of full, caption"):
        visible_keys("causal", 2, 5, None, torch.device("cpu"))


@pytest.mark.parametrize("attention", ["full", "caption"])
def test_every_query_sees_something(attention):
    """Some kernels of scaled_dot_product_attention make NaN of a query without keys."""
    padding = torch.tensor([[False, False, True], [True, True, True], [True, False, False]])
    visible = visible_keys(attention, 0, 3, padding, padding.device).expand(3, 1, 3, 3)
    assert visible.any(-1).all()
    assert not visible[0, 0, :2, 2].any()  # a real query sees no padding
