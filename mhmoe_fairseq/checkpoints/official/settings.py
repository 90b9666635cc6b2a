"""The official repository's settings in our flags, and what of them we refuse.

Facts from github.com/yushuiwx/MH-MoE: ``fairseq/models/language_modeling.py``, and of its two TorchScale copies
``architecture/decoder.py``, ``component/{feedforward_network,multihead_attention,utils_quant}.py`` and
``component/xmoe/tutel_{moe_layer,routing}.py``. The published copy (``torchscale-private``, with ``moe_top_k``) never
renormalises the gate weights: its decoder does not hand the flag to the gate. The older one (``torchscale-moe``) has
TorchScale's gates.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from ...common.errors import UserError
from ...models.options import LanguageModelOptions

# The transformer's flags are spelled as here and mean the same.
_SAME = [
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
# These quantisers change their input even at 32 bits.
_SPARSIFIERS = ("absmax_per_token_sp", "absmax_per_token_relu", "absmax_per_token_relu2", "absmax_per_token_sparse_me")


def check_settings(settings: Mapping[str, Any], names: Collection[str]) -> None:
    """Refuse what cannot be mapped.

    Args:
        settings: the stored model settings.
        names: the names of the weights.

    Raises:
        UserError: naming every such setting with its value.
    """
    refused = [
        f"{name}={settings[name]}"
        for name, allowed in _REQUIRED.items()
        if settings.get(name) is not None and settings[name] not in allowed
    ]
    for name in ("input_quant_method", "ffn_quant_method", "fc2_quant_method"):
        if settings.get(name) in _SPARSIFIERS:
            refused.append(f"{name}={settings[name]}")
    if settings.get("n_kv_heads") not in (None, -1, settings["decoder_attention_heads"]):
        refused.append(f"n_kv_heads={settings['n_kv_heads']}")
    gated = any(".fc3." in name for name in names)
    activation = str(settings.get("activation_fn"))
    if activation not in ("gelu", "relu", "silu") or gated != (activation == "silu"):
        refused.append(f"activation_fn={activation}, {'with' if gated else 'without'} gate weights (fc3)")
    if refused:
        raise UserError(f"cannot be imported, our model has no counterpart for: {'; '.join(refused)}")


def model_flags(
    settings: Mapping[str, Any], names: Collection[str], *, expert_ffn_dim: int | None, routing: str
) -> tuple[str, dict[str, Any]]:
    """The architecture and flags of ours that compute the same.

    Args:
        settings: the stored model settings, checked.
        names: the names of the weights.
        expert_ffn_dim: inner width of an expert, as the weights have it; None for a dense model.
        routing: ``capacity``, what the model was trained with, or ``dropless``.
    """
    flags = {name: settings[name] for name in _SAME if settings.get(name) is not None}
    if flags.get("no_token_positional_embeddings"):
        flags.pop("decoder_learned_pos", None)  # stored, but without effect there
    flags["no_share_decoder_input_output_embed"] = not settings.get("share_decoder_input_output_embed")
    flags["subln" if settings.get("subln") else "no_subln"] = True
    if not settings.get("moe_freq"):
        return "dense_lm_base", flags
    heads = int(settings.get("mhmoe_heads_number") or 1)
    projections = "on" if any(".multi_heads." in name for name in names) else "off"
    flags.update(
        moe_expert_count=settings["moe_expert_count"],
        moe_ffn_dim=expert_ffn_dim,
        moe_gating_use_fp32=bool(settings.get("moe_gating_use_fp32")),
        mhmoe_heads_number=heads,
        mhmoe_router="xmoe" if settings.get("use_xmoe") else "linear",
        mhmoe_head_projection=projections,
        mhmoe_merge_projection=projections,
        mhmoe_projection_bias="on",
        mhmoe_routing=routing,
    )
    if routing == "capacity":
        flags["moe_eval_capacity_token_fraction"] = settings.get("moe_eval_capacity_token_fraction", 0.25)
    flags.update(_gate_flags(settings, routing))
    return ("smoe_lm_base" if projections == "off" and heads == 1 else "mhmoe_lm_base"), flags


def _gate_flags(settings: Mapping[str, Any], routing: str) -> dict[str, Any]:
    if settings.get("moe_top_k") is not None:
        return {"moe_top_k": settings["moe_top_k"], "mhmoe_normalize_gates": "off"}
    top_k = 1 if settings.get("moe_top1_expert") else 2
    before = routing == "capacity" and top_k == 2 and bool(settings.get("moe_normalize_gate_prob_before_dropping"))
    return {"moe_top_k": top_k, "moe_normalize_gate_prob_before_dropping": before or None}
