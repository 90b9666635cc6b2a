"""The decoder: MoE layers in it, padding, recomputation, incremental decoding, evaluation without side effects."""

import pytest
import torch
from decoder_oracle import PlainDecoder
from language_models import FAMILIES, SMALL, relative_error, small_model, token_rows
from moe_oracle import losses_of

from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.moe import RoutingStats

NO_POSITIONS = {"no_token_positional_embeddings": True}
POSITIONS = (
    {},
    {"decoder_learned_pos": True},
    {"rotary_embed": True, **NO_POSITIONS},
    {"xpos_rel_pos": True, **NO_POSITIONS},
    NO_POSITIONS,
)
RECIPE = {"activation_fn": "silu", "rms_norm": True, "no_bias": True, "rotary_embed": True}


def test_extras_have_one_entry_per_layer():
    model = small_model(decoder_layers=4)
    _, extra = model(token_rows([5, 5]))
    assert [output is None for output in extra["moe"]] == [True, False, True, False]
    assert losses_of(extra).requires_grad and extra["moe"][1].hidden.numel() == 0
    assert isinstance(extra["moe"][1].stats, RoutingStats)
    assert extra["moe"][1].stats.num_subtokens == 2 * 5 * 4


def test_statistics_are_overwritten_not_added():
    model = small_model()
    for _ in range(3):
        _, extra = model(token_rows([6, 2]))
    assert extra["moe"][1].stats.expert_load.sum() == (6 + 2) * 4 * 2  # real tokens * heads * top-k
    assert not extra["moe"][1].stats.expert_load.requires_grad


@pytest.mark.parametrize("routing", ["dropless", "capacity"])
def test_padding_changes_neither_scores_nor_losses(routing):
    model = small_model(mhmoe_routing=routing).double().eval()
    row = token_rows([5])
    padded = torch.cat([row, torch.full((1, 9), 1)], dim=1)
    scores, extra = model(row)
    padded_scores, padded_extra = model(padded)
    torch.testing.assert_close(padded_scores[:, :5], scores, rtol=0, atol=1e-12)
    torch.testing.assert_close(losses_of(padded_extra), losses_of(extra), rtol=0, atol=1e-12)
    assert torch.equal(padded_extra["moe"][1].stats.expert_load, extra["moe"][1].stats.expert_load)


def test_left_padding_with_a_mask_equals_none():
    model = small_model(no_token_positional_embeddings=True, rotary_embed=True).double().eval()
    row = token_rows([5])
    padded = torch.cat([torch.full((1, 3), 1), row], dim=1)
    scores, _ = model(padded, self_attn_padding_mask=padded.eq(1))
    torch.testing.assert_close(scores[:, 3:], model(row)[0], rtol=0, atol=1e-6)
    assert scores.isfinite().all()


@pytest.mark.parametrize(
    "flags",
    [
        {"mhmoe_precision": "fp32"},
        {"mhmoe_precision": "bf16"},
        {"mhmoe_quantize": "all", "mhmoe_shared_expert_dim": 16},
        {"mhmoe_quantize": "all", "mhmoe_routing": "capacity", **RECIPE},
    ],
    ids=str,
)
def test_recomputed_activations_give_the_same_gradients(flags):
    tokens = token_rows([7, 4])
    gradients = []
    for recompute in (False, True):
        model = small_model(checkpoint_activations=recompute, dropout=0.1, activation_dropout=0.1, **flags).train()
        torch.manual_seed(1)
        logits, extra = model(tokens)
        (logits.float().logsumexp(-1).sum() + losses_of(extra).sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert extra["moe"][1].stats.expert_load.sum() == 11 * 4 * 2
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_recomputation_saves_activations():
    def saved_bytes(recompute):
        model = small_model(checkpoint_activations=recompute, decoder_layers=4).train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            model(token_rows([16, 16]))
        return sum(sizes)

    assert saved_bytes(True) < 0.5 * saved_bytes(False)


@pytest.mark.parametrize("flags", [*POSITIONS, {"mhmoe_quantize": "all"}], ids=str)
@pytest.mark.parametrize("family", ["dense", "mhmoe"])
def test_incremental_decoding_equals_full_decoding(family, flags):
    model = small_model(f"{family}_lm_tiny", **flags).double().eval()
    tokens = token_rows([6, 6, 6])
    full, _ = model(tokens)
    state = {}
    steps = [model.decoder(tokens[:, : i + 1], incremental_state=state)[0] for i in range(6)]
    assert relative_error(torch.cat(steps, dim=1), full) < 1e-6


def test_a_prefix_may_come_at_once():
    model = small_model(rotary_embed=True).double().eval()
    tokens = token_rows([6, 6])
    full, _ = model(tokens)
    state = {"is_first_step": True}
    prefix, _ = model.decoder(tokens[:, :4], incremental_state=state)
    state["is_first_step"] = False
    rest = [model.decoder(tokens[:, : i + 1], incremental_state=state)[0] for i in (4, 5)]
    assert relative_error(torch.cat([prefix, *rest], dim=1), full) < 1e-6


def test_incremental_decoding_with_padded_rows():
    model = small_model().double().eval()
    tokens = token_rows([6, 4])
    state = {}
    for length in range(1, 7):
        step, extra = model.decoder(tokens[:, :length], incremental_state=state)
        real = int(tokens[:, length - 1].ne(1).sum())
        assert extra["moe"][1].stats.num_subtokens == real * 4
    torch.testing.assert_close(step[0, 0], model(tokens[:1])[0][0, -1], rtol=1e-6, atol=1e-6)


def test_beams_are_reordered():
    model = small_model().double().eval()
    tokens, order = token_rows([5, 5, 5]), torch.tensor([2, 0, 0])
    state = {"is_first_step": False}
    for length in range(1, 5):
        model.decoder(tokens[:, :length], incremental_state=state)
    model.decoder.reorder_incremental_state_scripting(state, order)
    reordered = tokens[order]
    step, _ = model.decoder(reordered, incremental_state=state)
    torch.testing.assert_close(step[:, 0], model(reordered)[0][:, -1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_depend_on_batching(family):
    model = small_model(f"{family}_lm_tiny").double().eval()
    rows = token_rows([9, 3, 7, 1, 5, 9, 2])
    together = torch.log_softmax(model(rows)[0], -1)
    for row, scores in zip(rows, together):
        length = int(row.ne(1).sum())
        alone = torch.log_softmax(model(row[None, :length])[0], -1)[0]
        torch.testing.assert_close(scores[:length], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_writes_no_parameter(family, training):
    model = small_model(f"{family}_lm_tiny").train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(token_rows([6, 3]))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_features_and_hidden_states():
    model = small_model().eval()
    tokens = token_rows([4, 4])
    features, extra = model.extract_features(tokens, return_all_hiddens=True)
    assert features.shape == (2, 4, 32) and len(extra["inner_states"]) == 3
    torch.testing.assert_close(model.output_layer(features), model(tokens)[0])


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
