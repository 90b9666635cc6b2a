"""The one place where flags become configurations; nothing below reads flags.

``options`` is anything with the attributes of ``models.options.LanguageModelOptions``, or for an encoder of
``models.options.BEiT3Options``; None means "not given".
"""

from __future__ import annotations

import math
import re
from typing import Any

from ..common.errors import UserError
from ..common.ranges import check_flags, flag
from ..moe import MHMoEConfig
from ..moe.parallelism import ExpertParallelism
from ..torchscale_ext.settings import DecoderSettings, EncoderSettings
from .flag_checks import check_dense, check_images, check_moe, check_stack, stack_of, text

# Expert widths under a budget: multiples of 8 suit grouped kernels; only small models need finer ones to come close.
_WIDTH_MULTIPLES = (8, 4, 2, 1)
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "swiglu"}

_FLAG_OF_FIELD = {
    "num_heads": "mhmoe_heads_number",
    "num_experts": "moe_expert_count",
    "top_k": "moe_top_k",
    "expert_ffn_dim": "moe_ffn_dim",
    "router": "mhmoe_router",
    "router_dim": "mhmoe_router_dim",
    "router_normalize": "mhmoe_router_normalize",
    "router_temperature": "mhmoe_router_temperature",
    "num_projection_layers": "mhmoe_projection_layers",
    "head_projection": "mhmoe_head_projection",
    "shared_expert_dim": "mhmoe_shared_expert_dim",
    "second_expert_policy": "moe_second_expert_policy",
    "capacity_factor": "mhmoe_capacity_factor",
    "activation_dropout": "activation_dropout",
    "dropout": "dropout",
}


def decoder_settings(
    options: Any, vocab_size: int, max_positions: int, parallel: ExpertParallelism | None = None
) -> DecoderSettings:
    """Everything a decoder is built from; ``parallel`` of the size that ``expert_parallel_size`` gives.

    Raises:
        UserError: naming the flag, its value and the rule, for anything contradictory or impossible.
    """
    check_stack(options)
    moe = moe_config(options)
    return DecoderSettings(
        **_layer_fields(options, moe, parallel),
        static_xmoe=moe is not None and text(options.mhmoe_routing) == "torchscale",
        rotary_embed=bool(options.rotary_embed),
        decoder_layers=options.decoder_layers,
        decoder_embed_dim=options.decoder_embed_dim,
        decoder_ffn_embed_dim=options.decoder_ffn_embed_dim,
        decoder_attention_heads=options.decoder_attention_heads,
        no_scale_embedding=bool(options.no_scale_embedding),
        share_decoder_input_output_embed=not options.no_share_decoder_input_output_embed,
        xpos_rel_pos=bool(options.xpos_rel_pos),
        max_target_positions=max_positions,
        vocab_size=vocab_size,
    )


def encoder_settings(options: Any, vocab_size: int, parallel: ExpertParallelism | None = None) -> EncoderSettings:
    """Everything a BEiT-3 encoder is built from; as ``decoder_settings``."""
    check_stack(options)
    check_images(options)
    moe = moe_config(options)
    return EncoderSettings(
        **_layer_fields(options, moe, parallel),
        separate_experts=text(options.mhmoe_modality_experts) == "separate",
        encoder_layers=options.encoder_layers,
        encoder_embed_dim=options.encoder_embed_dim,
        encoder_ffn_embed_dim=options.encoder_ffn_embed_dim,
        encoder_attention_heads=options.encoder_attention_heads,
        drop_path_rate=options.drop_path_rate,
        img_size=options.img_size,
        patch_size=options.patch_size,
        max_text_length=options.max_text_length,
        vocab_size=vocab_size,
    )


def _layer_fields(options: Any, moe: MHMoEConfig | None, parallel: ExpertParallelism | None) -> dict[str, Any]:
    """What decoders and encoders have in common."""
    return {
        "moe": moe,
        "parallel": parallel,
        "rms_norm": bool(options.rms_norm),
        "no_bias": bool(options.no_bias),
        "activation_fn": text(options.activation_fn),
        "dropout": options.dropout,
        "attention_dropout": options.attention_dropout,
        "activation_dropout": options.activation_dropout,
        "layernorm_embedding": bool(options.layernorm_embedding),
        "subln": _has_subln(options),
        "deepnorm": bool(options.deepnorm),
        "moe_freq": options.moe_freq,
        "moe_expert_count": 0 if moe is None else moe.num_experts,
        "checkpoint_activations": bool(options.checkpoint_activations),
    }


def moe_config(options: Any) -> MHMoEConfig | None:
    """The MoE layers' configuration, its budget spent; None for a dense model.

    Raises:
        UserError: as ``decoder_settings``.
    """
    check_flags(options)
    if not options.moe_freq:
        check_dense(options)
        return None
    stack = stack_of(options)
    layers = getattr(options, f"{stack}_layers")
    if not 1 <= options.moe_freq <= layers:
        raise UserError(f"--moe-freq ({options.moe_freq}) must be 0 or at most --{stack}-layers ({layers})")
    check_moe(options)
    try:
        return _with_budget(options)
    except ValueError as error:
        raise UserError(_in_flags(str(error), stack)) from error


def expert_parallel_size(options: Any, world_size: int) -> int:
    """How many of ``world_size`` data-parallel processes share one bank of experts: as asked, or as many as possible.

    Raises:
        UserError: if ``--mhmoe-expert-parallel-size`` divides the experts or the processes unevenly, or the model
            cannot be spread.
    """
    moe = moe_config(options)
    size = options.mhmoe_expert_parallel_size
    if moe is None or text(options.mhmoe_routing) == "torchscale":
        # TorchScale's own layer says itself that it runs in one process.
        return 1
    if size is None:
        return math.gcd(moe.num_experts, world_size)
    for what, number in (("--moe-expert-count", moe.num_experts), ("the number of processes", world_size)):
        if number % size:
            raise UserError(f"--mhmoe-expert-parallel-size ({size}) must divide {what} ({number})")
    return size


def _with_budget(options: Any) -> MHMoEConfig:
    heads = options.mhmoe_heads_number
    reference = MHMoEConfig(num_heads=1, **_shared_fields(options), **_router_fields(options, heads=1))
    changes = {
        "num_projection_layers": _or(options.mhmoe_projection_layers, 1),
        "head_projection": _switch(options.mhmoe_head_projection),
        "merge_projection": _switch(options.mhmoe_merge_projection),
        "split": not options.mhmoe_no_split,
        "subtoken_residual": bool(options.mhmoe_subtoken_residual),
        **_router_fields(options, heads),
    }
    plain = MHMoEConfig(num_heads=heads, **{**_shared_fields(options), **changes})
    budget = text(options.mhmoe_budget) or "none"
    if budget == "none" or plain.num_params() == reference.num_params():
        return plain
    problem = ""
    for multiple in _WIDTH_MULTIPLES:
        try:
            return MHMoEConfig.matching(reference, budget=budget, num_heads=heads, multiple_of=multiple, **changes)
        except ValueError as error:
            problem = str(error)
    raise UserError(f"{problem}; or set the width yourself: --moe-ffn-dim")


def _shared_fields(options: Any) -> dict[str, Any]:
    """The fields that MH-MoE and its one-head reference have in common."""
    bias = not options.no_bias
    stack = stack_of(options)
    return {
        "embed_dim": getattr(options, f"{stack}_embed_dim"),
        "num_experts": options.moe_expert_count,
        "expert_ffn_dim": _or(options.moe_ffn_dim, getattr(options, f"{stack}_ffn_embed_dim")),
        "top_k": options.moe_top_k,
        "routing": "dropless" if text(options.mhmoe_routing) in (None, "dropless") else "capacity",
        "activation": _ACTIVATIONS[text(options.activation_fn)],
        "expert_bias": bias,
        "projection_bias": bias if options.mhmoe_projection_bias is None else _switch(options.mhmoe_projection_bias),
        "expert_layernorm": _has_subln(options),
        "activation_dropout": options.activation_dropout,
        "dropout": options.dropout,
        "shared_expert_dim": _or(options.mhmoe_shared_expert_dim, 0),
        "gating_fp32": bool(options.moe_gating_use_fp32),
        "normalize_gates": text(options.mhmoe_normalize_gates) != "off",
        "normalize_before_dropping": bool(options.moe_normalize_gate_prob_before_dropping),
        "balance_assignment": text(options.mhmoe_balance_assignment) or "top1",
        "balance_scope": text(options.mhmoe_balance_scope) or "rank",
        "second_expert_policy": _second_expert_policy(options),
        "capacity_factor": _or(options.mhmoe_capacity_factor, 1.0),
        "eval_capacity_fraction": _or(options.moe_eval_capacity_token_fraction, 0.25),
    }


def _router_fields(options: Any, heads: int) -> dict[str, Any]:
    router = text(options.mhmoe_router)
    if text(options.mhmoe_router_preset) == "p1":
        return {
            "router": router,
            "router_dim": max(1, round(16 / heads)),
            "router_normalize": "both",
            "router_temperature": 0.3,
        }
    return {
        "router": router,
        "router_dim": _or(options.mhmoe_router_dim, 16),
        "router_normalize": text(options.mhmoe_router_normalize) or "expert",
        "router_temperature": options.mhmoe_router_temperature,
    }


def _second_expert_policy(options: Any) -> str:
    # Without capacity routing the flag has no effect; the warning has been given.
    if text(options.mhmoe_routing) in (None, "dropless"):
        return "all"
    return text(options.moe_second_expert_policy) or "all"


def _has_subln(options: Any) -> bool:
    return bool(options.subln) or not (options.no_subln or options.rms_norm or options.deepnorm)


def _in_flags(message: str, stack: str) -> str:
    """An MHMoEConfig message in the user's words: fields become flags."""
    flags = {"embed_dim": f"{stack}_embed_dim", **_FLAG_OF_FIELD}
    names = "|".join(sorted(flags, key=len, reverse=True))
    return re.sub(rf"(?:MHMoEConfig\.|\b)({names})\b", lambda match: flag(flags[match[1]]), message)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _switch(choice: Any) -> bool | None:
    return None if choice is None else text(choice) == "on"
