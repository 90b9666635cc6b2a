"""Whole decoders against the plain formula of their options."""

import pytest
import torch
from decoder_oracle import PlainDecoder
from language_models import SMALL, small_model, token_rows
from moe_oracle import losses_of

from mhmoe_fairseq.models.architectures import architecture_options

RECIPE = {"activation_fn": "silu", "rms_norm": True, "no_bias": True, "rotary_embed": True}
NO_POSITIONS = {"no_token_positional_embeddings": True}
MODELS = [
    ("dense_lm_tiny", {}),
    ("dense_lm_tiny", {"activation_fn": "relu", "no_subln": True, "decoder_learned_pos": True}),
    ("dense_lm_tiny", {"activation_fn": "silu", "layernorm_embedding": True, "no_scale_embedding": True}),
    ("dense_lm_tiny", {"rms_norm": True, "subln": True, "no_share_decoder_input_output_embed": True, **NO_POSITIONS}),
    ("dense_lm_tiny", {"deepnorm": True, "decoder_layers": 3}),
    ("dense_lm_tiny", {"deepnorm": True, "rms_norm": True, "layernorm_embedding": True}),
    ("dense_lm_tiny", {**RECIPE, **NO_POSITIONS, "subln": True}),
    ("smoe_lm_tiny", {"activation_fn": "relu", "decoder_layers": 4}),
    ("xmoe_lm_tiny", {"deepnorm": True, "moe_freq": 1}),
    ("mhmoe_lm_tiny", {}),
    ("mhmoe_lm_tiny", {**RECIPE, **NO_POSITIONS, "mhmoe_shared_expert_dim": 24}),
]


@pytest.mark.parametrize("arch, flags", MODELS, ids=str)
def test_logits_and_auxiliary_losses_are_those_of_the_formula(arch, flags):
    # The computed tables are float32; everything else is compared in double.
    model = small_model(arch, **flags).double().eval()
    for parameter in model.parameters():  # no norm's weight is 1 and no bias 0
        parameter.data += 0.05 * torch.randn_like(parameter)
    filled = {"mhmoe_budget": "none"} if arch.startswith("mhmoe") else {}
    options = architecture_options(arch, **{**SMALL, **filled, **flags})
    tokens = token_rows([7, 7])
    plain = PlainDecoder(model.decoder, options)
    with torch.no_grad():
        (actual, extra), expected = model(tokens), plain.logits(tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    losses = [] if arch.startswith("dense") else losses_of(extra)
    assert len(losses) == len(plain.losses)
    for own, by_hand in zip(losses, plain.losses):
        torch.testing.assert_close(own, by_hand, rtol=1e-4, atol=1e-5)
