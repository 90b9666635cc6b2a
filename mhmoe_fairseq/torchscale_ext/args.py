"""The one place where flags become configurations; nothing below reads flags.

``options`` is anything with the attributes of ``models.options.LanguageModelOptions``; None means "not given".
"""

from __future__ import annotations

import functools
import logging
import math
import re
from typing import Any

from ..moe import MHMoEConfig
from ..moe.parallelism import ExpertParallelism
from .settings import DecoderSettings

logger = logging.getLogger(__name__)

# Expert widths under a budget: multiples of 8 suit grouped kernels; only small models need finer ones to come close.
_WIDTH_MULTIPLES = (8, 4, 2, 1)
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "swiglu"}

# Flags of TorchScale and the official repository: where they have no effect they are accepted with a warning.
_LINEAGE_FLAGS = (
    "moe_expert_count",
    "moe_top_k",
    "moe_top1_expert",
    "moe_ffn_dim",
    "moe_gating_use_fp32",
    "moe_second_expert_policy",
    "moe_normalize_gate_prob_before_dropping",
    "moe_eval_capacity_token_fraction",
    "use_xmoe",
)
_CAPACITY_FLAGS = (
    "moe_second_expert_policy",
    "moe_normalize_gate_prob_before_dropping",
    "moe_eval_capacity_token_fraction",
    "mhmoe_capacity_factor",
)
_XMOE_ROUTER_FLAGS = (
    "mhmoe_router_preset",
    "mhmoe_router_dim",
    "mhmoe_router_normalize",
    "mhmoe_router_temperature",
)
# What a dense model refuses: they only make sense for MH-MoE.
_MHMOE_FLAGS = (
    "mhmoe_heads_number",
    "mhmoe_routing",
    "mhmoe_capacity_factor",
    "mhmoe_router",
    *_XMOE_ROUTER_FLAGS,
    "mhmoe_normalize_gates",
    "mhmoe_balance_assignment",
    "mhmoe_balance_scope",
    "mhmoe_expert_parallel_size",
    "mhmoe_budget",
    "mhmoe_subtoken_residual",
    "mhmoe_projection_layers",
    "mhmoe_head_projection",
    "mhmoe_merge_projection",
    "mhmoe_projection_bias",
    "mhmoe_no_split",
    "mhmoe_shared_expert_dim",
)
_FLAG_OF_FIELD = {
    "embed_dim": "decoder_embed_dim",
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
        ValueError: naming the flag, its value and the rule, for anything contradictory or impossible.
    """
    _check_decoder(options)
    moe = moe_config(options)
    return DecoderSettings(
        moe=moe,
        parallel=parallel,
        static_xmoe=moe is not None and _text(options.mhmoe_routing) == "torchscale",
        rotary_embed=bool(options.rotary_embed),
        rms_norm=bool(options.rms_norm),
        no_bias=bool(options.no_bias),
        decoder_layers=options.decoder_layers,
        decoder_embed_dim=options.decoder_embed_dim,
        decoder_ffn_embed_dim=options.decoder_ffn_embed_dim,
        decoder_attention_heads=options.decoder_attention_heads,
        activation_fn=_text(options.activation_fn),
        dropout=options.dropout,
        attention_dropout=options.attention_dropout,
        activation_dropout=options.activation_dropout,
        no_scale_embedding=bool(options.no_scale_embedding),
        layernorm_embedding=bool(options.layernorm_embedding),
        share_decoder_input_output_embed=not options.no_share_decoder_input_output_embed,
        subln=_has_subln(options),
        deepnorm=bool(options.deepnorm),
        xpos_rel_pos=bool(options.xpos_rel_pos),
        moe_freq=options.moe_freq,
        moe_expert_count=0 if moe is None else moe.num_experts,
        checkpoint_activations=bool(options.checkpoint_activations),
        max_target_positions=max_positions,
        vocab_size=vocab_size,
    )


def moe_config(options: Any) -> MHMoEConfig | None:
    """The MoE layers' configuration, its budget spent; None for a dense model.

    Raises:
        ValueError: as ``decoder_settings``.
    """
    if not options.moe_freq:
        _check_dense(options)
        return None
    if not 1 <= options.moe_freq <= options.decoder_layers:
        raise ValueError(
            f"--moe-freq ({options.moe_freq}) must be 0 or at most --decoder-layers ({options.decoder_layers})"
        )
    _check_moe(options)
    try:
        return _with_budget(options)
    except ValueError as error:
        raise ValueError(_in_flags(str(error))) from error


def expert_parallel_size(options: Any, world_size: int) -> int:
    """How many of ``world_size`` data-parallel processes share one bank of experts: as asked, or as many as possible.

    Raises:
        ValueError: if ``--mhmoe-expert-parallel-size`` divides the experts or the processes unevenly, or the model
            cannot be spread.
    """
    moe = moe_config(options)
    size = options.mhmoe_expert_parallel_size
    if moe is None or _text(options.mhmoe_routing) == "torchscale":
        # TorchScale's own layer says itself that it runs in one process.
        return 1
    if size is None:
        return math.gcd(moe.num_experts, world_size)
    for what, number in (("--moe-expert-count", moe.num_experts), ("the number of processes", world_size)):
        if size < 1 or number % size:
            raise ValueError(f"--mhmoe-expert-parallel-size ({size}) must divide {what} ({number})")
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
    budget = _text(options.mhmoe_budget) or "none"
    if budget == "none" or plain.num_params() == reference.num_params():
        return plain
    problem = ""
    for multiple in _WIDTH_MULTIPLES:
        try:
            return MHMoEConfig.matching(reference, budget=budget, num_heads=heads, multiple_of=multiple, **changes)
        except ValueError as error:
            problem = str(error)
    raise ValueError(f"{problem}; or set the width yourself: --moe-ffn-dim")


def _shared_fields(options: Any) -> dict[str, Any]:
    """The fields that MH-MoE and its one-head reference have in common."""
    bias = not options.no_bias
    return {
        "embed_dim": options.decoder_embed_dim,
        "num_experts": options.moe_expert_count,
        "expert_ffn_dim": _or(options.moe_ffn_dim, options.decoder_ffn_embed_dim),
        "top_k": options.moe_top_k,
        "routing": "dropless" if _text(options.mhmoe_routing) in (None, "dropless") else "capacity",
        "activation": _ACTIVATIONS[_text(options.activation_fn)],
        "expert_bias": bias,
        "projection_bias": bias if options.mhmoe_projection_bias is None else _switch(options.mhmoe_projection_bias),
        "expert_layernorm": _has_subln(options),
        "activation_dropout": options.activation_dropout,
        "dropout": options.dropout,
        "shared_expert_dim": _or(options.mhmoe_shared_expert_dim, 0),
        "gating_fp32": bool(options.moe_gating_use_fp32),
        "normalize_gates": _text(options.mhmoe_normalize_gates) != "off",
        "normalize_before_dropping": bool(options.moe_normalize_gate_prob_before_dropping),
        "balance_assignment": _text(options.mhmoe_balance_assignment) or "top1",
        "balance_scope": _text(options.mhmoe_balance_scope) or "rank",
        "second_expert_policy": _second_expert_policy(options),
        "capacity_factor": _or(options.mhmoe_capacity_factor, 1.0),
        "eval_capacity_fraction": _or(options.moe_eval_capacity_token_fraction, 0.25),
    }


def _router_fields(options: Any, heads: int) -> dict[str, Any]:
    router = _text(options.mhmoe_router)
    if _text(options.mhmoe_router_preset) == "p1":
        return {
            "router": router,
            "router_dim": max(1, round(16 / heads)),
            "router_normalize": "both",
            "router_temperature": 0.3,
        }
    return {
        "router": router,
        "router_dim": _or(options.mhmoe_router_dim, 16),
        "router_normalize": _text(options.mhmoe_router_normalize) or "expert",
        "router_temperature": options.mhmoe_router_temperature,
    }


def _second_expert_policy(options: Any) -> str:
    # Without capacity routing the flag has no effect; the warning has been given.
    if _text(options.mhmoe_routing) in (None, "dropless"):
        return "all"
    return _text(options.moe_second_expert_policy) or "all"


def _has_subln(options: Any) -> bool:
    return bool(options.subln) or not (options.no_subln or options.rms_norm or options.deepnorm)


# ---------------------------------------------------------------------- checks


def _check_decoder(options: Any) -> None:
    if options.decoder_embed_dim % options.decoder_attention_heads:
        raise ValueError(
            f"--decoder-attention-heads ({options.decoder_attention_heads}) must divide "
            f"--decoder-embed-dim ({options.decoder_embed_dim})"
        )
    for one, other in (
        ("subln", "no_subln"),
        ("subln", "deepnorm"),
        ("rotary_embed", "xpos_rel_pos"),
        ("decoder_learned_pos", "no_token_positional_embeddings"),
        ("share_decoder_input_output_embed", "no_share_decoder_input_output_embed"),
    ):
        if getattr(options, one) and getattr(options, other):
            raise ValueError(f"{_flag(one)} and {_flag(other)} contradict each other")
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        if not 0.0 <= getattr(options, name) < 1.0:
            raise ValueError(f"{_flag(name)} ({getattr(options, name)}) must be in [0, 1)")


def _check_dense(options: Any) -> None:
    for name in _given(options, _MHMOE_FLAGS):
        if name == "mhmoe_router" and _text(options.mhmoe_router) == "arch":
            continue
        raise ValueError(
            f"{_flag(name)} needs MoE layers, but the model is dense (--moe-freq 0): take smoe_*, xmoe_* or mhmoe_*"
        )
    for name in _given(options, _LINEAGE_FLAGS):
        _warn_once(f"{_flag(name)} has no effect: the model is dense (--moe-freq 0)")


def _check_moe(options: Any) -> None:
    if options.moe_top1_expert and options.moe_top_k != 1:
        raise ValueError(f"--moe-top1-expert contradicts --moe-top-k {options.moe_top_k}")
    if options.use_xmoe and _text(options.mhmoe_router) != "xmoe":
        raise ValueError(f"--use-xmoe contradicts --mhmoe-router {_text(options.mhmoe_router)}")
    budget = _text(options.mhmoe_budget)
    if options.moe_ffn_dim is not None and budget not in (None, "none"):
        raise ValueError(
            f"--moe-ffn-dim ({options.moe_ffn_dim}) sets the expert width, as does --mhmoe-budget {budget}: give one"
        )
    _check_router(options)
    _check_capacity(options)


def _check_router(options: Any) -> None:
    given = _given(options, _XMOE_ROUTER_FLAGS)
    if given and _text(options.mhmoe_router) == "linear":
        raise ValueError(f"{_flag(given[0])} needs --mhmoe-router xmoe, not linear")
    if len(given) > 1 and given[0] == "mhmoe_router_preset":
        raise ValueError(f"--mhmoe-router-preset sets what {_flag(given[1])} sets: give one")


def _check_capacity(options: Any) -> None:
    routing = _text(options.mhmoe_routing)
    for name in _given(options, _CAPACITY_FLAGS):
        if routing == "dropless" or (routing is None and name.startswith("mhmoe_")):
            raise ValueError(f"{_flag(name)} is about capacity; it contradicts dropless routing (--mhmoe-routing)")
        if routing is None:
            _warn_once(f"{_flag(name)} has no effect: routing is dropless (see --mhmoe-routing capacity)")
    if routing is not None and options.moe_normalize_gate_prob_before_dropping and options.moe_top_k == 1:
        _warn_once("--moe-normalize-gate-prob-before-dropping has no effect with one expert per sub-token")


# ---------------------------------------------------------------------- helpers


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _in_flags(message: str) -> str:
    """An MHMoEConfig message in the user's words: fields become flags."""
    names = "|".join(sorted(_FLAG_OF_FIELD, key=len, reverse=True))
    return re.sub(rf"(?:MHMoEConfig\.|\b)({names})\b", lambda match: _flag(_FLAG_OF_FIELD[match[1]]), message)


def _given(options: Any, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if getattr(options, name) not in (None, False)]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _text(choice: Any) -> str | None:
    """A choice as plain text: fairseq hands over enum members or strings."""
    return None if choice is None else str(choice)


def _switch(choice: Any) -> bool | None:
    return None if choice is None else _text(choice) == "on"


@functools.lru_cache(maxsize=None)
def _warn_once(message: str) -> None:
    logger.warning(message)
