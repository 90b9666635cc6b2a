"""Training speed and memory of whole language models: against X-MoE, or on several processes against one."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mhmoe_fairseq.analysis.plan.ranks import Cluster, exchange
from mhmoe_fairseq.common.tables import markdown_table
from mhmoe_fairseq.models.counts import ModelCounts
from mhmoe_fairseq.models.flags import expert_parallel_size

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.console import Target, add_numbers, conclude, make_parser, report_path, run_benchmark, write_report
from bench.contenders import DTYPES, gemm_bound
from bench.timing import Pairs, take_turns, time_pairs
from bench.training import NAMES, Training, add_model_arguments, count, flags_of, train, write_zipf_data

DESCRIPTION = """\
Train language models for a few updates with fairseq-train and compare tokens per
second and peak memory:
  dense         no experts
  xmoe          X-MoE, the reference: one head
  mhmoe-params  MH-MoE with X-MoE's parameters (more work per token)
  mhmoe-flops   MH-MoE with X-MoE's FLOPs and parameters (more, smaller experts)
Each model's runs take turns with X-MoE's, so that a slow moment hits both. The
report lists the flags, which you can give to fairseq-train yourself.

With --ranks N every model's runs on N processes (torchrun, gloo, experts shared out
over all of them) take turns with its own in one process, with the same threads in
sum and the same batch per update. Both must have the same loss at the first update,
and the rows that the training says it moved stand beside those of `mhmoe plan`.
"""
EPILOG = """\
examples:
  python scripts/bench/model.py --quick
      MH-MoE (flops) against X-MoE only: the project's target
  python scripts/bench/model.py
      all four: 12 layers of 768, 8 experts, 8,000 words, 4 x 512 tokens per
      update; half an hour on two cores, and 12 GB of memory
  python scripts/bench/model.py --ranks 2 --size small --sentences 16 --models mhmoe-params
      two ranks of one thread against one process of two: the other target
  python scripts/bench/model.py --data data/english
      on the training split of a folder that `mhmoe prepare` wrote

The tokens are draws by Zipf's law unless --data is given. Weights are fresh, hence
routing is as balanced as at the start of a training.
"""
REFERENCE = "xmoe"
SPEED_TARGET = ("mhmoe-flops", 0.95)  # of X-MoE's tokens/s, at the default setting
RANKS_TARGET = 0.85  # of one process's tokens/s


@dataclass(frozen=True)
class Duel:
    """A model's runs by turns with those of its rival: seconds of an update, and the last two runs."""

    pairs: Pairs
    run: Training
    rival: Training


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(DESCRIPTION, EPILOG)
    rivals = [name for name in NAMES if name != REFERENCE]
    parser.add_argument("--quick", action="store_true", help="only mhmoe-flops against xmoe")
    parser.add_argument("--models", nargs="+", choices=rivals, default=rivals, help="what to time against its rival")
    parser.add_argument("--data", metavar="FOLDER", help="prepared data to train on, in place of synthetic tokens")
    add_numbers(parser, {"ranks": (1, "processes; from 2 on each model is compared with itself in one process")})
    add_model_arguments(parser)
    return parser


def check(args: argparse.Namespace) -> None:
    """ValueError for ranks that cannot have equal parts, or that ``--quick`` does not speak of."""
    for flag in ("sentences", "threads"):
        if getattr(args, flag) % args.ranks:
            raise ValueError(f"--{flag} ({getattr(args, flag)}) must be a multiple of --ranks ({args.ranks})")
    if args.quick and args.ranks > 1:
        raise ValueError(f"--ranks ({args.ranks}) contradicts --quick, which compares with X-MoE")


def check_same(ranks: float, alone: float) -> None:
    """Raise RuntimeError unless the first losses agree: they are of the same weights and the same tokens."""
    if abs(ranks - alone) > 1e-3 * abs(alone):
        raise RuntimeError(f"the first update's loss is {ranks:.4f} bits on the ranks and {alone:.4f} in one process")


def fight(data: str, name: str, args: argparse.Namespace, progress: tqdm) -> Duel:
    """Lets a model and its rival train by turns."""
    progress.set_description_str(f"{name} on {args.ranks} ranks / one" if args.ranks > 1 else f"{name} / {REFERENCE}")
    last: dict[int, Training] = {}

    def seconds(contender: int, model: str, ranks: int) -> float:
        last[contender] = train(data, model, args, ranks=ranks)
        return last[contender].seconds

    rival = name if args.ranks > 1 else REFERENCE
    turns = (lambda: seconds(0, name, args.ranks)), (lambda: seconds(1, rival, 1))
    pairs = take_turns(*turns, args.pairs, progress.update)
    if args.ranks > 1:
        check_same(last[0].first_loss, last[1].first_loss)
    return Duel(pairs, last[0], last[1])


def measure(data: str, args: argparse.Namespace) -> tuple[dict[str, ModelCounts], dict[str, Duel]]:
    """Returns every model's counts and duel."""
    names = [SPEED_TARGET[0]] if args.quick else args.models
    wanted = names if args.ranks > 1 else [*names, REFERENCE]
    counts = {name: count(data, name, args) for name in NAMES if name in wanted}
    with tqdm(total=len(names) * args.pairs, unit="pair", dynamic_ncols=True) as progress:
        return counts, {name: fight(data, name, args, progress) for name in names}


def time_products(shape: ModelCounts, reference: ModelCounts, args: argparse.Namespace) -> Pairs:
    """Seconds of the matrix products of all MoE layers in an update, by turns."""
    tokens = args.sentences * args.tokens_per_sample
    bounds = [gemm_bound(each.moe, tokens, DTYPES[args.precision]) for each in (shape, reference)]
    calls = [lambda b=b, n=each.moe_layers: [b() for _ in range(n)] for b, each in zip(bounds, (shape, reference))]
    return time_pairs(*calls, pairs=args.pairs)


def decide(duels: dict[str, Duel], args: argparse.Namespace) -> list[Target]:
    """Returns the target, or nothing if it was not measured, or at another setting."""
    if args.ranks > 1:
        name, limit, what = next(iter(duels)), RANKS_TARGET, f"one process's tokens/s on {args.ranks} ranks"
    else:
        (name, limit), what = SPEED_TARGET, "X-MoE's tokens/s"
        defaults = build_parser().parse_args([])
        same = ("size", "experts", "heads", "top_k", "tokens_per_sample", "vocab", "precision")
        if name not in duels or any(getattr(args, flag) != getattr(defaults, flag) for flag in same):
            return []
    speed = duels[name].pairs.swapped()
    line = f"{NAMES[name]} trains at {limit} or more of {what}: {speed.ratio:.3f} {speed.range_text()}"
    return [(line, speed.ratio >= limit)]


def speed_table(counts: dict[str, ModelCounts], duels: dict[str, Duel], args: argparse.Namespace) -> str:
    """Returns a row for each contender."""
    contenders = []
    for name, duel in duels.items():
        contenders.append((name, f", {args.ranks} ranks" if args.ranks > 1 else "", duel.pairs, duel.run))
        if args.ranks > 1:
            contenders.append((name, ", one process", Pairs(duel.pairs.second, duel.pairs.second), duel.rival))
    if args.ranks == 1:
        rivals = sum((duel.pairs.second for duel in duels.values()), ())
        contenders.append((REFERENCE, "", Pairs(rivals, rivals), duel.rival))
    rows = []
    for name, where, pairs, run in contenders:
        moe, tokens = counts[name].moe, args.sentences * args.tokens_per_sample
        experts = f"{moe.num_experts} x {moe.expert_ffn_dim}" if moe else "-"
        flops = f"{moe.flops_per_token() / 1e6:.1f}" if moe else "-"
        rows.append((
            NAMES[name] + where, f"{counts[name].total / 1e6:.1f}M", experts, flops, f"{pairs.first_median:.3f}",
            f"{tokens / pairs.first_median:.0f}", f"**{1 / pairs.ratio:.3f}**", f"{run.resident_mib:.0f}",
        ))  # fmt: skip
    head = ("model", "parameters", "experts x width", "MoE layer MFLOP/token", "s/update", "tokens/s")
    return markdown_table((*head, "of its rival's speed", "peak MiB of a process"), rows)


def products_table(counts: dict[str, ModelCounts], duels: dict[str, Duel], args: argparse.Namespace) -> str:
    """Returns what matrix products alone permit."""
    rows = []
    for name in duels:
        if counts[name].moe is not None:
            products, update = time_products(counts[name], counts[REFERENCE], args), duels[name].pairs.second_median
            ours, theirs = products.first_median, products.second_median
            limit = update / (update + ours - theirs)
            rows.append((NAMES[name], f"{ours:.3f}", f"{theirs:.3f}", f"{products.ratio:.3f}", f"{limit:.3f}"))
    head = ("model", "its products, s/update", "X-MoE's", "ratio", "speed that they alone would permit")
    return markdown_table(head, rows) if rows else "There are none but X-MoE's."


def traffic_table(log: dict[str, str], shape: ModelCounts, args: argparse.Namespace) -> str:
    """What one MoE layer moved in one direction on all ranks, as logged and as planned."""
    if shape.moe is None or "a2a_rows" not in log:
        return "Nothing: every rank has all experts."
    cluster = Cluster(args.ranks, args.ranks, args.sentences * args.tokens_per_sample // args.ranks, 1.0, 1.0)
    size = expert_parallel_size(shape.moe.num_experts, None, args.ranks)
    plan = exchange(shape.moe, cluster, size, element=4 if args.precision == "fp32" else 2, recompute=False)
    rows = [
        ("logged", f"{float(log['a2a_rows']):.0f}", f"{float(log['a2a_mb']):.3f}"),
        ("plan, even routing", f"{plan.rows * args.ranks}", f"{plan.off_rank * args.ranks / 1e6:.3f}"),
    ]
    return markdown_table(("one MoE layer, one direction, all ranks", "rows", "MB to other ranks"), rows)


def report_parts(counts: dict[str, ModelCounts], duels: dict[str, Duel], args: argparse.Namespace) -> list[str]:
    parts = [
        "## Speed and memory",
        f"{args.sentences} x {args.tokens_per_sample} tokens per update from {args.data or 'Zipf draws'}, on "
        f"{args.threads} threads. Runs of fairseq-train took turns with the rival's for {args.pairs} pairs; a run's "
        f"time is the median of {args.updates} updates, seconds are medians of the runs, the speed is the pairs'.",
        speed_table(counts, duels, args),
    ]
    if args.ranks > 1:
        parts.append("## What passed between the ranks in an update")
        for name, duel in duels.items():
            losses = f"{duel.run.first_loss:.4f} bits on the ranks, {duel.rival.first_loss:.4f} in one process"
            parts += [f"{NAMES[name]}: first loss {losses}.", traffic_table(duel.run.log, counts[name], args)]
    else:
        parts += [
            "## What matrix products alone permit",
            "The products of all MoE layers, forward and backward, as `torch.mm` into preallocated outputs with equal "
            "rows for each expert, by turns. The last column is X-MoE's speed if everything else took X-MoE's time and "
            "these products their own: what no implementation with `torch.mm` can exceed at these shapes.",
            products_table(counts, duels, args),
        ]
    flags = [f"- {NAMES[name]}: `{' '.join(flags_of(name, args, args.ranks))}`" for name in counts]
    return [*parts, "## Flags", "\n".join(flags)]


def run(args: argparse.Namespace) -> int:
    check(args)
    kind = "-parallel" if args.ranks > 1 else "-train-quick" if args.quick else "-train"
    path = report_path(args.output, kind)
    with tempfile.TemporaryDirectory() as folder:
        counts, duels = measure(args.data or write_zipf_data(Path(folder), args), args)
    targets, parts = decide(duels, args), report_parts(counts, duels, args)
    write_report(path, "Whole-model training benchmark", args.threads, targets, parts)
    return conclude(path, targets, args.check)


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(run, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
