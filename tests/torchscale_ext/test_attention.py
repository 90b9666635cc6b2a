"""Our attention equals TorchScale's, in every mode both have."""

import pytest
import torch
from torchscale.component.multihead_attention import MultiheadAttention

from mhmoe_fairseq.torchscale_ext.attention import KeyValueCache, SelfAttention, _attend, visible_keys
from mhmoe_fairseq.torchscale_ext.settings import DecoderSettings

DIM, HEADS, BATCH, LENGTH = 32, 4, 3, 7
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # TorchScale's softmax is float32 whatever the input


def both(seed=0, **settings):
    """Our attention and TorchScale's with the same weights, in double precision."""
    torch.manual_seed(seed)
    settings = DecoderSettings(decoder_embed_dim=DIM, decoder_attention_heads=HEADS, **settings)
    ours = SelfAttention(settings, DIM, HEADS).double().eval()
    theirs = MultiheadAttention(settings, DIM, HEADS, self_attention=True, subln=settings.subln).double().eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def causal_mask(length=LENGTH):
    return torch.full((length, length), float("-inf"), dtype=torch.double).triu(1)


@pytest.mark.parametrize("subln", [False, True])
@pytest.mark.parametrize("xpos", [False, True])
def test_full_and_causal_attention_and_gradients(subln, xpos):
    ours, theirs = both(subln=subln, xpos_rel_pos=xpos)
    for causal in (False, True):
        inputs = torch.randn(BATCH, LENGTH, DIM, dtype=torch.double)
        results = []
        for module in (ours, theirs):
            x = inputs.clone().requires_grad_()
            module.zero_grad()
            mask = causal_mask() if causal else None
            output = ours(x, is_causal=causal) if module is ours else theirs(x, x, x, attn_mask=mask)[0]
            (output * torch.linspace(-1, 1, DIM)).sum().backward()
            results.append((output, x.grad, module.v_proj.weight.grad, module.q_proj.weight.grad))
        for actual, expected in zip(*results):
            torch.testing.assert_close(actual, expected, **CLOSE)


def test_a_causal_mask_tensor_is_the_causal_mode():
    ours, _ = both()
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.double)
    visible = visible_keys("caption", 0, LENGTH, None, x.device)
    torch.testing.assert_close(ours(x, visible=visible), ours(x, is_causal=True))


@pytest.mark.parametrize("causal", [False, True])
def test_padded_keys_are_masked(causal):
    ours, theirs = both()
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.double)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[0, 4:] = True
    visible = visible_keys("caption" if causal else "full", 0, LENGTH, padding, x.device)
    actual = ours(x, visible=visible, is_causal=causal)
    expected, _ = theirs(x, x, x, key_padding_mask=padding, attn_mask=causal_mask() if causal else None)
    torch.testing.assert_close(actual[~padding], expected[~padding], **CLOSE)
    assert not torch.allclose(actual[0], ours(x, is_causal=causal)[0])


def test_a_query_without_any_key_is_finite():
    ours, theirs = both()
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.double)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[0, :2] = True  # left padding: the first two queries see nothing
    assert ours(x, visible=visible_keys("caption", 0, LENGTH, padding, x.device)).isfinite().all()
    assert theirs(x, x, x, key_padding_mask=padding, attn_mask=causal_mask())[0].isnan().any()


@pytest.mark.parametrize("xpos", [False, True])
@pytest.mark.parametrize("subln", [False, True])
def test_incremental_steps(xpos, subln):
    ours, theirs = both(xpos_rel_pos=xpos, subln=subln)
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.double)
    cache, their_state = KeyValueCache(), {}
    for step in range(LENGTH):
        token = x[:, step : step + 1]
        actual = ours(token, cache=cache)
        expected, _ = theirs(token, token, token, incremental_state=their_state)
        torch.testing.assert_close(actual, expected, **CLOSE)
    assert len(cache) == LENGTH


@pytest.mark.parametrize("positions", [{}, {"xpos_rel_pos": True}, {"rotary_embed": True}])
def test_steps_equal_the_whole_sequence(positions):
    ours, _ = both(**positions)
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.double)
    whole, cache = ours(x, is_causal=True), KeyValueCache()
    prefix = ours(x[:, :3], cache=cache, is_causal=True)
    steps = [ours(x[:, i : i + 1], cache=cache) for i in range(3, LENGTH)]
    torch.testing.assert_close(torch.cat([prefix, *steps], dim=1), whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "length, training, decoding, half, dtype",
    [
        (20, True, False, torch.bfloat16, None),
        (20, True, False, torch.float16, torch.float32),
        (300, True, False, torch.bfloat16, torch.bfloat16),
        (20, False, False, torch.bfloat16, torch.bfloat16),
        (20, False, True, torch.bfloat16, torch.float32),
    ],
)
def test_the_kernel_is_called_where_and_as_it_is_fast(monkeypatch, length, training, decoding, half, dtype):
    """In half precision on a CPU; the input is rounded once for three maps."""
    ours, _ = both()
    ours = ours.float()
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *qkv, **more: seen.extend(qkv) or attend(*qkv, **more),
    )
    x, inputs = torch.randn(BATCH, length, DIM), []
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(ours, name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    exact = ours(x, is_causal=True)
    seen.clear(), inputs.clear()
    with torch.autocast("cpu", dtype=half), torch.set_grad_enabled(training):
        found = ours(x, is_causal=True, cache=KeyValueCache() if decoding else None)
    assert [tensor.dtype for tensor in seen] == [dtype] * 3 if dtype else not seen
    assert found.dtype == half and len({tensor.data_ptr() for tensor in inputs}) == 1
    torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("mask", ["none", "causal", "padding", "caption"])
def test_in_bf16_errors_are_no_larger_than_torchscales(mask):
    """Outputs and gradients against float64, where weights are at hand."""
    ours, theirs = both()
    x = torch.randn(BATCH, 40, DIM, dtype=torch.double)
    padding = torch.arange(40) >= torch.tensor([40, 30, 5])[:, None]
    caption = visible_keys("caption", 8, 40, None, x.device)
    ways = {  # ours and theirs
        "none": ({}, {}),
        "causal": ({"is_causal": True}, {"attn_mask": causal_mask(40)}),
        "padding": ({"visible": visible_keys("full", 0, 40, padding, x.device)}, {"key_padding_mask": padding}),
        "caption": ({"visible": caption}, {"attn_mask": torch.zeros(40, 40).masked_fill(~caption, float("-inf"))}),
    }

    def run(attention, dtype):
        attention, inputs = attention.to(dtype), x.clone().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            if attention is ours:
                output = attention(inputs, **ways[mask][0])
            else:
                output = attention(inputs, inputs, inputs, **ways[mask][1])[0]
        # Not by the keys' bias: softmax takes no notice of it.
        parameters = [parameter for name, parameter in attention.named_parameters() if name != "k_proj.bias"]
        gradients = torch.autograd.grad((output.to(dtype) * x.sin()).sum(), [inputs, *parameters])
        return [output.double(), *(gradient.double() for gradient in gradients)]

    exact = run(ours, torch.double)
    found, usual = (
        [((one - other).norm() / other.norm()).item() for one, other in zip(run(of, torch.float32), exact)]
        for of in (ours, theirs)
    )
    assert all(1e-4 < ours < max(1.25 * theirs, 0.01) for ours, theirs in zip(found, usual)), (found, usual)


def test_dropout_of_weights_in_bf16():
    zeros, values = torch.zeros(64, 1, 50, 50, dtype=torch.bfloat16), torch.eye(50, dtype=torch.bfloat16)
    torch.manual_seed(0)
    weights = _attend(zeros, zeros, values.expand_as(zeros).requires_grad_(), dropout=0.25).float() * 50 * 0.75
    assert set(weights.round(decimals=1).unique().tolist()) == {0.0, 1.0}
    assert abs(weights.mean().item() - 0.75) < 0.005  # 160,000 draws: five deviations
