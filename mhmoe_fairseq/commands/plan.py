"""``mhmoe plan``: an architecture beside its baselines, without allocating weights.

Parameters and FLOPs; with ``--ranks`` the memory, traffic and time of a training on many ranks, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from fairseq.data import Dictionary
from fairseq.dataclass.utils import gen_parser_from_dataclass

from ..analysis.plan.cluster import Cluster
from ..analysis.plan.many_ranks import RankPlan, describe_ranks, plan_ranks
from ..analysis.plan.many_ranks import as_json as ranks_as_json
from ..analysis.plan.model_shape import ModelShape, shape_of
from ..analysis.reports.paper_numbers import (
    P1,
    TABLE_11,
    TABLE_11_DENSE,
    TABLE_11_MULTIMODAL,
    TABLE_11_MULTIMODAL_DENSE,
    ParameterRow,
)
from ..checkpoints.parts import count_parts
from ..common.arguments import output_file, real, whole
from ..common.console import say
from ..common.errors import UserError
from ..common.files import write_json
from ..common.tables import MISSING, markdown_table, millions
from ..models.architectures import architecture_options
from ..models.counts import (
    ModelCounts,
    blank_dictionary,
    build_on_meta,
    context_of,
    count_built,
)
from ..models.flags import moe_config
from ..models.options import BEiT3Options, EncoderOptions, LanguageModelOptions, MoEOptions

# GPT-4's vocabulary, which P1's table 11 fits.
PAPER_VOCAB_SIZE = 100_277
# What only MH-MoE has; its one-head reference is built without.
_MHMOE_ONLY = {
    "mhmoe_heads_number",
    "mhmoe_budget",
    "mhmoe_projection_layers",
    "mhmoe_head_projection",
    "mhmoe_merge_projection",
    "mhmoe_projection_bias",
    "mhmoe_no_split",
    "mhmoe_subtoken_residual",
}
_SHORT_FLAGS = {"--heads": "mhmoe_heads_number", "--top-k": "moe_top_k", "--ep": "mhmoe_expert_parallel_size"}
# Of the decoder or the encoder, as the architecture has one or the other.
_SHORT_SIZES = {"--layers": "layers", "--embed-dim": "embed_dim", "--ffn-dim": "ffn_embed_dim"}
_IMAGE_FLAGS = ("img_size", "patch_size", "max_text_length")
_NAMED = re.compile("(dense|smoe|xmoe|mhmoe)_((lm|beit3)_[a-z]+)")


@dataclass(frozen=True)
class Kind:
    """What is planned: language models or BEiT-3, and P1's table 11 about them.

    Attributes:
        options: the flags.
        stack: how the flags of sizes begin.
        vocab_size: of P1's model.
        dense, sparse: P1's sums in millions, the second by family and experts.
        embedding: what the text's embedding shares with the output.
    """

    options: type[MoEOptions]
    stack: str
    vocab_size: int
    dense: int
    sparse: dict[str, dict[int, ParameterRow]]
    embedding: str

    @property
    def paper_flags(self) -> dict[str, Any]:
        """The settings of P1's table; flags that say the same leave the paper's figures in place."""
        own = {"mhmoe_heads_number": 4, "moe_top_k": 2, "mhmoe_budget": "params", f"{self.stack}_ffn_embed_dim": 3072}
        return {**own, "img_size": 224, "patch_size": 16}


KINDS = {
    "lm": Kind(LanguageModelOptions, "decoder", PAPER_VOCAB_SIZE, TABLE_11_DENSE, TABLE_11, "tied embedding"),
    "beit3": Kind(
        BEiT3Options, "encoder", 64_010, TABLE_11_MULTIMODAL_DENSE, TABLE_11_MULTIMODAL, "text head of its own"
    ),
}
# Codes of BEiT v2's visual tokenizer.
PAPER_VISUAL_TOKENS = 8192


@dataclass(frozen=True)
class PlanRow:
    """One model: its family, the experts asked for, its counts, also by part, and P1's figures for the same settings.

    With a cluster ``ranks`` is its plan there, made for its ``shape``, and ``note`` says so if a budget's experts had
    to be rounded for it.
    """

    family: str
    experts: int | None
    counts: ModelCounts
    shape: ModelShape | None
    paper: ParameterRow | None
    parts: dict[str, int]
    ranks: RankPlan | None = None
    note: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``mhmoe plan``: its own, short names, and every model flag of ``fairseq-train``."""
    parser.add_argument("--arch", default="mhmoe_lm_base", help="named architecture; its baselines come with it")
    parser.add_argument(
        "--experts",
        type=whole(),
        nargs="+",
        metavar="E",
        help="numbers of experts (default: --moe-expert-count, else 8)",
    )
    parser.add_argument("--vocab-size", type=whole(), help="entries of the dictionary (default: the paper's)")
    parser.add_argument(
        "--tokens-per-sample", type=whole(), default=1024, help="tokens per block, for attention's FLOPs"
    )
    parser.add_argument(
        "--visual-tokens", type=whole(), default=PAPER_VISUAL_TOKENS, help="BEiT-3: codes of the visual tokenizer"
    )
    for name, what in zip(_IMAGE_FLAGS, ("side of an image", "side of a patch", "longest text, in tokens")):
        parser.add_argument(f"--{name.replace('_', '-')}", type=whole(), help=f"BEiT-3: {what}")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures there, too")
    short = parser.add_argument_group("short names")
    for flag, name in _SHORT_FLAGS.items():
        short.add_argument(flag, dest=name, type=whole(), help=f"the same as --{name.replace('_', '-')}")
    for flag, name in _SHORT_SIZES.items():
        words = name.replace("_", "-")
        short.add_argument(flag, dest=name, type=whole(), help=f"the same as --decoder-{words} or --encoder-{words}")
    short.add_argument(
        "--budget", dest="mhmoe_budget", choices=("none", "params", "flops"), help="the same as --mhmoe-budget"
    )
    _add_cluster_arguments(parser.add_argument_group("many ranks: memory, all-to-all and time of a training on them"))
    model = parser.add_argument_group("the model, as in fairseq-train")
    gen_parser_from_dataclass(model, LanguageModelOptions())
    gen_parser_from_dataclass(model, EncoderOptions())


def _add_cluster_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ranks", type=whole(), metavar="W", help="processes, one for each device; --ep of them share experts"
    )
    group.add_argument(
        "--ranks-per-node", type=whole(), default=8, metavar="N", help="consecutive ranks on one machine"
    )
    group.add_argument(
        "--tokens-per-rank", type=whole(), default=4096, metavar="T", help="in one micro-batch, without padding"
    )
    group.add_argument(
        "--link",
        type=real(above=0),
        default=300,
        metavar="GB/S",
        help="gigabytes a second that a rank sends inside its node",
    )
    group.add_argument(
        "--network", type=real(above=0), default=100, metavar="GBIT/S",
        help="gigabits a second that a node sends to all others, for all its ranks together",
    )  # fmt: skip
    group.add_argument(
        "--tflops",
        type=real(above=0),
        metavar="TFLOPS",
        help="what a rank reaches in training; adds the time of computing",
    )
    group.add_argument("--cpu", action="store_true", help="activation memory as on CPUs, whose experts keep less")


def run(args: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        ValueError: for an unknown architecture, or anything that building the model refuses.
    """
    kind = KINDS[_named(args.arch)[2]]
    vocab_size = args.vocab_size or kind.vocab_size
    dictionary = blank_dictionary(vocab_size)
    cluster = _cluster(args)
    if cluster is not None and kind.options is BEiT3Options:
        raise UserError(f"--ranks plans language models, not --arch {args.arch}")
    flags = _model_flags(args, kind)
    rows = plan(
        args.arch, _experts(args), dictionary, args.tokens_per_sample, flags, cluster, args.cpu, args.visual_tokens
    )
    say(describe(rows, args.arch, vocab_size, kind))
    plans = [row.ranks for row in rows if row.ranks is not None]
    if cluster is not None:
        shape = rows[-1].shape
        assert shape is not None, "planned for a cluster"
        say("\n" + describe_ranks(plans, cluster, half=shape.half, recompute=shape.recompute))
    if args.json:
        write_json(args.json, [_as_json(row) for row in rows])
    return 0


def plan(
    arch: str,
    experts: list[int],
    dictionary: Dictionary,
    tokens_per_sample: int,
    flags: dict[str, Any],
    cluster: Cluster | None = None,
    cpu: bool = False,
    num_visual_tokens: int = PAPER_VISUAL_TOKENS,
) -> list[PlanRow]:
    """Count ``arch`` and its baselines (dense, and the one-head reference of MH-MoE) for every number of experts.

    Raises:
        ValueError: for an unknown architecture, or anything that building the model refuses.
    """
    family, size, name = _named(arch)
    kind = KINDS[name]
    families = {"dense": ["dense"], "mhmoe": ["dense", "xmoe", "mhmoe"]}.get(family, ["dense", family])
    is_paper = (
        size == f"{name}_base"
        and len(dictionary) == kind.vocab_size
        and num_visual_tokens == PAPER_VISUAL_TOKENS
        and flags.items() <= kind.paper_flags.items()
    )
    rows = []
    for member in families:
        for count in [None] if member == "dense" else experts:
            kept = flags if member == family else _flags_of(member, flags)
            parallel = 1
            if cluster is not None and count is not None:
                parallel = cluster.expert_parallel_size(flags.get("mhmoe_expert_parallel_size"), count)
            options, note = _options(f"{member}_{size}", kept, count, parallel)
            if isinstance(options, LanguageModelOptions):
                options.tokens_per_sample = tokens_per_sample
            model = build_on_meta(options, dictionary, num_visual_tokens)
            counts, shape, ranks = count_built(model, context_of(options)), None, None
            if cluster is not None:
                shape = shape_of(model)
                label = member if count is None or len(experts) == 1 else f"{member} {count:,}"
                ranks = plan_ranks(label, counts, shape, cluster, parallel, cpu=cpu)
            paper = _paper_row(kind, member, count) if is_paper else None
            rows.append(PlanRow(member, count, counts, shape, paper, count_parts(model), ranks, note))
    return rows


def _named(arch: str) -> tuple[str, str, str]:
    """Family, size and kind: ``mhmoe``, ``lm_base`` and ``lm``."""
    named = _NAMED.fullmatch(arch)
    if named is None:
        raise UserError(f"--arch ({arch}) must be a named architecture, such as mhmoe_lm_base or mhmoe_beit3_base")
    family, size, kind = named.groups()
    return family, size, kind


def _options(arch: str, flags: dict[str, Any], experts: int | None, parallel: int) -> tuple[MoEOptions, str | None]:
    """Filled options; experts of a budget are rounded to what ``parallel`` ranks can share, and the note says how."""
    flags = {name: value for name, value in flags.items() if name != "mhmoe_expert_parallel_size"}
    if experts is None:
        return architecture_options(arch, **flags), None
    options = architecture_options(arch, **flags, moe_expert_count=experts)
    moe = moe_config(options)
    if moe is None or moe.num_experts % parallel == 0:
        return options, None
    rounded = max(round(moe.num_experts / parallel), 1) * parallel
    fixed = {"mhmoe_budget": "none", "moe_ffn_dim": moe.expert_ffn_dim, "moe_expert_count": rounded}
    words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in fixed.items())
    note = f"the budget's {moe.num_experts:,} experts are rounded to what {parallel:,} ranks can share: {words}"
    return architecture_options(arch, **{**flags, **fixed}), note


def describe(rows: list[PlanRow], arch: str, vocab_size: int, kind: Kind) -> str:
    """The tables and how to read them."""
    has_paper = any(row.paper for row in rows)
    header = ["model", "experts", "expert width", "non-expert", "expert", "sum", "active", "MFLOPs/token"]
    if has_paper:
        header += ["paper: non-expert", "expert", "sum"]
    table = markdown_table(header, [_cells(row, has_paper) for row in rows])
    lines = [
        f"{arch}, vocabulary {vocab_size:,}, {kind.embedding}; parameters counted on the model's own modules",
        "",
        table,
        "",
        "sum: all parameters. active: without the experts that a sub-token's K choices leave out.",
        _explained_flops(rows[0].counts.context, kind),
        *(f"{row.family}: {row.note}" for row in rows if row.note),
    ]
    if has_paper:
        lines.append(f"paper: {P1}, table 11, in millions as printed there; all other columns are ours.")
    if kind.options is BEiT3Options:
        lines += ["", _parts_table(rows)]
        if has_paper:
            lines += [
                "",
                "The paper's own text does not say how its multimodal rows come about; ours are not fitted to them.",
            ]
    return "\n".join(lines)


def _explained_flops(context: int, kind: Kind) -> str:
    if kind.options is BEiT3Options:
        return (
            "MFLOPs/token: one position's forward pass through the encoder, matrix products only, attention over "
            f"{context:,} positions."
        )
    return f"MFLOPs/token: forward pass, matrix products only, causal attention within {context:,} tokens."


def _parts_table(rows: list[PlanRow]) -> str:
    """Parameters by part, a column for each model."""
    parts = list(dict.fromkeys(part for row in rows for part in row.parts))
    header = ["part", *(row.family if row.experts is None else f"{row.family} {row.experts}" for row in rows)]
    cells = [[part, *(millions(row.parts[part]) if part in row.parts else MISSING for row in rows)] for part in parts]
    return markdown_table(header, cells)


def _cluster(args: argparse.Namespace) -> Cluster | None:
    if args.ranks is None:
        if args.mhmoe_expert_parallel_size is not None:
            raise UserError("--mhmoe-expert-parallel-size needs --ranks")
        return None
    return Cluster(
        ranks=args.ranks,
        ranks_per_node=args.ranks_per_node,
        tokens=args.tokens_per_rank,
        link=args.link * 1e9,
        network=args.network * 1e9 / 8,
        flops=None if args.tflops is None else args.tflops * 1e12,
    )


def _experts(args: argparse.Namespace) -> list[int]:
    if args.experts and args.moe_expert_count:
        raise UserError("--experts and --moe-expert-count both set the number of experts: give one")
    experts = args.experts or [args.moe_expert_count or 8]
    return experts


def _model_flags(args: argparse.Namespace, kind: Kind) -> dict[str, Any]:
    names = {field.name for options in (LanguageModelOptions, BEiT3Options) for field in dataclasses.fields(options)}
    given = {name: getattr(args, name, None) for name in names - {"_name", "tokens_per_sample", "moe_expert_count"}}
    sizes = {f"{kind.stack}_{name}": getattr(args, name) for name in _SHORT_SIZES.values()}
    given.update({name: value for name, value in sizes.items() if value is not None})
    return {name: value for name, value in given.items() if value not in (None, False)}


def _flags_of(family: str, flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that a baseline can have: none of MH-MoE's for the one-head reference, none of MoE's for dense."""
    if family == "dense":
        of_moe = ("moe_", "mhmoe_", "use_xmoe")
        return {
            name: value for name, value in flags.items() if name == "mhmoe_precision" or not name.startswith(of_moe)
        }
    return {name: value for name, value in flags.items() if name not in _MHMOE_ONLY}


def _paper_row(kind: Kind, family: str, experts: int | None) -> ParameterRow | None:
    if family == "dense":
        return ParameterRow(kind.dense, 0, kind.dense)
    return kind.sparse.get(family, {}).get(experts or 0)


def _cells(row: PlanRow, has_paper: bool) -> list[str]:
    counts, moe = row.counts, row.counts.moe
    cells = [
        row.family,
        MISSING if moe is None else f"{moe.num_experts}",
        MISSING if moe is None else f"{moe.expert_ffn_dim:,}",
        millions(counts.non_expert),
        millions(counts.expert),
        millions(counts.total),
        millions(counts.active),
        f"{counts.flops_per_token / 1e6:,.1f}",
    ]
    if has_paper:
        cells += [MISSING] * 3 if row.paper is None else [f"{value:,}M" for value in row.paper]
    return cells


def _as_json(row: PlanRow) -> dict[str, Any]:
    counts, moe = row.counts, row.counts.moe
    return {
        "family": row.family,
        "experts_asked_for": row.experts,
        "num_experts": None if moe is None else moe.num_experts,
        "expert_ffn_dim": None if moe is None else moe.expert_ffn_dim,
        "num_heads": None if moe is None else moe.num_heads,
        "non_expert_params": counts.non_expert,
        "expert_params": counts.expert,
        "total_params": counts.total,
        "active_params": counts.active,
        "flops_per_token": counts.flops_per_token,
        "context": counts.context,
        "params_by_part": row.parts,
        "paper_millions": None if row.paper is None else row.paper._asdict(),
        "ranks": None if row.ranks is None else ranks_as_json(row.ranks),
    }
