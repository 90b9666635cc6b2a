"""Named architectures ``{dense,smoe,xmoe,mhmoe}_lm_{tiny,small,base}`` and ``..._beit3_{tiny,base}``.

Each fills what the user left open (None) and is a few lines on top of another, so that fairseq may apply it twice:
to the command line and again to the stored configuration. ``base`` is the paper's model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_NAME_REGISTRY, register_model_architecture

from . import beit3, language_model  # noqa: F401  (models must be registered before their architectures)
from .options import BEIT3_NAME, MODEL_NAME, BEiT3Options, LanguageModelOptions, MoEOptions


def fill(args: Any, **defaults: Any) -> None:
    """Set every attribute of ``defaults`` that ``args`` leaves open."""
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def architecture_options(arch: str, **flags: Any) -> Any:
    """The options of a named architecture with ``flags`` given, as the command line would fill them.

    Example: ``architecture_options("mhmoe_lm_base", moe_expert_count=32)``.

    Returns:
        ``LanguageModelOptions``, or ``BEiT3Options`` for ``*_beit3_*``.

    Raises:
        ValueError: if there is no such architecture or flag.
    """
    model = ARCH_MODEL_NAME_REGISTRY.get(arch)
    if model not in (MODEL_NAME, BEIT3_NAME):
        known = sorted(name for name, model in ARCH_MODEL_NAME_REGISTRY.items() if model in (MODEL_NAME, BEIT3_NAME))
        raise ValueError(f"--arch ({arch}) must be one of {', '.join(known)}")
    common = {"tpu": False, "amp": False, "fp16": False}
    options: MoEOptions
    if model == MODEL_NAME:
        options = LanguageModelOptions(max_target_positions=None, tokens_per_sample=1024, **common)
    else:
        options = BEiT3Options(img_size=224, patch_size=16, max_text_length=64, **common)
    for name, value in flags.items():
        if not hasattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} is not an option of {arch}")
        setattr(options, name, value)
    ARCH_CONFIG_REGISTRY[arch](options)
    return options


# ---------------------------------------------------------------------- sizes


def tiny(args: Any) -> None:
    """4 layers of 128: trains in minutes on two CPU cores."""
    fill(args, decoder_layers=4, decoder_embed_dim=128, decoder_attention_heads=4, decoder_ffn_embed_dim=512)
    common(args)


def small(args: Any) -> None:
    """6 layers of 256."""
    fill(args, decoder_layers=6, decoder_embed_dim=256, decoder_attention_heads=8, decoder_ffn_embed_dim=1024)
    common(args)


def base(args: Any) -> None:
    """The paper's 12 layers of 768."""
    fill(args, decoder_layers=12, decoder_embed_dim=768, decoder_attention_heads=12, decoder_ffn_embed_dim=3072)
    common(args)


def common(args: Any, options: type[MoEOptions] = LanguageModelOptions) -> None:
    """What all sizes share.

    Options that a checkpoint of an earlier version does not have yet are set to None, which means "not given".
    """
    fill(args, **{field.name: None for field in dataclasses.fields(options) if field.default is None})
    fill(args, activation_fn="gelu", dropout=0.1, attention_dropout=0.0, activation_dropout=0.0)


def beit3_tiny(args: Any) -> None:
    """4 layers of 128: trains in minutes on two CPU cores."""
    fill(args, encoder_layers=4, encoder_embed_dim=128, encoder_attention_heads=4, encoder_ffn_embed_dim=512)
    beit3_common(args)


def beit3_base(args: Any) -> None:
    """The paper's 12 layers of 768."""
    fill(args, encoder_layers=12, encoder_embed_dim=768, encoder_attention_heads=12, encoder_ffn_embed_dim=3072)
    beit3_common(args)


def beit3_common(args: Any) -> None:
    """What all sizes of BEiT-3 share."""
    fill(args, drop_path_rate=0.0)
    common(args, BEiT3Options)


# ---------------------------------------------------------------------- families


def dense(args: Any) -> None:
    """No MoE layers.

    Raises:
        ValueError: if ``--moe-freq`` asks for some.
    """
    if getattr(args, "moe_freq", None):
        raise ValueError(f"--moe-freq ({args.moe_freq}) contradicts a dense_* architecture")
    fill(args, moe_freq=0)


def sparse(args: Any, router: str) -> None:
    """An MoE layer every second layer, eight experts, two per token, one head."""
    top_k = 1 if getattr(args, "moe_top1_expert", None) else 2
    fill(args, moe_freq=2, moe_expert_count=8, moe_top_k=top_k, mhmoe_heads_number=1)
    if str(getattr(args, "mhmoe_router", None) or "arch") == "arch":
        args.mhmoe_router = "xmoe" if getattr(args, "use_xmoe", None) else router


def smoe(args: Any) -> None:
    """GShard's sparse MoE: linear router."""
    sparse(args, router="linear")


def xmoe(args: Any) -> None:
    """X-MoE: the same with its low-dimensional, normalised router."""
    sparse(args, router="xmoe")


def mhmoe(args: Any) -> None:
    """Four heads, and experts that spend X-MoE's parameters unless their width is given."""
    fill(args, mhmoe_heads_number=4)
    fill(args, mhmoe_budget="params" if getattr(args, "moe_ffn_dim", None) is None else "none")
    xmoe(args)


# ---------------------------------------------------------------------- architectures


@register_model_architecture(MODEL_NAME, "dense_lm_tiny")
def dense_lm_tiny(args: Any) -> None:
    """Dense, tiny."""
    dense(args)
    tiny(args)


@register_model_architecture(MODEL_NAME, "dense_lm_small")
def dense_lm_small(args: Any) -> None:
    """Dense, small."""
    dense(args)
    small(args)


@register_model_architecture(MODEL_NAME, "dense_lm_base")
def dense_lm_base(args: Any) -> None:
    """Dense, the paper's size."""
    dense(args)
    base(args)


@register_model_architecture(MODEL_NAME, "smoe_lm_tiny")
def smoe_lm_tiny(args: Any) -> None:
    """Sparse MoE, tiny."""
    smoe(args)
    tiny(args)


@register_model_architecture(MODEL_NAME, "smoe_lm_small")
def smoe_lm_small(args: Any) -> None:
    """Sparse MoE, small."""
    smoe(args)
    small(args)


@register_model_architecture(MODEL_NAME, "smoe_lm_base")
def smoe_lm_base(args: Any) -> None:
    """Sparse MoE, the paper's size."""
    smoe(args)
    base(args)


@register_model_architecture(MODEL_NAME, "xmoe_lm_tiny")
def xmoe_lm_tiny(args: Any) -> None:
    """X-MoE, tiny."""
    xmoe(args)
    tiny(args)


@register_model_architecture(MODEL_NAME, "xmoe_lm_small")
def xmoe_lm_small(args: Any) -> None:
    """X-MoE, small."""
    xmoe(args)
    small(args)


@register_model_architecture(MODEL_NAME, "xmoe_lm_base")
def xmoe_lm_base(args: Any) -> None:
    """X-MoE, the paper's size."""
    xmoe(args)
    base(args)


@register_model_architecture(MODEL_NAME, "mhmoe_lm_tiny")
def mhmoe_lm_tiny(args: Any) -> None:
    """MH-MoE, tiny."""
    mhmoe(args)
    tiny(args)


@register_model_architecture(MODEL_NAME, "mhmoe_lm_small")
def mhmoe_lm_small(args: Any) -> None:
    """MH-MoE, small."""
    mhmoe(args)
    small(args)


@register_model_architecture(MODEL_NAME, "mhmoe_lm_base")
def mhmoe_lm_base(args: Any) -> None:
    """MH-MoE, the paper's size."""
    mhmoe(args)
    base(args)


@register_model_architecture(BEIT3_NAME, "dense_beit3_tiny")
def dense_beit3_tiny(args: Any) -> None:
    """Dense BEiT-3, tiny."""
    dense(args)
    beit3_tiny(args)


@register_model_architecture(BEIT3_NAME, "dense_beit3_base")
def dense_beit3_base(args: Any) -> None:
    """Dense BEiT-3, the paper's size."""
    dense(args)
    beit3_base(args)


@register_model_architecture(BEIT3_NAME, "smoe_beit3_tiny")
def smoe_beit3_tiny(args: Any) -> None:
    """Sparse MoE BEiT-3, tiny."""
    smoe(args)
    beit3_tiny(args)


@register_model_architecture(BEIT3_NAME, "smoe_beit3_base")
def smoe_beit3_base(args: Any) -> None:
    """Sparse MoE BEiT-3, the paper's size."""
    smoe(args)
    beit3_base(args)


@register_model_architecture(BEIT3_NAME, "xmoe_beit3_tiny")
def xmoe_beit3_tiny(args: Any) -> None:
    """X-MoE BEiT-3, tiny."""
    xmoe(args)
    beit3_tiny(args)


@register_model_architecture(BEIT3_NAME, "xmoe_beit3_base")
def xmoe_beit3_base(args: Any) -> None:
    """X-MoE BEiT-3, the paper's size."""
    xmoe(args)
    beit3_base(args)


@register_model_architecture(BEIT3_NAME, "mhmoe_beit3_tiny")
def mhmoe_beit3_tiny(args: Any) -> None:
    """MH-MoE BEiT-3, tiny."""
    mhmoe(args)
    beit3_tiny(args)


@register_model_architecture(BEIT3_NAME, "mhmoe_beit3_base")
def mhmoe_beit3_base(args: Any) -> None:
    """MH-MoE BEiT-3, the paper's size."""
    mhmoe(args)
    beit3_base(args)
