"""The initial values of every parameter of every kind of model against the rule that is stated for it.

A parameter that no rule names, or two, fails; so does a rule that no model has a parameter for.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beit3_models import beit3_dictionary
from drawn_values import ONES, ZEROS, Values, assert_follows, uniform, xavier
from language_models import small_dictionary
from torch import nn

from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.beit3 import build_beit3
from mhmoe_fairseq.models.heads import ImageClassificationHead, NLVR2Head, RetrievalHead, VQAHead
from mhmoe_fairseq.models.language_model import build_language_model

WORDS, ANSWERS, CLASSES, SHARED = 300, 40, 30, 48
D, F, LAYERS = 128, 512, 4  # of the architectures *_tiny
SWIGLU = {"activation_fn": "silu", "rms_norm": True}
MODELS = {
    "dense": ("dense_lm_tiny", {}),
    "dense swiglu": ("dense_lm_tiny", {**SWIGLU, "subln": True, "layernorm_embedding": True}),
    "dense deepnorm": ("dense_lm_tiny", {"deepnorm": True, "decoder_learned_pos": True}),
    "dense untied": ("dense_lm_tiny", {"no_share_decoder_input_output_embed": True, "no_bias": True}),
    "smoe": ("smoe_lm_tiny", {"rms_norm": True}),
    "xmoe p1": ("xmoe_lm_tiny", {"mhmoe_router_preset": "p1"}),
    "mhmoe": ("mhmoe_lm_tiny", {}),
    "mhmoe swiglu": ("mhmoe_lm_tiny", {**SWIGLU, "mhmoe_shared_expert_dim": SHARED, "mhmoe_projection_layers": 2}),
    "mhmoe swiglu7": ("mhmoe_lm_tiny", {"activation_fn": "swiglu7", "mhmoe_merge_norm": True}),
    "mhmoe deepnorm": ("mhmoe_lm_tiny", {"deepnorm": True, "mhmoe_shared_expert_dim": SHARED}),
    "torchscale smoe": ("smoe_lm_tiny", {"mhmoe_routing": "torchscale"}),
    "torchscale xmoe": ("xmoe_lm_tiny", {"mhmoe_routing": "torchscale", "moe_top1_expert": True}),
    "lory": ("smoe_lm_tiny", {"mhmoe_routing": "lory"}),
    "beit3 smear": ("smoe_beit3_tiny", {"mhmoe_routing": "smear"}),
    "beit3 dense": ("dense_beit3_tiny", {}),
    "beit3 deepnorm": ("dense_beit3_tiny", {"deepnorm": True, "activation_fn": "silu"}),
    "beit3 smoe": ("smoe_beit3_tiny", {"layernorm_embedding": True}),
    "beit3 separate": ("mhmoe_beit3_tiny", {"mhmoe_modality_experts": "separate", "rms_norm": True, "subln": True}),
}


BEIT = Values("normal", 0.02)
EMBEDDING = Values("normal", D**-0.5, zero_row=1)
AB = r"(?:\.[AB])?"  # a modality's
EXPERTS = rf"moe_layer{AB}\.experts\.{{}}"
# Rules by the end of a parameter's name; d and f are the widths of a sub-token and inside an expert.
RULES: dict[str, Values | Callable[[int, int], Values]] = {
    rf"self_attn\.[qkv]_proj{AB}\.(weight|bias)": uniform(D),
    rf"self_attn\.out_proj{AB}\.(weight|bias)": uniform(D),
    rf"layers\.\d\.ffn{AB}\.(fc1|gate)\.(weight|bias)": uniform(D),
    rf"layers\.\d\.ffn{AB}\.fc2\.(weight|bias)": uniform(F),
    rf"(layer_norm|layernorm|layernorm_embedding|inner_attn_ln){AB}\.weight": ONES,
    rf"(layer_norm|layernorm|layernorm_embedding|inner_attn_ln){AB}\.bias": ZEROS,
    EXPERTS.format("(fc1|gate)_(weight|bias)"): lambda d, f: uniform(d),
    EXPERTS.format("fc2_(weight|bias)"): lambda d, f: uniform(f),
    EXPERTS.format("layernorm_weight"): ONES,
    EXPERTS.format("layernorm_bias"): ZEROS,
    rf"moe_layer{AB}\.router\.(reduction\.)?weight": lambda d, f: uniform(d),
    r"moe_layer\.first_E": ZEROS,
    r"moe_layer\.router\.input_scale": ONES,
    r"moe_layer\.router\.expert_weight": Values("normal", 0.01),
    r"moe_layer\.router\.expert_scale": Values("constant", 0.01),
    r"moe_layer\.router\.(input|expert)_shift": ZEROS,
    rf"moe_layer{AB}\.router\.expert_embedding": Values("orthogonal", 1.5),
    r"moe_layer\.router\.temperature": Values("constant", 0.3),
    rf"moe_layer{AB}\.head_projection\.\d\.weight": xavier(D, 1 / math.sqrt(2)),
    rf"moe_layer{AB}\.head_projection\.\d\.bias": uniform(D),
    rf"moe_layer{AB}\.merge_projection\.\d\.weight": xavier(D, 1.0),
    rf"moe_layer{AB}\.merge_projection\.\d\.bias": ZEROS,
    r"moe_layer\.merge_norm\.weight": ONES,
    r"moe_layer\.shared_expert\.(fc1|gate)\.(weight|bias)": uniform(D),
    r"moe_layer\.shared_expert\.fc2\.(weight|bias)": uniform(SHARED),
    r"moe_layer\.layer\.gate\.wg(_reduction)?\.weight": uniform(D),
    r"moe_layer\.layer\.gate\.wg": Values("orthogonal", 0.32),
    r"moe_layer\.layer\.experts\.\d\.fc1\.(weight|bias)": uniform(D),
    r"moe_layer\.layer\.experts\.\d\.fc2\.(weight|bias)": uniform(F),
    r"decoder\.embed_tokens\.weight": EMBEDDING,
    r"decoder\.embed_positions\.weight": Values("normal", D**-0.5),
    r"decoder\.output_projection\.weight": Values("normal", D**-0.5),
    r"classification_heads\.classes\.weight": BEIT,
    r"classification_heads\.classes\.bias": ZEROS,
    r"beit3\.text_embed\.weight": EMBEDDING,
    r"beit3\.vision_embed\.proj\.(weight|bias)": uniform(3 * 16 * 16),
    r"beit3\.vision_embed\.(mask|cls)_token": BEIT,
    r"beit3\.encoder\.embed_positions\.[AB]\.weight": BEIT,
    r"^(text|image)_head\.weight": BEIT,
    r"^(text|image)_head\.bias": ZEROS,
    r"heads\.\w+\.norm\.weight|heads\.\w+\.classifier\.1\.weight": ONES,
    r"heads\.\w+\.norm\.bias|heads\.\w+\.classifier\.1\.bias": ZEROS,
    r"heads\.vqa\.(pooler|classifier\.[03])\.weight": BEIT,
    r"heads\.vqa\.(pooler|classifier\.0)\.bias": ZEROS,
    r"heads\.vqa\.classifier\.3\.bias": Values("constant", -math.log(ANSWERS - 1)),
    r"heads\.nlvr2\.classifier\.0\.weight": BEIT,
    r"heads\.nlvr2\.classifier\.3\.weight": Values("normal", 0.02 * 0.001),
    r"heads\.nlvr2\.classifier\.[03]\.bias": ZEROS,
    r"heads\.image_classification\.classifier\.weight": Values("normal", 0.02 * 0.001),
    r"heads\.image_classification\.classifier\.bias": ZEROS,
    r"heads\.retrieval\.(image|text)_projection\.weight": BEIT,
    r"heads\.retrieval\.logit_scale": Values("constant", math.log(1 / 0.07)),
}


@functools.cache
def model_of(name: str) -> nn.Module:
    arch, flags = MODELS[name]
    torch.manual_seed(0)
    options = architecture_options(arch, **flags)
    if "beit3" not in arch:
        model = build_language_model(options, small_dictionary(WORDS))
        model.register_classification_head("classes", CLASSES)
        return model
    model = build_beit3(options, beit3_dictionary(WORDS), num_visual_tokens=64)
    model.register_head("vqa", VQAHead(D, ANSWERS))
    model.register_head("nlvr2", NLVR2Head(D, CLASSES))
    model.register_head("image_classification", ImageClassificationHead(D, CLASSES))
    model.register_head("retrieval", RetrievalHead(D))
    return model


@functools.cache
def rules_for(name: str) -> list[str]:
    return [pattern for pattern in RULES if re.search(f"(?:{pattern})$", name)]


def expected_values(name: str, model: nn.Module, flags: dict[str, Any]) -> Values:
    """The rule's, rescaled where sub-LN or DeepNorm says so."""
    [pattern] = rules_for(name)
    rule = RULES[pattern]
    if not isinstance(rule, Values):
        layer = model.get_submodule(name[: name.index("moe_layer")] + "moe_layer")
        rule = rule(layer.config.subtoken_dim, layer.config.expert_ffn_dim)
    is_in_stack = ".layers." in name
    if is_in_stack and any(part in name for part in ("fc1", "fc2", "out_proj", "v_proj")):
        return rule._replace(size=rule.size * initial_scale(flags))
    return rule


def initial_scale(flags: dict[str, Any]) -> float:
    """Of what lies on the residual path: sub-LN's ``sqrt(log 2L)``, DeepNorm's ``(8 L) ** -1/4``."""
    if flags.get("deepnorm"):
        return (8 * LAYERS) ** -0.25
    return math.sqrt(math.log(2 * LAYERS)) if flags.get("subln") or not flags.get("rms_norm") else 1.0


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_follows_its_rule(kind):
    model, flags = model_of(kind), MODELS[kind][1]
    for name, parameter in model.named_parameters():
        assert len(rules_for(name)) == 1, f"{name}: rules {rules_for(name)}"
        assert_follows(name, parameter, expected_values(name, model, flags))


@pytest.mark.parametrize("kind", MODELS)
def test_no_two_drawn_parameters_are_alike(kind):
    """Layers, modalities and experts begin with values of their own."""
    model, drawn = model_of(kind), []
    for name, parameter in model.named_parameters():
        if expected_values(name, model, MODELS[kind][1]).kind == "constant":
            continue
        pieces = parameter.detach() if ".experts." in name and parameter.dim() == 3 else parameter.detach()[None]
        drawn += [(name, piece.flatten()[:16] / piece.flatten()[:16].norm()) for piece in pieces]
    heads = torch.stack([values for _, values in drawn])
    likeness = (heads @ heads.T).fill_diagonal_(0).abs()
    worst = int(likeness.argmax())
    pair = drawn[worst // len(drawn)][0], drawn[worst % len(drawn)][0]
    assert likeness.max() < 0.99, pair


def test_every_rule_has_a_parameter():
    names = [name for kind in MODELS for name, _ in model_of(kind).named_parameters()]
    assert [pattern for pattern in RULES if not any(pattern in rules_for(name) for name in names)] == []
