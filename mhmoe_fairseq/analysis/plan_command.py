"""``mhmoe plan``: an architecture beside its baselines, without allocating weights.

Parameters and FLOPs; with ``--ranks`` the memory, traffic and time of a training on many ranks, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq.data import Dictionary
from fairseq.dataclass.utils import gen_parser_from_dataclass

from ..data.files import write_json
from ..errors import UserError
from ..models.architectures import architecture_options
from ..models.options import LanguageModelOptions
from ..torchscale_ext.args import moe_config
from .cluster import Cluster
from .console import say
from .many_ranks import RankPlan, describe_ranks, plan_ranks
from .many_ranks import as_json as ranks_as_json
from .model_counts import ModelCounts, blank_dictionary, build_on_meta, count_built
from .model_shape import ModelShape, shape_of
from .paper_numbers import P1, TABLE_11, TABLE_11_DENSE, ParameterRow
from .tables import MISSING, markdown_table, millions

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
_SHORT_FLAGS = {
    "--heads": "mhmoe_heads_number",
    "--top-k": "moe_top_k",
    "--ffn-dim": "decoder_ffn_embed_dim",
    "--layers": "decoder_layers",
    "--embed-dim": "decoder_embed_dim",
    "--ep": "mhmoe_expert_parallel_size",
}
# The settings of P1's table 11; flags that say the same leave the paper's figures in place.
_PAPER_FLAGS = {"mhmoe_heads_number": 4, "moe_top_k": 2, "mhmoe_budget": "params", "decoder_ffn_embed_dim": 3072}
_NAMED = re.compile("(dense|smoe|xmoe|mhmoe)_(lm_[a-z]+)")


@dataclass(frozen=True)
class PlanRow:
    """One model: its family, the experts asked for, its counts, and P1's figures if they are of the same settings.

    With a cluster ``ranks`` is its plan there, and ``note`` says so if a budget's experts had to be rounded for it.
    """

    family: str
    experts: int | None
    counts: ModelCounts
    shape: ModelShape
    paper: ParameterRow | None
    ranks: RankPlan | None = None
    note: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``mhmoe plan``: its own, short names, and every model flag of ``fairseq-train``."""
    parser.add_argument("--arch", default="mhmoe_lm_base", help="named architecture; its baselines come with it")
    parser.add_argument(
        "--experts", type=int, nargs="+", metavar="E", help="numbers of experts (default: --moe-expert-count, else 8)"
    )
    parser.add_argument("--vocab-size", type=int, default=PAPER_VOCAB_SIZE, help="entries of the dictionary")
    parser.add_argument("--tokens-per-sample", type=int, default=1024, help="tokens per block, for attention's FLOPs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    short = parser.add_argument_group("short names")
    for flag, name in _SHORT_FLAGS.items():
        short.add_argument(flag, dest=name, type=int, help=f"the same as --{name.replace('_', '-')}")
    short.add_argument(
        "--budget", dest="mhmoe_budget", choices=("none", "params", "flops"), help="the same as --mhmoe-budget"
    )
    _add_cluster_arguments(parser.add_argument_group("many ranks: memory, all-to-all and time of a training on them"))
    model = parser.add_argument_group("the model, as in fairseq-train")
    gen_parser_from_dataclass(model, LanguageModelOptions())


def _add_cluster_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ranks", type=int, metavar="W", help="processes, one for each device; --ep of them share experts"
    )
    group.add_argument("--ranks-per-node", type=int, default=8, metavar="N", help="consecutive ranks on one machine")
    group.add_argument(
        "--tokens-per-rank", type=int, default=4096, metavar="T", help="in one micro-batch, without padding"
    )
    group.add_argument(
        "--link", type=float, default=300, metavar="GB/S", help="gigabytes a second that a rank sends inside its node"
    )
    group.add_argument(
        "--network", type=float, default=100, metavar="GBIT/S",
        help="gigabits a second that a node sends to all others, for all its ranks together",
    )  # fmt: skip
    group.add_argument(
        "--tflops", type=float, metavar="TFLOPS", help="what a rank reaches in training; adds the time of computing"
    )
    group.add_argument("--cpu", action="store_true", help="activation memory as on CPUs, whose experts keep less")


def run(args: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        ValueError: for an unknown architecture, or anything that building the model refuses.
    """
    dictionary = blank_dictionary(args.vocab_size)
    cluster = _cluster(args)
    rows = plan(args.arch, _experts(args), dictionary, args.tokens_per_sample, _model_flags(args), cluster, args.cpu)
    say(describe(rows, args.arch, args.vocab_size))
    plans = [row.ranks for row in rows if row.ranks is not None]
    if cluster is not None:
        shape = rows[-1].shape
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
) -> list[PlanRow]:
    """Count ``arch`` and its baselines (dense, and the one-head reference of MH-MoE) for every number of experts.

    Raises:
        ValueError: for an unknown architecture, or anything that building the model refuses.
    """
    named = _NAMED.fullmatch(arch)
    if named is None:
        raise UserError(f"--arch ({arch}) must be a named language model, such as mhmoe_lm_base or xmoe_lm_small")
    family, size = named.groups()
    families = {"dense": ["dense"], "mhmoe": ["dense", "xmoe", "mhmoe"]}.get(family, ["dense", family])
    is_paper = size == "lm_base" and len(dictionary) == PAPER_VOCAB_SIZE and flags.items() <= _PAPER_FLAGS.items()
    rows = []
    for member in families:
        for count in [None] if member == "dense" else experts:
            kept = flags if member == family else _flags_of(member, flags)
            parallel = 1
            if cluster is not None and count is not None:
                parallel = cluster.expert_parallel_size(flags.get("mhmoe_expert_parallel_size"), count)
            options, note = _options(f"{member}_{size}", kept, count, parallel)
            options.tokens_per_sample = tokens_per_sample
            model = build_on_meta(options, dictionary)
            counts, shape = count_built(model, tokens_per_sample), shape_of(model)
            ranks = None
            if cluster is not None:
                name = member if count is None or len(experts) == 1 else f"{member} {count:,}"
                ranks = plan_ranks(name, counts, shape, cluster, parallel, cpu=cpu)
            paper = _paper_row(member, count) if is_paper else None
            rows.append(PlanRow(member, count, counts, shape, paper, ranks, note))
    return rows


def _options(
    arch: str, flags: dict[str, Any], experts: int | None, parallel: int
) -> tuple[LanguageModelOptions, str | None]:
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


def describe(rows: list[PlanRow], arch: str, vocab_size: int) -> str:
    """The table and how to read it."""
    has_paper = any(row.paper for row in rows)
    header = ["model", "experts", "expert width", "non-expert", "expert", "sum", "active", "MFLOPs/token"]
    if has_paper:
        header += ["paper: non-expert", "expert", "sum"]
    table = markdown_table(header, [_cells(row, has_paper) for row in rows])
    lines = [
        f"{arch}, vocabulary {vocab_size:,}, tied embedding; parameters counted on the model's own modules",
        "",
        table,
        "",
        "sum: all parameters. active: without the experts that a sub-token's K choices leave out.",
        f"MFLOPs/token: forward pass, matrix products only, causal attention within {rows[0].counts.context:,} tokens.",
        *(f"{row.family}: {row.note}" for row in rows if row.note),
    ]
    if has_paper:
        lines.append(f"paper: {P1}, table 11, in millions as printed there; all other columns are ours.")
    return "\n".join(lines)


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
    for count in experts:
        if count < 1:
            raise UserError(f"--experts ({count}) must be at least 1")
    return experts


def _model_flags(args: argparse.Namespace) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(LanguageModelOptions)} - {"_name", "tokens_per_sample"}
    given = {name: getattr(args, name, None) for name in names - {"moe_expert_count"}}
    return {name: value for name, value in given.items() if value not in (None, False)}


def _flags_of(family: str, flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that a baseline can have: none of MH-MoE's for the one-head reference, none of MoE's for dense."""
    if family == "dense":
        of_moe = ("moe_", "mhmoe_", "use_xmoe")
        return {
            name: value for name, value in flags.items() if name == "mhmoe_precision" or not name.startswith(of_moe)
        }
    return {name: value for name, value in flags.items() if name not in _MHMOE_ONLY}


def _paper_row(family: str, experts: int | None) -> ParameterRow | None:
    if family == "dense":
        return ParameterRow(TABLE_11_DENSE, 0, TABLE_11_DENSE)
    return TABLE_11.get(family, {}).get(experts or 0)


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
        "paper_millions": None if row.paper is None else row.paper._asdict(),
        "ranks": None if row.ranks is None else ranks_as_json(row.ranks),
    }
