"""The official recipe's flags do what they say: each test fails if its flag is ignored."""

import pytest
import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from language_models import small_dictionary, small_model, token_rows
from torch import nn

from mhmoe_fairseq.models.language_model import build_language_model
from mhmoe_fairseq.torchscale_ext.attention import SelfAttention
from mhmoe_fairseq.torchscale_ext.feed_forward import GatedNetwork
from mhmoe_fairseq.torchscale_ext.static_xmoe import StaticXMoE

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:hydra", "ignore:\n:UserWarning")

RECIPE = (
    "--moe-expert-count 8 --moe-freq 2 --moe-top-k 1 --moe-gating-use-fp32 --moe-normalize-gate-prob-before-dropping "
    "--moe-eval-capacity-token-fraction -1.0 --criterion moe_cross_entropy --moe-gate-loss-wt 0.01 "
    "--moe-gate-loss-combine-method sum --mhmoe-heads-number 4 --moe-ffn-dim 2048 --activation-fn silu --rotary-embed "
    "--rms-norm --no-bias --no-token-positional-embeddings --no-scale-embedding --arch mhmoe_lm_base "
    "--mhmoe-router linear --mhmoe-routing capacity"
)


def recipe(*changes, without=()):
    """The model configuration that fairseq-train makes of the recipe, and the criterion's."""
    words = RECIPE.split()
    for flag in without:
        words.remove(flag)
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, ["data", "--task", "mhmoe_language_modeling", *words, *changes])
    config = convert_namespace_to_omegaconf(args)
    return config.model, config.criterion


def model_of(config, device="meta"):
    with torch.device(device):
        return build_language_model(config, small_dictionary())


def layer_config(*changes, without=()):
    return model_of(recipe(*changes, without=without)[0]).decoder.layers[1].moe_layer.config


@pytest.mark.parametrize(
    "field, expected, change",
    [
        ("num_experts", 8, ["--moe-expert-count", "4"]),
        ("top_k", 1, ["--moe-top-k", "2"]),
        ("eval_capacity_fraction", -1.0, ["--moe-eval-capacity-token-fraction", "0.5"]),
        ("num_heads", 4, ["--mhmoe-heads-number", "8"]),
        ("expert_ffn_dim", 2048, ["--moe-ffn-dim", "1024"]),
        ("activation", "swiglu", ["--activation-fn", "gelu"]),
        ("router", "linear", ["--mhmoe-router", "xmoe"]),
    ],
)
def test_flags_with_a_value_reach_the_layer(field, expected, change):
    assert getattr(layer_config(), field) == expected
    assert getattr(layer_config(*change), field) != expected


def test_moe_freq_places_the_layers():
    assert [layer.is_moe_layer for layer in model_of(recipe()[0]).decoder.layers] == [False, True] * 6
    every_third = model_of(recipe("--moe-freq", "3")[0])
    assert [layer.is_moe_layer for layer in every_third.decoder.layers] == [False, False, True] * 4


def test_moe_gating_use_fp32():
    assert layer_config().gating_fp32
    assert not layer_config(without=["--moe-gating-use-fp32"]).gating_fp32
    # Seen from outside: under bfloat16 the router's logits stay in float32.
    dtypes = []
    for fp32 in (True, False):
        model = small_model(moe_gating_use_fp32=fp32, mhmoe_precision="bf16").eval()
        model.decoder.layers[1].moe_layer.router.register_forward_hook(lambda m, a, logits: dtypes.append(logits.dtype))
        model(token_rows([5]))
    assert dtypes == [torch.float32, torch.bfloat16]


def test_moe_normalize_gate_prob_before_dropping():
    assert layer_config("--moe-top-k", "2").normalize_before_dropping
    off = layer_config("--moe-top-k", "2", without=["--moe-normalize-gate-prob-before-dropping"])
    assert not off.normalize_before_dropping
    # Seen from outside: where second experts overflow, the gate weights differ.
    flags = {"mhmoe_routing": "capacity", "mhmoe_router": "linear", "moe_eval_capacity_token_fraction": 0.2}
    before, after = (
        small_model(moe_normalize_gate_prob_before_dropping=flag, **flags).eval()(token_rows([30]))[0]
        for flag in (True, None)
    )
    assert not torch.allclose(before, after)


def test_moe_eval_capacity_token_fraction():
    # -1: the training rule, here 8 sub-tokens' share of 8 experts, so that a crowded expert drops some.
    dropped = [
        small_model(mhmoe_routing="capacity", moe_eval_capacity_token_fraction=fraction)
        .eval()(token_rows([30]))[1]["moe"][1]
        .stats.dropped.item()
        for fraction in (-1.0, 1.0)
    ]
    assert dropped[0] > 0 and dropped[1] == 0


def test_criterion_flags():
    _, criterion = recipe()
    assert criterion._name == "moe_cross_entropy"
    assert (criterion.moe_gate_loss_wt, str(criterion.moe_gate_loss_combine_method)) == (0.01, "sum")
    _, other = recipe("--moe-gate-loss-wt", "0.5", "--moe-gate-loss-combine-method", "average")
    assert (other.moe_gate_loss_wt, str(other.moe_gate_loss_combine_method)) == (0.5, "average")


def test_activation_fn_silu_is_swiglu_in_dense_layers_too():
    assert isinstance(model_of(recipe()[0]).decoder.layers[0].ffn, GatedNetwork)


def test_rotary_embed():
    model = model_of(recipe()[0])
    assert all(layer.self_attn.rotary is not None for layer in model.decoder.layers)
    assert model_of(recipe(without=["--rotary-embed"])[0]).decoder.layers[0].self_attn.rotary is None
    # Seen from outside: without any position the order of earlier words does not matter to the last one.
    flags = {"no_token_positional_embeddings": True, "decoder_layers": 1}
    swapped, row = torch.tensor([[6, 5, 7]]), torch.tensor([[5, 6, 7]])
    for rotary in (True, False):
        model = small_model("dense_lm_tiny", rotary_embed=rotary, **flags).eval()
        same = torch.allclose(model(row)[0][:, -1], model(swapped)[0][:, -1], atol=1e-5)
        assert same is not rotary


def test_rms_norm():
    kinds = {type(module) for module in model_of(recipe()[0]).modules()}
    assert nn.RMSNorm in kinds and nn.LayerNorm not in kinds
    assert nn.RMSNorm not in {type(module) for module in model_of(recipe(without=["--rms-norm"])[0]).modules()}


def test_no_bias():
    assert [name for name, _ in model_of(recipe()[0]).named_parameters() if "bias" in name] == []
    names = [name for name, _ in model_of(recipe(without=["--no-bias"])[0]).named_parameters()]
    for part in ("q_proj.bias", "ffn.fc1.bias", "experts.fc1_bias", "head_projection.0.bias"):
        assert any(part in name for name in names), part


def test_no_token_positional_embeddings():
    assert model_of(recipe()[0]).decoder.embed_positions is None
    assert model_of(recipe(without=["--no-token-positional-embeddings"])[0]).decoder.embed_positions is not None


def test_no_scale_embedding():
    assert model_of(recipe()[0]).decoder.embed_scale == 1.0
    assert model_of(recipe(without=["--no-scale-embedding"])[0]).decoder.embed_scale == pytest.approx(768**0.5)


def test_arch_gives_the_papers_size():
    model = model_of(recipe()[0])
    assert len(model.decoder.layers) == 12 and model.decoder.embed_dim == 768
    assert all(isinstance(layer.self_attn, SelfAttention) for layer in model.decoder.layers)


def test_routing_flag_chooses_the_layer():
    assert layer_config().routing == "capacity"
    flags = {"moe_top_k": 1, "mhmoe_router": "linear"}
    static = small_model("smoe_lm_tiny", mhmoe_routing="torchscale", **flags)
    assert isinstance(static.decoder.layers[1].moe_layer, StaticXMoE)
    assert small_model("smoe_lm_tiny", **flags).decoder.layers[1].moe_layer.config.routing == "dropless"
