"""The one place where flags become configurations and are checked; nothing below reads flags.

``options`` is anything with the attributes of ``models.options.LanguageModelOptions``, or for an encoder of
``models.options.BEiT3Options``; None means "not given". What a flag sets, needs and affects stands with its field.
"""

import contextlib
import dataclasses
import logging
import math
import typing
from collections.abc import Iterator
from typing import Any, Literal, cast

from ..common.errors import UserError
from ..common.ranges import check_flag, check_flags, flag
from ..moe import ConfigError, MergedConfig, MHMoEConfig
from ..moe.gate import GATES, Gate
from ..moe.merged import MERGINGS, MergedLayer
from ..moe.parallelism import ExpertParallelism
from ..torchscale_ext.settings import DecoderSettings, EncoderSettings
from ..torchscale_ext.static_xmoe import check_supported
from .options import BENCHMARK_ROUTERS, DOMAIN, BEiT3Options, LanguageModelOptions

logger = logging.getLogger(__name__)

# Expert widths under a budget: multiples of 8 suit grouped kernels; only small models need finer ones to come close.
_WIDTH_MULTIPLES = (8, 4, 2, 1)
_NARROW_ROUNDING = 0.01  # of a width that --mhmoe-granularity divides: a multiple that is further off is too coarse
_WITH_CAPACITY = ("capacity", "torchscale")
_CONTRADICTIONS = (
    ("subln", "no_subln"),
    ("subln", "deepnorm"),
    ("rotary_embed", "xpos_rel_pos"),
    ("decoder_learned_pos", "no_token_positional_embeddings"),
    ("share_decoder_input_output_embed", "no_share_decoder_input_output_embed"),
)


def decoder_settings(options: Any, vocab_size: int, parallel: ExpertParallelism | None = None) -> DecoderSettings:
    """Returns everything that a decoder is built from, its flags checked.

    Raises:
        UserError: naming the flag, its value and the rule, for anything contradictory or impossible.
    """
    _check_causal(options)
    return DecoderSettings(
        **_shared_settings(options),
        parallel=parallel,
        feed_forward=_feed_forward(options),
        share_decoder_input_output_embed=not options.no_share_decoder_input_output_embed,
        max_target_positions=options.max_target_positions or options.tokens_per_sample,
        vocab_size=vocab_size,
    )


def encoder_settings(options: Any, vocab_size: int, parallel: ExpertParallelism | None = None) -> EncoderSettings:
    """Returns everything that a BEiT-3 encoder is built from; fails as ``decoder_settings`` does."""
    kind = _feed_forward(options)
    if _text(options.mhmoe_modality_experts) == "separate":
        if kind != "moe":
            raise UserError(f"--mhmoe-modality-experts separate cannot be combined with --mhmoe-routing {kind}")
        kind = "separate"
    return EncoderSettings(**_shared_settings(options), parallel=parallel, feed_forward=kind, vocab_size=vocab_size)


def moe_config(options: Any) -> MHMoEConfig | None:
    """Returns the MoE layers' configuration, its budget spent, or None for a dense model; fails as the decoder's."""
    check_flags(options)
    return _moe_config(options)


def context_of(options: Any) -> int:
    """Positions that attention is counted for; of BEiT-3 an image's with the longest text."""
    if _stack(options) == "encoder":
        return 1 + (int(options.img_size) // int(options.patch_size)) ** 2 + int(options.max_text_length)
    return int(options.tokens_per_sample)


def routes_by_domain(options: Any) -> bool:
    """Whether a model's experts are domains of the data, which its input then has to name."""
    return _text(getattr(options, "mhmoe_routing", None)) in DOMAIN


def shared_out(options: Any) -> str:
    """Returns what processes of a training share, of ``PARALLELISMS``."""
    return _text(options.mhmoe_parallel) or "experts"


def expert_parallel_size(
    num_experts: int,
    asked: int | None,
    world_size: int,
    processes: str = "the number of processes",
    what: str = "the number of experts",
) -> int:
    """How many of ``world_size`` data-parallel processes share one bank of experts: as asked, or as many as possible.

    Raises:
        UserError: if ``asked`` divides the experts (or ``what`` is shared out) or the processes, called so in the
            message, unevenly.
    """
    if asked is None:
        return math.gcd(num_experts, world_size)
    check_flag("mhmoe_expert_parallel_size", asked)
    for name, number in ((what, num_experts), (processes, world_size)):
        if number % asked:
            raise UserError(f"--mhmoe-expert-parallel-size ({asked}) must divide {name} ({number})")
    return asked


# ---------------------------------------------------------------------- the transformer


def _shared_settings(options: Any) -> dict[str, Any]:
    """What decoders and encoders have in common, from flags that are checked here."""
    check_flags(options)
    _check_stack(options)
    own = {entry.name: _value(options, entry) for entry in _entries(options) if entry.metadata["stack"]}
    quantize_maps = _text(options.mhmoe_quantize) == "all"
    return {**own, "moe": _moe_config(options), "subln": _has_subln(options), "quantize_maps": quantize_maps}


def _feed_forward(options: Any) -> str:
    """Which layer stands in a model for what ``--mhmoe-routing`` names."""
    routing = _text(options.mhmoe_routing)
    return routing if routing in ("torchscale", *MERGINGS) else "moe"


def _check_causal(options: Any) -> None:
    """Refuse, for a language model, routing by which a position depends on what follows it."""
    routing = _text(options.mhmoe_routing) or ""
    kind: type[Gate] | type[MergedLayer] | None = GATES.get(routing) or MERGINGS.get(routing)
    if kind is not None and kind.sees_later:
        raise UserError(f"--mhmoe-routing {routing} is for BEiT-3 and not for language models: {kind.sees_later}")


def _check_stack(options: Any) -> None:
    stack = _stack(options)
    width, heads = _size(options, "embed_dim"), _size(options, "attention_heads")
    if width % heads:
        raise UserError(f"--{stack}-attention-heads ({heads}) must divide --{stack}-embed-dim ({width})")
    for one, other in _CONTRADICTIONS:
        if getattr(options, one, None) and getattr(options, other, None):
            raise UserError(f"{flag(one)} and {flag(other)} contradict each other")
    if stack == "encoder":
        if options.img_size % options.patch_size:
            raise UserError(f"--patch-size ({options.patch_size}) must divide --img-size ({options.img_size})")
        if _text(options.mhmoe_routing) == "torchscale":
            raise UserError(
                "--mhmoe-routing torchscale is for language models: TorchScale's encoder refuses MoE layers for two "
                "modalities; use --mhmoe-routing capacity, which makes the same choices"
            )
        if _text(options.mhmoe_routing) == "lory":
            raise UserError(
                "--mhmoe-routing lory is for language models: an image and its text are no sequence of segments; use "
                "--mhmoe-routing smear, which merges experts for each example"
            )
        if routes_by_domain(options):
            raise UserError("--mhmoe-routing domain is for language models: images with texts have no domains")


def _has_subln(options: Any) -> bool:
    return bool(options.subln) or not (options.no_subln or options.rms_norm or options.deepnorm)


# ---------------------------------------------------------------------- the MoE layers


def _moe_config(options: Any) -> MHMoEConfig | None:
    if not options.moe_freq:
        _check_dense(options)
        return None
    if not 1 <= options.moe_freq <= _size(options, "layers"):
        layers = f"--{_stack(options)}-layers ({_size(options, 'layers')})"
        raise UserError(f"--moe-freq ({options.moe_freq}) must be 0 or at most {layers}")
    _check_moe(options)
    with _flags_for_fields(options):
        moe = _with_budget(options).sharing(options.mhmoe_shared_experts or 0)
        if _text(options.mhmoe_routing) == "torchscale":
            check_supported(moe)
        return moe


def _with_budget(options: Any) -> MHMoEConfig:
    """The layer as the flags say, or of the width that spends what the one-head layer of the same flags spends.

    Of ``--mhmoe-granularity`` the latter has nothing: what experts cost does not depend on it.
    """
    fields = _layer_fields(options)
    names = [entry.metadata["layer"] for entry in _entries(options) if entry.metadata["needs"] == "heads"]
    of_heads = {name: fields.pop(name) for name in names if name in fields}
    heads = of_heads.pop("num_heads")
    # Not given: biases as everywhere, under a budget, too.
    of_heads.setdefault("projection_bias", fields["expert_bias"])
    kind = MergedConfig if _text(options.mhmoe_routing) in MERGINGS else MHMoEConfig
    reference = kind(num_heads=1, **fields, **_preset(options, heads=1))
    changes = {"num_projection_layers": 1, **of_heads, **_preset(options, heads)}
    plain = kind(num_heads=heads, **{**fields, **changes})
    budget, times = _text(options.mhmoe_budget) or "none", options.mhmoe_granularity or 1
    if budget == "none" or plain.num_params() == reference.num_params():
        return plain.finer(times)
    changes |= {"num_experts": times * plain.num_experts, "top_k": times * plain.top_k}

    def matching(multiple: int) -> MHMoEConfig:
        spent = cast(Literal["params", "flops"], budget)
        return kind.matching(reference, budget=spent, num_heads=heads, multiple_of=multiple, **changes)

    for multiple in _WIDTH_MULTIPLES:
        try:
            found = matching(multiple)
        except ConfigError as error:
            problem = ConfigError(error.field, error.value, f"{error.rule}; or set the width yourself: --moe-ffn-dim")
            continue
        if times == 1 or abs(found.expert_ffn_dim / matching(1).expert_ffn_dim - 1) <= _NARROW_ROUNDING:
            return found
    raise problem


def _layer_fields(options: Any) -> dict[str, Any]:
    """The fields of ``MHMoEConfig`` that flags set; those that are not given keep the layer's own default."""
    values: dict[str, Any] = {
        "expert_ffn_dim": _size(options, "ffn_embed_dim"),
        "expert_layernorm": _has_subln(options),
    }
    for entry in _entries(options):
        layer, value = entry.metadata["layer"], _value(options, entry)
        if layer is not None and value is not None:
            values[layer] = entry.metadata["values"].get(value, value)
    if _text(options.mhmoe_routing) == "smear":
        values["segment_length"] = context_of(options)
    if routes_by_domain(options):
        values["router"] = "domain"
    if _text(options.mhmoe_routing) in (None, "dropless"):  # without effect there; the warning is given
        values.pop("second_expert_policy", None)
    return values


def _preset(options: Any, heads: int) -> dict[str, Any]:
    """The router's fields that ``--mhmoe-router-preset`` sets."""
    if _text(options.mhmoe_router_preset) != "p1":
        return {}
    return {"router_dim": max(1, round(16 / heads)), "router_normalize": "both", "router_temperature": 0.3}


def _check_dense(options: Any) -> None:
    """Refuse our flags of MoE layers in a model without; warn of the lineage's."""
    if _text(options.mhmoe_quantize) == "experts":
        raise UserError("--mhmoe-quantize (experts) needs MoE layers, but the model is dense (--moe-freq 0): take all")
    for name in _given(options, "moe", "heads", "capacity", "lory", "xmoe"):
        if not name.startswith("mhmoe_"):
            logger.warning(f"{flag(name)} has no effect: the model is dense (--moe-freq 0)")
        elif name != "mhmoe_router" or _text(options.mhmoe_router) != "arch":
            raise UserError(
                f"{flag(name)} needs MoE layers, but the model is dense (--moe-freq 0): take smoe_*, xmoe_* or mhmoe_*"
            )


def _check_moe(options: Any) -> None:
    """Refuse flags that contradict each other."""
    budget, routing = (_text(getattr(options, f"mhmoe_{name}")) for name in ("budget", "routing"))
    if options.moe_top1_expert and options.moe_top_k != 1:
        raise UserError(f"--moe-top1-expert contradicts --moe-top-k {options.moe_top_k}")
    if options.moe_ffn_dim is not None and budget not in (None, "none"):
        raise UserError(
            f"--moe-ffn-dim ({options.moe_ffn_dim}) sets the expert width, as does --mhmoe-budget {budget}: give one"
        )
    _check_router(options, _text(options.mhmoe_router))
    _check_heads(options)
    _check_capacity(options, routing)
    _check_merging(options, routing)
    if routing in GATES and GATES[routing].chooses_all and _text(options.mhmoe_normalize_gates) == "on":
        raise UserError(
            f"--mhmoe-normalize-gates (on) contradicts --mhmoe-routing {routing}, by which a gate weight is the score "
            "of one expert, whatever others are used"
        )
    top_k = options.moe_top_k * (options.mhmoe_granularity or 1)
    if routing is not None and options.moe_normalize_gate_prob_before_dropping and top_k == 1:
        logger.warning("--moe-normalize-gate-prob-before-dropping has no effect with one expert per sub-token")


def _check_router(options: Any, router: str | None) -> None:
    if router in BENCHMARK_ROUTERS.values():
        name = next(name for name, layer in BENCHMARK_ROUTERS.items() if layer == router)
        raise UserError(
            f"--mhmoe-router ({router}) chooses experts whatever the input, so that no model learns by it: where only "
            f"speed is measured, give {name}"
        )
    if options.use_xmoe and router != "xmoe":
        raise UserError(f"--use-xmoe contradicts --mhmoe-router {router}")
    if routes_by_domain(options) and router != "linear":
        raise UserError(f"--mhmoe-router ({router}) contradicts --mhmoe-routing domain, which has none: take smoe_*")
    of_router = _given(options, "xmoe")
    if of_router and router != "xmoe":
        raise UserError(f"{flag(of_router[0])} needs --mhmoe-router xmoe, not {router}")
    if len(of_router) > 1 and of_router[0] == "mhmoe_router_preset":
        raise UserError(f"--mhmoe-router-preset sets what {flag(of_router[1])} sets: give one")


def _check_heads(options: Any) -> None:
    """Refuse heads spread over processes where they have no experts of their own, or a sequence is not whole."""
    if _text(options.mhmoe_parallel) != "heads":
        return
    if _text(options.mhmoe_expert_banks) != "per-head" or options.mhmoe_heads_number < 2:
        raise UserError("--mhmoe-parallel (heads) needs --mhmoe-expert-banks per-head and two heads or more")
    if _text(options.mhmoe_balance_scope) == "sequence":
        raise UserError(
            "--mhmoe-balance-scope (sequence) contradicts --mhmoe-parallel heads: a process has some heads of each"
        )


def _check_capacity(options: Any, routing: str | None) -> None:
    for name in _given(options, "capacity"):
        if routing == "expert-choice" and name == "mhmoe_capacity_factor":  # sub-tokens that an expert takes
            continue
        if routing not in (None, *_WITH_CAPACITY) or (routing is None and name.startswith("mhmoe_")):
            kind = routing or "dropless"
            raise UserError(f"{flag(name)} is about capacity; it contradicts {kind} routing (--mhmoe-routing)")
        if routing is None:
            logger.warning(f"{flag(name)} has no effect: routing is dropless (see --mhmoe-routing capacity)")


def _check_merging(options: Any, routing: str | None) -> None:
    for name in _given(options, "lory"):
        if routing != "lory":
            raise UserError(f"{flag(name)} needs --mhmoe-routing lory, not {routing or 'dropless'}")
    for name in ("mhmoe_granularity", "mhmoe_expert_parallel_size"):
        value = getattr(options, name, None) or 1
        if routing in MERGINGS and value > 1:
            raise UserError(
                f"{flag(name)} ({value}) must be 1 with --mhmoe-routing {routing}: every token passes a network "
                "averaged over all experts"
            )


@contextlib.contextmanager
def _flags_for_fields(options: Any) -> Iterator[None]:
    """A field that a layer's configuration refuses is called by its flag, with the flag's value where it is given."""
    try:
        yield
    except ConfigError as error:
        entries = {entry.metadata["layer"]: entry for entry in _entries(options)}
        own = {name: f"mhmoe_{name}" for name in ("budget", "granularity", "shared_experts")}
        flags = {**own, **{layer: entry.name for layer, entry in entries.items()}}
        given = _value(options, entries[error.field]) if error.field in entries else None
        named = ConfigError(error.field, given or error.value, error.rule)
        raise UserError(named.message(lambda field: flag(flags[field]) if field in flags else field)) from error


# ---------------------------------------------------------------------- helpers


def _text(choice: Any) -> str | None:
    """A choice as plain text: fairseq hands over enum members or strings."""
    return None if choice is None else str(choice)


def _stack(options: Any) -> str:
    """How the flags of sizes begin."""
    return "decoder" if getattr(options, "encoder_layers", None) is None else "encoder"


def _size(options: Any, name: str) -> int:
    return getattr(options, f"{_stack(options)}_{name}")


def _entries(options: Any) -> list[dataclasses.Field]:
    """The fields that are options, in their order."""
    kind = LanguageModelOptions if _stack(options) == "decoder" else BEiT3Options
    return [entry for entry in dataclasses.fields(kind) if entry.metadata]


def _value(options: Any, entry: dataclasses.Field) -> Any:
    """Plain data: of a switch whether it is given, else None for what is not given."""
    value = getattr(options, entry.name)
    if bool in (entry.type, *typing.get_args(entry.type)):
        return bool(value)
    return value if value is None or isinstance(value, (int, float)) else str(value)


def _given(options: Any, *needs: str) -> list[str]:
    """Names of the flags that are given and need one of these, in their order."""
    names = [entry.name for entry in _entries(options) if entry.metadata["needs"] in needs]
    return [name for name in names if getattr(options, name, None) not in (None, False)]
