"""``--mhmoe-quantize``: which maps of which models are ternary, and that every way of running one computes the same."""

import re

import pytest
import torch
from beit3_models import beit3_batch, small_beit3
from language_models import FAMILIES, small_model, token_rows
from torch import nn

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.moe.quantize import packed_state, ternary_names

EXPERTS = {"moe_layer.experts.fc1_weight", "moe_layer.experts.fc2_weight"}
ATTENTION = {f"self_attn.{name}_proj.weight" for name in "q k v out".split()}
DENSE = {"ffn.fc1.weight", "ffn.fc2.weight"}
SHARED = {"moe_layer.shared_expert.fc1.weight", "moe_layer.shared_expert.fc2.weight"}
ROWS = token_rows([8, 6, 8])


def quantized_parts(model: nn.Module) -> set[str]:
    """Names within a layer, of one modality."""
    return {re.sub(r".*layers\.\d+\.|\b[AB]\.", "", name) for name in ternary_names(model)}


@pytest.mark.parametrize("kind", ["lm", "beit3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_quantized(family, kind):
    build = small_model if kind == "lm" else small_beit3
    flags = {} if family == "dense" else {"mhmoe_shared_expert_dim": 16}
    assert not quantized_parts(build(f"{family}_{kind}_tiny", **flags))
    experts = set() if family == "dense" else EXPERTS | SHARED
    if experts:
        assert quantized_parts(build(f"{family}_{kind}_tiny", mhmoe_quantize="experts", **flags)) == experts
    everything = build(f"{family}_{kind}_tiny", mhmoe_quantize="all", **flags)
    assert quantized_parts(everything) == experts | ATTENTION | DENSE
    maps = {name for name, part in everything.named_modules() if type(part) is nn.Linear}
    left = r"router|projection|text_head|image_head"
    assert maps and all(re.search(left, name) for name in maps), maps


def test_experts_need_experts():
    with pytest.raises(UserError, match=r"--mhmoe-quantize \(experts\) needs MoE layers, but the model is dense .*all"):
        small_model("dense_lm_tiny", mhmoe_quantize="experts")
    with pytest.raises(UserError, match=r"--mhmoe-quantize \('all'\) cannot be combined with --mhmoe-routing"):
        small_model("smoe_lm_tiny", mhmoe_quantize="all", mhmoe_routing="torchscale")


def test_the_parameters_are_those_of_the_same_model_without():
    plain, ternary = (small_model("mhmoe_lm_tiny", activation_fn="silu", mhmoe_quantize=of) for of in ("none", "all"))
    one, other = plain.state_dict(), ternary.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["dense", "mhmoe"])
def test_a_model_for_evaluation_has_rounded_once(family, precision):
    model = small_model(f"{family}_lm_tiny", mhmoe_quantize="all", mhmoe_precision=precision).eval()
    with torch.no_grad():
        before = model(ROWS)[0]
        model.make_generation_fast_()
        assert torch.equal(model(ROWS)[0], before)
    attention = model.decoder.layers[0].self_attn.q_proj
    assert attention.is_fixed and attention.weight.unique().numel() == 3
    assert attention.weight.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


def test_packed_weights_of_whole_models_load_as_they_were():
    for build, arch, batch in (
        (small_model, "mhmoe_lm_tiny", {"src_tokens": ROWS}),
        (small_beit3, "mhmoe_beit3_tiny", beit3_batch("pair", [7, 5, 7])),
    ):
        batch = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
        model, other = (build(arch, seed=seed, mhmoe_quantize="all").eval() for seed in (0, 1))
        other.load_state_dict(packed_state(model.state_dict(), ternary_names(model)))
        with torch.no_grad():
            assert torch.equal(other(**batch)[0], model(**batch)[0])
