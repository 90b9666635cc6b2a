"""``mhmoe plan``: an architecture beside its baselines, without allocating weights.

Parameters and FLOPs; with ``--ranks`` the memory, traffic and time of a training on many ranks, too.
"""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from ..analysis.plan.table_11 import P1, PAPER_VISUAL_TOKENS, PAPER_VOCAB_SIZES
from ..common.arguments import ArgumentParser, output_file, real, whole
from ..common.console import say
from ..common.errors import UserError
from ..common.files import write_json
from ..common.tables import MISSING, columns_table, markdown_table, millions

if TYPE_CHECKING:
    from ..analysis.plan.planning import PlanRow, PlanSettings

# The same as a flag of the model; of sizes as the decoder's or the encoder's, whichever the architecture has.
_SHORT_FLAGS = {"--heads": "mhmoe_heads_number", "--top-k": "moe_top_k", "--ep": "mhmoe_expert_parallel_size"}
_SHORT_SIZES = {"--layers": "layers", "--embed-dim": "embed_dim", "--ffn-dim": "ffn_embed_dim"}
_CLUSTER_FLAGS = {
    "--ranks": (whole(), None, "W", "processes, one for each device; --ep of them share experts"),
    "--ranks-per-node": (whole(), 8, "N", "consecutive ranks on one machine"),
    "--tokens-per-rank": (whole(), 4096, "T", "in one micro-batch, without padding"),
    "--link": (real(above=0), 300, "GB/S", "gigabytes a second that a rank sends inside its node"),
    "--network": (
        real(above=0), 100, "GBIT/S", "gigabits a second that a node sends to all others, for all its ranks together"
    ),
    "--tflops": (real(above=0), None, "TFLOPS", "what a rank reaches in training; adds the time of computing"),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``mhmoe plan`` alone, and short names; ``parse_rest`` reads the model's flags."""
    parser.add_argument("--arch", default="mhmoe_lm_base", help="named architecture; its baselines come with it")
    parser.add_argument(
        "--experts", type=whole(), nargs="+", metavar="E",
        help="numbers of experts (default: --moe-expert-count, else 8)",
    )  # fmt: skip
    parser.add_argument("--vocab-size", type=whole(), help="entries of the dictionary (default: the paper's)")
    parser.add_argument(
        "--tokens-per-sample", type=whole(), default=1024, help="tokens per block, for attention's FLOPs"
    )
    parser.add_argument(
        "--visual-tokens", type=whole(), default=PAPER_VISUAL_TOKENS, help="BEiT-3: codes of the visual tokenizer"
    )
    parser.add_argument("--img-size", type=whole(), help="BEiT-3: side of an image")
    parser.add_argument("--patch-size", type=whole(), help="BEiT-3: side of a patch")
    parser.add_argument("--max-text-length", type=whole(), help="BEiT-3: longest text, in tokens")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the numbers there, too")
    parser.add_argument(
        "--help-model", action="store_true", help="list the model's flags, all of which are taken as in fairseq-train"
    )
    short = parser.add_argument_group("short names")
    for flag, name in _SHORT_FLAGS.items():
        short.add_argument(flag, dest=name, type=whole(), help=f"the same as --{name.replace('_', '-')}")
    for flag, name in _SHORT_SIZES.items():
        words = name.replace("_", "-")
        short.add_argument(flag, dest=name, type=whole(), help=f"the same as --decoder-{words} or --encoder-{words}")
    short.add_argument(
        "--budget", dest="mhmoe_budget", choices=("none", "params", "flops"), help="the same as --mhmoe-budget"
    )
    ranks = parser.add_argument_group("many ranks: memory, all-to-all and time of a training on them")
    for flag, (kind, default, metavar, text) in _CLUSTER_FLAGS.items():
        ranks.add_argument(flag, type=kind, default=default, metavar=metavar, help=text)
    ranks.add_argument("--cpu", action="store_true", help="activation memory as on CPUs, whose experts keep less")


def _model_parser() -> ArgumentParser:
    from fairseq.dataclass.utils import gen_parser_from_dataclass

    from ..models.options import EncoderOptions, LanguageModelOptions

    parser = ArgumentParser(prog="mhmoe plan", usage="the model's flags, as in fairseq-train", add_help=False)
    gen_parser_from_dataclass(parser, LanguageModelOptions())
    gen_parser_from_dataclass(parser, EncoderOptions())
    return parser


def parse_rest(args: argparse.Namespace, words: list[str]) -> None:
    """Read the model's flags into ``args``."""
    _model_parser().parse_args(words, args)


def run(args: argparse.Namespace) -> int:
    """Print the plan; ``UserError`` for an unknown architecture, or anything that building the model refuses."""
    from ..analysis.plan.planning import plan
    from ..analysis.plan.ranks import describe_ranks

    if args.help_model:
        say(_model_parser().format_help())
        return 0
    settings = _settings(args)
    rows = plan(settings)
    say(describe(rows, settings))
    if settings.cluster is not None:
        recompute = settings.flags.get("checkpoint_activations", False)
        plans = [row.ranks for row in rows if row.ranks is not None]
        say("\n" + describe_ranks(plans, settings.cluster, recompute=recompute))
    if args.json:
        write_json(args.json, [_as_json(row) for row in rows])
    return 0


def _settings(args: argparse.Namespace) -> "PlanSettings":
    from ..analysis.plan.planning import PlanSettings
    from ..analysis.plan.ranks import Cluster
    from ..models.architectures import named_architecture

    kind = named_architecture(args.arch).kind
    if args.ranks is not None and kind != "lm":
        raise UserError(f"--ranks plans language models, not --arch {args.arch}")
    if args.experts and args.moe_expert_count:
        raise UserError("--experts and --moe-expert-count both set the number of experts: give one")
    cluster = None
    if args.ranks is not None:
        link, network, flops = args.link * 1e9, args.network * 1e9 / 8, args.tflops and args.tflops * 1e12
        cluster = Cluster(args.ranks, args.ranks_per_node, args.tokens_per_rank, link, network, flops)
    elif given := [flag for flag, (_, default, *_) in _CLUSTER_FLAGS.items() if _value(args, flag) != default]:
        raise UserError(f"{given[0]} ({_value(args, given[0])}) needs --ranks")
    elif args.mhmoe_expert_parallel_size is not None or args.cpu:
        raise UserError(f"{'--cpu' if args.cpu else '--mhmoe-expert-parallel-size'} needs --ranks")
    return PlanSettings(
        arch=args.arch,
        vocab_size=args.vocab_size or PAPER_VOCAB_SIZES[kind],
        experts=tuple(args.experts or [8 if args.moe_expert_count is None else args.moe_expert_count]),
        flags=_model_flags(args, kind),
        tokens_per_sample=args.tokens_per_sample,
        num_visual_tokens=args.visual_tokens,
        cluster=cluster,
        cpu=args.cpu,
    )


def _value(args: argparse.Namespace, flag: str) -> Any:
    return getattr(args, flag.removeprefix("--").replace("-", "_"))


def _model_flags(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """The model's flags that are given, the short sizes by their long names."""
    from ..models.architectures import KINDS
    from ..models.options import options_with

    given = {
        name: getattr(args, name, None) for name in set(options_with()) - {"tokens_per_sample", "moe_expert_count"}
    }
    sizes = {f"{KINDS[kind].stack}_{name}": getattr(args, name) for name in _SHORT_SIZES.values()}
    given |= {name: value for name, value in sizes.items() if value is not None}
    return {name: value for name, value in given.items() if value is not None and value is not False}


def describe(rows: "list[PlanRow]", settings: "PlanSettings") -> str:
    """The tables and how to read them."""
    kind = settings.architecture.kind
    has_paper = any(row.paper for row in rows)
    header = ["model", "experts", "expert width", "top-k", "non-expert", "expert", "sum", "active", "MFLOPs/token"]
    cells = [_cells(row) for row in rows]
    if has_paper:
        header += ["paper: non-expert", "expert", "sum"]
        for line, row in zip(cells, rows):
            line += [f"{value:,}M" for value in row.paper] if row.paper else [MISSING] * 3
    embedding, flops = {
        "lm": ("tied embedding", "forward pass, matrix products only, causal attention within {:,} tokens."),
        "beit3": (
            "text head of its own",
            "one position's forward pass through the encoder, matrix products only, attention over {:,} positions.",
        ),
    }[kind]
    notes = [
        "sum: all parameters. active: without the experts that a sub-token's K choices leave out.",
        f"MFLOPs/token: {flops.format(rows[0].counts.context)}",
        *(f"{row.family}: {row.note}" for row in rows if row.note),
    ]
    if has_paper:
        notes.append(f"paper: {P1}, table 11, in millions as printed there; all other columns are ours.")
    head = f"{settings.arch}, vocabulary {settings.vocab_size:,}, {embedding}; parameters counted on the model's own "
    paragraphs = [f"{head}modules", markdown_table(header, cells), "\n".join(notes)]
    if kind == "beit3":
        parts = list(dict.fromkeys(part for row in rows for part in row.parts))
        columns = {"part": parts}
        for row in rows:
            name = row.family if row.experts is None else f"{row.family} {row.experts}"
            columns[name] = [millions(row.parts.get(part)) for part in parts]
        paragraphs.append(columns_table(columns))
        if has_paper:
            told = "The paper's own text does not say how its multimodal rows come about; ours are not fitted to them."
            paragraphs.append(told)
    return "\n\n".join(paragraphs)


def _cells(row: "PlanRow") -> list[str]:
    counts, moe = row.counts, row.counts.moe
    return [
        row.family,
        MISSING if moe is None else moe.experts_in_words,
        MISSING if moe is None else f"{moe.expert_ffn_dim:,}",
        MISSING if moe is None else f"{moe.top_k}",
        millions(counts.non_expert),
        millions(counts.expert),
        millions(counts.total),
        millions(counts.active),
        f"{counts.flops_per_token / 1e6:,.1f}",
    ]


def _as_json(row: "PlanRow") -> dict[str, Any]:
    counts, moe = row.counts, row.counts.moe
    return {
        "family": row.family,
        "experts_asked_for": row.experts,
        **{
            name: getattr(moe, name, None)
            for name in ("num_experts", "num_banks", "expert_ffn_dim", "top_k", "num_heads")
        },
        "non_expert_params": counts.non_expert,
        "expert_params": counts.expert,
        "total_params": counts.total,
        "active_params": counts.active,
        "flops_per_token": counts.flops_per_token,
        "context": counts.context,
        "params_by_part": row.parts,
        "paper_millions": row.paper and dict(zip(("non_expert", "expert", "total"), row.paper)),
        "ranks": None if row.ranks is None else dataclasses.asdict(row.ranks),
    }
