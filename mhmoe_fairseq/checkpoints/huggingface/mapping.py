"""A language model's settings and weights under the names of ``remote/``, and back.

One thing is more than a renaming: the norm inside an expert. transformers' experts share one activation, so each
expert's scale s and shift b become part of its output map: ``W2 (s x + b) + c = (W2 s) x + (W2 b + c)``. On the way
back s is 1 and b 0 or, of experts without biases, what gives that bias.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchscale.component.xpos_relative_position import XPOS

from ...common.errors import UserError
from ...models.flags import routes_by_domain
from ...moe.merged import MERGINGS
from ...torchscale_ext.settings import DecoderSettings, Settings

_STACK = r"(?:decoder|beit3\.encoder)\.layers\.\d+"
_EXPERTS = re.compile(rf"({_STACK}\.moe_layer\.(?:[AB]\.)?experts\.)(\w+)")
# Buffers that both sides compute, and what is no part of a language model.
_LEFT_OUT = re.compile(r"decoder\.vocabulary_fingerprint|.+\.xpos\.scale|classification_heads\..+")
_ROUTERS = ("xmoe", "linear")
_NO_BIAS = 1e-5  # of a bias's norm: what rounding to float32 leaves
_RENAMED = (
    ("beit3.encoder.embed_positions.A.weight", "model.image_positions.weight"),
    ("beit3.encoder.embed_positions.B.weight", "model.text_positions.weight"),
    ("beit3.vision_embed.proj.", "model.patch_embed."),
    ("beit3.vision_embed.", "model."),
    ("beit3.text_embed.", "model.text_embed."),
    ("beit3.encoder.", "decoder."),
    (".self_attn.out_proj.", ".self_attn.o_proj."),
    ("inner_attn_ln", "inner_norm"),
    ("ffn_layernorm", "inner_norm"),
    ("self_attn_layer_norm", "attention_norm"),
    ("final_layer_norm", "mlp_norm"),
    ("layernorm_embedding", "embedding_norm"),
    ("decoder.layer_norm.", "decoder.norm."),
    (".moe_layer.", ".mlp."),
    (".ffn.", ".mlp."),
    (".reduction.weight", ".reduction"),
    (".gate.balancing.bias", ".router.selection_bias"),
    (".gate.adaptive.weight", ".router.regularizer"),
    (".fc2.", ".down_proj."),
)


def describe_model(options: Any, settings: DecoderSettings, balance_weight: float) -> dict[str, Any]:
    """Returns the fields of ``remote/configuration_mhmoe.py`` that say what a language model computes.

    Args:
        options: those that the model was built from.
        settings: what ``decoder_settings`` made of them.

    Raises:
        UserError: for routing or a router that no other software has, by its name.
    """
    absolute = "learned" if options.decoder_learned_pos else "sinusoidal"
    relative = "rotary" if settings.rotary_embed else "xpos" if settings.xpos_rel_pos else "none"
    return {
        **describe_stack(options, settings, "decoder"),
        "max_position_embeddings": settings.max_target_positions,
        "absolute_positions": "none" if options.no_token_positional_embeddings else absolute,
        "relative_positions": relative,
        "embedding_scale": 1.0 if settings.no_scale_embedding else settings.decoder_embed_dim**0.5,
        "tie_word_embeddings": settings.share_decoder_input_output_embed,
        "mhmoe_balance_weight": balance_weight,
    }


def describe_stack(options: Any, settings: Settings, stack: str) -> dict[str, Any]:
    """Returns the fields that decoders and encoders have in common; fails as ``describe_model``."""
    routing = str(options.mhmoe_routing or "dropless")
    if routes_by_domain(options):
        raise UserError(
            "--mhmoe-routing domain cannot be exported: other software does not tell the domain of a text, which "
            "chooses the experts; mhmoe evaluate --domain-mixture scores text without it"
        )
    if settings.moe is not None and routing in MERGINGS:
        raise UserError(
            f"--mhmoe-routing {routing} cannot be exported: the exported code chooses experts, it merges none"
        )
    if settings.moe is not None and routing not in ("dropless", "relu"):
        raise UserError(
            f"--mhmoe-routing {routing} cannot be exported: what its experts take depends on the batch, which "
            "other software does not repeat; train with dropless routing, or go on with it from this checkpoint"
        )
    if settings.moe is not None and settings.moe.router not in _ROUTERS:
        raise UserError(
            f"--mhmoe-router {options.mhmoe_router} cannot be exported: the exported code has the routers "
            f"{' and '.join(_ROUTERS)} only"
        )
    width, inner, layers, heads, is_pre_norm = (
        getattr(settings, f"{stack}_{name}")
        for name in ("embed_dim", "ffn_embed_dim", "layers", "attention_heads", "normalize_before")
    )
    return {
        "vocab_size": settings.vocab_size,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": settings.activation_fn,
        "embedding_norm": settings.layernorm_embedding,
        "norm": "rmsnorm" if settings.rms_norm else "layernorm",
        "norm_eps": settings.layernorm_eps,
        "sub_norm": settings.subln,
        "post_norm": not is_pre_norm,
        "residual_scale": (2.0 * layers) ** 0.25 if settings.deepnorm else 1.0,
        "use_bias": not settings.no_bias,
        "dropout": settings.dropout,
        "attention_dropout": settings.attention_dropout,
        "activation_dropout": settings.activation_dropout,
        **_describe_experts(settings),
    }


def _describe_experts(settings: Settings) -> dict[str, Any]:
    moe = settings.moe
    if moe is None:
        return {"mhmoe_freq": 0, "mhmoe_expert_norm": False}
    layers = moe.num_projection_layers
    return {
        "mhmoe_freq": settings.moe_freq,
        "mhmoe_experts": moe.num_experts,
        "mhmoe_top_k": moe.top_k,
        "mhmoe_heads": moe.subtokens_per_token,
        "mhmoe_expert_size": moe.expert_ffn_dim,
        "mhmoe_expert_norm": moe.expert_layernorm,
        "mhmoe_shared_size": moe.shared_expert_dim,
        "mhmoe_head_projections": layers if moe.has_head_projection else 0,
        "mhmoe_merge_projections": layers if moe.has_merge_projection else 0,
        "mhmoe_latent_size": moe.latent_dim,
        "mhmoe_projection_bias": moe.projection_bias,
        "mhmoe_merge_norm": moe.merge_norm,
        "mhmoe_subtoken_residual": moe.subtoken_residual,
        "mhmoe_router": moe.router,
        "mhmoe_router_dim": moe.router_dim,
        "mhmoe_router_cosine": moe.router_normalize == "both",
        "mhmoe_router_temperature": moe.router_temperature,
        "mhmoe_router_fp32": moe.gating_fp32,
        "mhmoe_router_input": moe.router_input,
        "mhmoe_expert_banks": "per-head" if moe.num_banks > 1 else "shared",
        "mhmoe_gate_score": "relu" if moe.routing == "relu" else moe.gate_score,
        "mhmoe_normalize_gates": moe.normalize_gates,
        "mhmoe_gate_scale": moe.gate_scale,
        "mhmoe_expert_groups": moe.expert_groups,
        "mhmoe_kept_groups": moe.kept_groups,
        "mhmoe_group_score": moe.group_score,
        "mhmoe_selection_bias": moe.balancing != "none",
        "mhmoe_balance": moe.balance_assignment,
        "mhmoe_balance_scope": "sequence" if moe.balance_scope == "sequence" else "batch",
    }


def exported_name(name: str, gated: bool) -> str:
    """What a weight of ours is called there, one of an expert excepted.

    >>> exported_name("decoder.layers.0.ffn.fc1.bias", gated=False)
    'model.layers.0.mlp.up_proj.bias'
    """
    for ours, theirs in _RENAMED:
        name = name.replace(ours, theirs)
    name = name.replace(".fc1.", ".gate_proj." if gated else ".up_proj.").replace(".gate.", ".up_proj.")
    return name.replace("decoder.output_projection.", "lm_head.").replace("decoder.", "model.", 1)


def export_weights(state: Mapping[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """Returns the weights under their names there, in float32; a tied output layer is left out."""
    gated, exported = settings.activation.is_gated, {}
    banks: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if part := _EXPERTS.fullmatch(name):
            banks.setdefault(part[1], {})[part[2]] = value.float()
        elif not _LEFT_OUT.fullmatch(name):
            exported[exported_name(name, gated)] = value.float().contiguous()
    for prefix, bank in banks.items():
        exported |= {exported_name(prefix, gated) + name: value for name, value in _export_experts(bank).items()}
    if getattr(settings, "share_decoder_input_output_embed", False):
        del exported["lm_head.weight"]
    return exported


def _export_experts(bank: Mapping[str, Tensor]) -> dict[str, Tensor]:
    first = "gate_up_proj" if "gate_weight" in bank else "up_proj"
    halves = ("fc1", "gate") if "gate_weight" in bank else ("fc1",)
    weight, bias = bank["fc2_weight"], bank.get("fc2_bias")
    biases = [bank[f"{half}_bias"] for half in halves] if bias is not None else None
    if "layernorm_weight" in bank:
        scale, shift, exact = (bank[name].double() for name in ("layernorm_weight", "layernorm_bias", "fc2_weight"))
        moved = torch.einsum("edf,ef->ed", exact, shift)
        bias = (moved if bias is None else moved + bias.double()).float()
        weight = (exact * scale[:, None, :]).float()
        biases = biases or [bank[f"{half}_weight"].new_zeros(bank[f"{half}_weight"].shape[:2]) for half in halves]
    exported = {first: torch.cat([bank[f"{half}_weight"] for half in halves], dim=1), "down_proj": weight}
    if bias is not None and biases is not None:
        exported |= {f"{first}_bias": torch.cat(biases, dim=1), "down_proj_bias": bias}
    return {name: value.contiguous() for name, value in exported.items()}


def import_weights(
    exported: Mapping[str, Tensor], names: Iterable[str], settings: DecoderSettings
) -> dict[str, Tensor]:
    """Returns the state of a model with these ``names``, but for the dictionary's fingerprint.

    Raises:
        UserError: naming weights that are missing, or that the model has no counterpart for.
    """
    gated, state, used = settings.activation.is_gated, {}, set()
    banks: dict[str, set[str]] = {}
    tied = settings.share_decoder_input_output_embed
    for name in names:
        if part := _EXPERTS.fullmatch(name):
            banks.setdefault(part[1], set()).add(part[2])
        elif name.endswith(".xpos.scale"):
            state[name] = XPOS(settings.decoder_embed_dim // settings.decoder_attention_heads).scale
        elif not _LEFT_OUT.fullmatch(name):
            source = name.replace("output_projection", "embed_tokens") if tied else name
            used.add(theirs := exported_name(source, gated))
            state[name] = _found(exported, theirs)
    for prefix, wanted in banks.items():
        theirs = exported_name(prefix, gated)
        bank = {name.removeprefix(theirs): value for name, value in exported.items() if name.startswith(theirs)}
        used |= {theirs + name for name in bank}
        state |= {prefix + name: value for name, value in _import_experts(bank, wanted, theirs).items()}
    unknown = sorted(exported.keys() - used - ({"lm_head.weight"} if tied else set()))
    if unknown:
        raise UserError(f"weights that the model of config.json does not have: {', '.join(unknown[:6])}")
    return state


def _import_experts(bank: Mapping[str, Tensor], wanted: set[str], prefix: str) -> dict[str, Tensor]:
    """One layer's experts under the ``wanted`` names."""
    gated, normed, biased = "gate_weight" in wanted, "layernorm_weight" in wanted, "fc2_bias" in wanted
    first = "gate_up_proj" if gated else "up_proj"
    needed = [first, "down_proj", *([f"{first}_bias", "down_proj_bias"] if biased or normed else [])]
    tensors = {name: _found(bank, name, prefix) for name in needed}
    halves = ("fc1", "gate") if gated else ("fc1",)
    found = dict(zip((f"{half}_weight" for half in halves), tensors[first].chunk(len(halves), dim=1)))
    found["fc2_weight"] = tensors["down_proj"]
    if biased:
        found |= zip((f"{half}_bias" for half in halves), tensors[f"{first}_bias"].chunk(len(halves), dim=1))
        found["fc2_bias"] = tensors["down_proj_bias"]
    if normed:
        shape = tensors["down_proj"].shape[::2]
        found |= {"layernorm_weight": torch.ones(shape), "layernorm_bias": torch.zeros(shape)}
        if not biased:
            down, bias = tensors["down_proj"].double(), tensors["down_proj_bias"].double().unsqueeze(2)
            shift = torch.linalg.pinv(down) @ bias
            lost = {f"{first}_bias": tensors[f"{first}_bias"], "down_proj_bias": down @ shift - bias}
            for name, rest in lost.items():
                if rest.norm() > _NO_BIAS * (1 + tensors[name].norm()):
                    rule = "was trained, but experts of --no-bias have no such bias: train it frozen there"
                    raise UserError(f"{prefix}{name} {rule}, or keep the model there")
            found["layernorm_bias"] = shift.squeeze(2).float()
    return {name: value.contiguous() for name, value in found.items()}


def _found(weights: Mapping[str, Tensor], name: str, prefix: str = "") -> Tensor:
    if name not in weights:
        raise UserError(f"the weight {prefix}{name} is missing")
    return weights[name].float()
