"""Our attention equals TorchScale's, in every mode both have."""

import pytest
import torch
from torchscale.component.multihead_attention import MultiheadAttention

from mhmoe_fairseq.torchscale_ext.attention import SelfAttention
from mhmoe_fairseq.torchscale_ext.settings import DecoderSettings

DIM, HEADS, BATCH, LENGTH = 32, 4, 3, 7
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # TorchScale's softmax is float32 whatever the input


def both(seed=0, **settings):
    """Our attention and TorchScale's with the same weights, in double precision."""
    torch.manual_seed(seed)
    settings = DecoderSettings(decoder_embed_dim=DIM, decoder_attention_heads=HEADS, **settings)
    ours = SelfAttention(settings).double().eval()
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
        for module, kwargs in (
            (ours, {"is_causal": causal}),
            (theirs, {"attn_mask": causal_mask() if causal else None}),
        ):
            x = inputs.clone().requires_grad_()
            module.zero_grad()
            output, _ = module(x, x, x, **kwargs)
            (output * torch.linspace(-1, 1, DIM)).sum().backward()
            results.append((output, x.grad, module.v_proj.weight.grad, module.q_proj.weight.grad))
        for actual, expected in zip(*results):
            torch.testing.assert_close(actual, expected, **CLOSE)


def test_a_causal_mask_tensor_is_the_causal_mode():
    ours, _ = both()
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.double)
    torch.testing.assert_close(ours(x, attn_mask=causal_mask())[0], ours(x, is_causal=True)[0])


@pytest.mark.parametrize("causal", [False, True])
def test_padded_keys_are_masked(causal):
    ours, theirs = both()
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.double)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[0, 4:] = True
    actual, _ = ours(x, key_padding_mask=padding, is_causal=causal)
    expected, _ = theirs(x, x, x, key_padding_mask=padding, attn_mask=causal_mask() if causal else None)
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert not torch.allclose(actual[0], ours(x, is_causal=causal)[0][0])


def test_a_query_without_any_key_is_finite():
    ours, theirs = both()
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.double)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[0, :2] = True  # left padding: the first two queries see nothing
    actual, _ = ours(x, key_padding_mask=padding, is_causal=True)
    assert actual.isfinite().all()
    assert theirs(x, x, x, key_padding_mask=padding, attn_mask=causal_mask())[0].isnan().any()


@pytest.mark.parametrize("xpos", [False, True])
@pytest.mark.parametrize("subln", [False, True])
def test_incremental_steps(xpos, subln):
    ours, theirs = both(xpos_rel_pos=xpos, subln=subln)
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.double)
    state, their_state = {}, {}
    for step in range(LENGTH):
        token = x[:, step : step + 1]
        actual, _ = ours(token, incremental_state=state)
        expected, _ = theirs(token, token, token, incremental_state=their_state)
        torch.testing.assert_close(actual, expected, **CLOSE)
    assert state["prev_key"].shape == (BATCH, HEADS, LENGTH, DIM // HEADS)


@pytest.mark.parametrize("positions", [{}, {"xpos_rel_pos": True}, {"rotary_embed": True}])
def test_steps_equal_the_whole_sequence(positions):
    ours, _ = both(**positions)
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.double)
    whole, _ = ours(x, is_causal=True)
    state = {}
    prefix, _ = ours(x[:, :3], incremental_state=state, is_causal=True)
    steps = [ours(x[:, i : i + 1], incremental_state=state)[0] for i in range(3, LENGTH)]
    torch.testing.assert_close(torch.cat([prefix, *steps], dim=1), whole, rtol=1e-6, atol=1e-9)


def test_dropout_acts_in_training_only():
    settings = DecoderSettings(decoder_embed_dim=DIM, decoder_attention_heads=HEADS, attention_dropout=0.5)
    attention = SelfAttention(settings)
    x = torch.randn(1, LENGTH, DIM)
    assert not torch.equal(attention(x)[0], attention(x)[0])
    attention.eval()
    assert torch.equal(attention(x)[0], attention(x)[0])


def test_no_bias_and_rms_norm_reach_every_part():
    settings = DecoderSettings(
        decoder_embed_dim=DIM, decoder_attention_heads=HEADS, no_bias=True, rms_norm=True, subln=True
    )
    attention = SelfAttention(settings)
    assert [name for name, _ in attention.named_parameters() if "bias" in name] == []
    assert isinstance(attention.inner_attn_ln, torch.nn.RMSNorm)
