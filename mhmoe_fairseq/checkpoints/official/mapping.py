"""The official repository's settings and weights under our names, and what of them we refuse.

Facts from github.com/yushuiwx/MH-MoE: ``fairseq/models/language_modeling.py``, and of its two TorchScale copies
``architecture/decoder.py``, ``component/{embedding,feedforward_network,multihead_attention,utils_quant}.py`` and
``component/xmoe/tutel_{moe_layer,routing}.py``:

- The published copy (``torchscale-private``, with ``moe_top_k``) never renormalises the gate weights: its decoder does
  not hand the flag to the gate. The older one (``torchscale-moe``) has TorchScale's gates.
- One token's sub-tokens are consecutive there too: ``(N, D) -> (N, H, D / H) -> (N * H, D / H)``. The projections need
  no reordering, and always have biases, ``--no-bias`` or not.
- A gated network computes ``fc2(fc1(x) * silu(fc3(x)))``: its ``fc3`` is our ``fc1``, its ``fc1`` our gate.
- Rotary positions turn feature i together with i + d/2, ours feature 2i with 2i + 1: the rows of the query and key maps
  are reordered. Attention does not change, since queries and keys are reordered alike.
- Learned positions are counted from 2, as everywhere in fairseq; ours from 0.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...common.errors import UserError
from ...models.architectures import architecture_options
from ...models.options import LanguageModelOptions

# The transformer's flags are spelled as here and mean the same.
_SAME_FLAGS = [
    entry.name
    for entry in dataclasses.fields(LanguageModelOptions)
    if entry.metadata and not entry.metadata["needs"] and entry.metadata["affects"] != "nothing"
]
# What must have one of these values, where it is stored at all: anything else changes the forward pass in a way that
# our model has no counterpart for.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    name: values
    for values, names in (
        ((32,), "weight_bits input_bits"),
        ((-1, 32), "ffn_bits fc2_bits"),
        ((False,), "binary_attn binary_query binary_routing use_quant_for_activation quant_ffn_output"),
        ((False,), "multiway deepnorm xpos_rel_pos sope_rel_pos relu_squared nozero_rmsnorm"),
        ((False,), "moe_batch_prioritized_routing"),
        ((True,), "decoder_normalize_before"),
        ((-1,), "moe_lora_rank negative_slope"),
        ((1,), "model_parallel_size group_norm_size partial_rotary_factor"),
        ((0,), "rel_pos_buckets"),
    )
    for name in names.split()
}
# Their BitNet b1.58, whose weights of "1 bit" are -1, 0 and 1: what says so, and what must not say otherwise.
_TERNARY = {
    "weight_bits": 1, "input_bits": 8, "weight_quant_method": "absmean", "input_quant_method": "absmax_per_token",
}  # fmt: skip
_TERNARY_REQUIRED: dict[str, tuple[Any, ...]] = {
    **{name: (-1, 8) for name in ("ffn_bits", "fc2_bits")},
    **{name: ("", "absmax_per_token") for name in ("ffn_quant_method", "fc2_quant_method")},
    **{name: (False,) for name in ("blockwise_quant", "smoothquant", "quant_before_rope")},
    "absmean_alpha": (1.0,),
}
# These quantisers change their input even at 32 bits.
_SPARSIFIERS = ("absmax_per_token_sp", "absmax_per_token_relu", "absmax_per_token_relu2", "absmax_per_token_sparse_me")

_EXPERT = re.compile(r"(.+\.moe_layer\.experts\.)(\d+)\.(fc1|fc2|fc3|ffn_layernorm)\.(weight|bias)")
_MOE = re.compile(r"(decoder\.layers\.(\d+)\.moe_layer\.)(.+)")
_ROUTER_AND_PROJECTIONS = {
    "gate.wg.weight": "router.weight",
    "gate.wg_reduction.weight": "router.reduction.weight",
    "gate.wg": "router.expert_embedding",
    "multi_heads.weight": "head_projection.0.weight",
    "multi_heads.bias": "head_projection.0.bias",
    "out_proj.weight": "merge_projection.0.weight",
    "out_proj.bias": "merge_projection.0.bias",
}
_DENSE = re.compile(r"(decoder\.layers\.\d+\.ffn\.)(fc1|fc2|fc3)\.(weight|bias)")
_QUERY_OR_KEY = re.compile(r"decoder\.layers\.\d+\.self_attn\.(q_proj|k_proj)\.(weight|bias)")
_POSITIONS = "decoder.embed_positions.weight"
_FIRST_POSITION = 2
_SAME_NAME = re.compile(
    r"decoder\.((embed_tokens|output_projection|embed_positions)\.weight|(layer_norm|layernorm_embedding)\..+|"
    r"layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|out_proj|inner_attn_ln)|"
    r"self_attn_layer_norm|final_layer_norm|ffn\.ffn_layernorm)\.(weight|bias))"
)
# Not weights: tables that both sides compute.
_COMPUTED = re.compile(
    r"decoder\.(version|embed_positions\._float_tensor|layers\.\d+\.self_attn\.rotary_emb\.inv_freq)"
)


def check_settings(settings: Mapping[str, Any], official: Mapping[str, Tensor]) -> None:
    """Raise ``UserError`` naming every stored setting of the model, with its value, that cannot be mapped."""
    required = _REQUIRED
    if _is_ternary(settings):
        required = {**{name: of for name, of in required.items() if name not in _TERNARY}, **_TERNARY_REQUIRED}
        if settings.get("moe_freq") != 1:  # there are dense networks, which then would be ternary beside attention
            required["quant_ffn_only"] = (False,)
    refused = [
        f"{name}={settings[name]}"
        for name, allowed in required.items()
        if settings.get(name) is not None and settings[name] not in allowed
    ]
    for name in ("input_quant_method", "ffn_quant_method", "fc2_quant_method"):
        if settings.get(name) in _SPARSIFIERS:
            refused.append(f"{name}={settings[name]}")
    if settings.get("n_kv_heads") not in (None, -1, settings["decoder_attention_heads"]):
        refused.append(f"n_kv_heads={settings['n_kv_heads']}")
    gated = any(".fc3." in name for name in official)
    activation = str(settings.get("activation_fn"))
    if activation not in ("gelu", "relu", "silu") or gated != (activation == "silu"):
        refused.append(f"activation_fn={activation}, {'with' if gated else 'without'} gate weights (fc3)")
    if refused:
        raise UserError(f"cannot be imported, our model has no counterpart for: {'; '.join(refused)}")


def _is_ternary(settings: Mapping[str, Any]) -> bool:
    return all(settings.get(name) == value for name, value in _TERNARY.items())


def model_options(official: Mapping[str, Tensor], settings: Mapping[str, Any], routing: str) -> Any:
    """The options of our model that computes the same, with the architecture as ``_name``.

    Args:
        settings: the stored settings of the model, checked.
        routing: ``capacity``, what the model was trained with, or ``dropless``.
    """
    flags = {name: settings[name] for name in _SAME_FLAGS if settings.get(name) is not None}
    if flags.get("no_token_positional_embeddings"):
        flags.pop("decoder_learned_pos", None)  # stored, but without effect there
    flags["no_share_decoder_input_output_embed"] = not settings.get("share_decoder_input_output_embed")
    flags["subln" if settings.get("subln") else "no_subln"] = True
    if _is_ternary(settings):
        flags["mhmoe_quantize"] = "experts" if settings.get("quant_ffn_only") else "all"
    arch = "dense_lm_base"
    if settings.get("moe_freq"):
        of_layers = _moe_flags(official, settings, routing)
        is_plain = of_layers["mhmoe_head_projection"] == "off" and of_layers["mhmoe_heads_number"] == 1
        arch = "smoe_lm_base" if is_plain else "mhmoe_lm_base"
        flags.update(of_layers)
    options = architecture_options(arch, **flags)
    options._name = arch
    return options


def _moe_flags(official: Mapping[str, Tensor], settings: Mapping[str, Any], routing: str) -> dict[str, Any]:
    widths = {len(value) for name, value in official.items() if name.endswith(".experts.0.fc1.weight")}
    if len(widths) > 1:
        raise UserError(f"experts of different widths, {sorted(widths)}, cannot be imported")
    projections = "on" if any(".multi_heads." in name for name in official) else "off"
    flags = {
        "moe_expert_count": settings["moe_expert_count"],
        "moe_ffn_dim": widths.pop() if widths else None,
        "moe_gating_use_fp32": bool(settings.get("moe_gating_use_fp32")),
        "mhmoe_heads_number": int(settings.get("mhmoe_heads_number") or 1),
        "mhmoe_router": "xmoe" if settings.get("use_xmoe") else "linear",
        "mhmoe_head_projection": projections,
        "mhmoe_merge_projection": projections,
        "mhmoe_projection_bias": "on",
        "mhmoe_routing": routing,
    }
    if routing == "capacity":
        flags["moe_eval_capacity_token_fraction"] = settings.get("moe_eval_capacity_token_fraction", 0.25)
    if settings.get("moe_top_k") is not None:
        return {**flags, "moe_top_k": settings["moe_top_k"], "mhmoe_normalize_gates": "off"}
    top_k = 1 if settings.get("moe_top1_expert") else 2
    before = routing == "capacity" and top_k == 2 and bool(settings.get("moe_normalize_gate_prob_before_dropping"))
    return {**flags, "moe_top_k": top_k, "moe_normalize_gate_prob_before_dropping": before or None}


def convert_weights(official: Mapping[str, Tensor], *, rotary_heads: int | None = None) -> dict[str, Tensor]:
    """A decoder's weights, or only some of them, in float32 and under the names of our language model.

    Experts ``experts.E.fc1.weight (F, d)``, ``fc2 (d, F)``, ``fc3 (F, d)`` become stacks with E in front.

    Args:
        official: the ``model`` of a checkpoint, experts numbered through.
        rotary_heads: attention heads if queries and keys are rotated, else None.

    Raises:
        UserError: naming all weights that have no counterpart, or experts that do not fit together.
    """
    converted: dict[str, Tensor] = {}
    experts: dict[tuple[str, ...], dict[int, Tensor]] = defaultdict(dict)
    unknown = []
    gated = any(".fc3." in name for name in official)
    for name, value in official.items():
        expert, dense, moe = _EXPERT.fullmatch(name), _DENSE.fullmatch(name), _MOE.fullmatch(name)
        if expert is not None:
            experts[expert[1], expert[3], expert[4]][int(expert[2])] = value
        elif dense is not None:
            converted[f"{dense[1]}{_gated_name(dense[2], gated)}.{dense[3]}"] = value
        elif moe is not None and moe[3] in _ROUTER_AND_PROJECTIONS:
            converted[moe[1] + _ROUTER_AND_PROJECTIONS[moe[3]]] = value
        elif rotary_heads is not None and _QUERY_OR_KEY.fullmatch(name):
            converted[name] = rows_for_rotary(value, rotary_heads)
        elif _SAME_NAME.fullmatch(name):
            converted[name] = value[_FIRST_POSITION:] if name == _POSITIONS else value
        elif not _COMPUTED.fullmatch(name):
            unknown.append(name)
    if unknown:
        names = ", ".join(sorted(unknown)[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
        raise UserError(f"cannot be imported, our model has no counterpart for the weights {names}")
    for (prefix, module, kind), values in experts.items():
        if module == "ffn_layernorm" and (prefix, module, "bias") not in experts:
            raise UserError(f"{prefix}*.{module} is an RMSNorm, without bias; our experts' norm is a LayerNorm")
        target = "layernorm" if module == "ffn_layernorm" else _gated_name(module, gated)
        converted[f"{prefix}{target}_{kind}"] = _stack(f"{prefix}*.{module}.{kind}", values)
    return {name: value.float() for name, value in converted.items()}


def moe_layers(official: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The MoE layers of a decoder by index, each with the names of ``MHMoELayer``; fails as ``convert_weights``."""
    layers: dict[int, dict[str, Tensor]] = defaultdict(dict)
    converted = convert_weights({name: value for name, value in official.items() if _MOE.fullmatch(name)})
    for name, value in converted.items():
        if layer := _MOE.fullmatch(name):
            layers[int(layer[2])][layer[3]] = value
    return dict(sorted(layers.items()))


def rows_for_rotary(weight: Tensor, num_heads: int) -> Tensor:
    """Query or key rows ``(heads * d, ...)``: feature i of a head goes to 2i, feature i + d/2 to 2i + 1."""
    halves = weight.unflatten(0, (num_heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def _gated_name(module: str, gated: bool) -> str:
    return {"fc1": "gate", "fc3": "fc1"}.get(module, module) if gated else module


def _stack(name: str, values: dict[int, Tensor]) -> Tensor:
    if sorted(values) != list(range(len(values))) or len({value.shape for value in values.values()}) != 1:
        shapes = {index: tuple(values[index].shape) for index in sorted(values)}
        raise UserError(f"{name}: experts must be numbered from 0 and have one shape, not {shapes}")
    return torch.stack([values[index] for index in range(len(values))])
