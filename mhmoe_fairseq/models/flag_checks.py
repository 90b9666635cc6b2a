"""What flags contradict each other, are out of range, or have no effect; see ``args``."""

from __future__ import annotations

import functools
import logging
from typing import Any

from ..common.errors import UserError
from ..common.ranges import check_flags, flag

logger = logging.getLogger(__name__)

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
    "mhmoe_modality_experts",
)


def check_stack(options: Any) -> None:
    """The transformer around the MoE layers, decoder or encoder.

    Raises:
        UserError: naming the flag, its value and the rule.
    """
    check_flags(options)
    stack = stack_of(options)
    width, heads = getattr(options, f"{stack}_embed_dim"), getattr(options, f"{stack}_attention_heads")
    if width % heads:
        raise UserError(f"--{stack}-attention-heads ({heads}) must divide --{stack}-embed-dim ({width})")
    for one, other in (
        ("subln", "no_subln"),
        ("subln", "deepnorm"),
        ("rotary_embed", "xpos_rel_pos"),
        ("decoder_learned_pos", "no_token_positional_embeddings"),
        ("share_decoder_input_output_embed", "no_share_decoder_input_output_embed"),
    ):
        if getattr(options, one, None) and getattr(options, other, None):
            raise UserError(f"{flag(one)} and {flag(other)} contradict each other")


def check_images(options: Any) -> None:
    """The sizes of images and texts that an encoder reads.

    Raises:
        UserError: naming the flag, its value and the rule.
    """
    if options.img_size % options.patch_size:
        raise UserError(f"--patch-size ({options.patch_size}) must divide --img-size ({options.img_size})")
    if text(options.mhmoe_routing) == "torchscale":
        raise UserError(
            "--mhmoe-routing torchscale is for language models: TorchScale's encoder refuses MoE layers for two "
            "modalities; use --mhmoe-routing capacity, which makes the same choices"
        )


def check_dense(options: Any) -> None:
    """A model without MoE layers.

    Raises:
        UserError: naming the flag that needs them.
    """
    for name in _given(options, _MHMOE_FLAGS):
        if name == "mhmoe_router" and text(options.mhmoe_router) == "arch":
            continue
        raise UserError(
            f"{flag(name)} needs MoE layers, but the model is dense (--moe-freq 0): take smoe_*, xmoe_* or mhmoe_*"
        )
    for name in _given(options, _LINEAGE_FLAGS):
        warn_once(f"{flag(name)} has no effect: the model is dense (--moe-freq 0)")


def check_moe(options: Any) -> None:
    """A model with MoE layers.

    Raises:
        UserError: naming the flags that contradict each other.
    """
    if options.moe_top1_expert and options.moe_top_k != 1:
        raise UserError(f"--moe-top1-expert contradicts --moe-top-k {options.moe_top_k}")
    if options.use_xmoe and text(options.mhmoe_router) != "xmoe":
        raise UserError(f"--use-xmoe contradicts --mhmoe-router {text(options.mhmoe_router)}")
    budget = text(options.mhmoe_budget)
    if options.moe_ffn_dim is not None and budget not in (None, "none"):
        raise UserError(
            f"--moe-ffn-dim ({options.moe_ffn_dim}) sets the expert width, as does --mhmoe-budget {budget}: give one"
        )
    _check_router(options)
    _check_capacity(options)


def _check_router(options: Any) -> None:
    given = _given(options, _XMOE_ROUTER_FLAGS)
    if given and text(options.mhmoe_router) == "linear":
        raise UserError(f"{flag(given[0])} needs --mhmoe-router xmoe, not linear")
    if len(given) > 1 and given[0] == "mhmoe_router_preset":
        raise UserError(f"--mhmoe-router-preset sets what {flag(given[1])} sets: give one")


def _check_capacity(options: Any) -> None:
    routing = text(options.mhmoe_routing)
    for name in _given(options, _CAPACITY_FLAGS):
        if routing == "dropless" or (routing is None and name.startswith("mhmoe_")):
            raise UserError(f"{flag(name)} is about capacity; it contradicts dropless routing (--mhmoe-routing)")
        if routing is None:
            warn_once(f"{flag(name)} has no effect: routing is dropless (see --mhmoe-routing capacity)")
    if routing is not None and options.moe_normalize_gate_prob_before_dropping and options.moe_top_k == 1:
        warn_once("--moe-normalize-gate-prob-before-dropping has no effect with one expert per sub-token")


# ---------------------------------------------------------------------- helpers


def stack_of(options: Any) -> str:
    """``encoder`` or ``decoder``: which of them the options are about, and how their flags of sizes begin."""
    return "decoder" if getattr(options, "encoder_layers", None) is None else "encoder"


def _given(options: Any, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if getattr(options, name, None) not in (None, False)]


def text(choice: Any) -> str | None:
    """A choice as plain text: fairseq hands over enum members or strings."""
    return None if choice is None else str(choice)


@functools.lru_cache(maxsize=None)
def warn_once(message: str) -> None:
    """Log a warning, the same one only once."""
    logger.warning(message)
