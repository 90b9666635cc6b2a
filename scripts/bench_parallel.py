"""Two processes of one thread against one process of two threads: what sharing a training out costs."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from _bench.console import Progress, add_numbers, make_parser, report_path, say, table, verdict, write_report
from _bench.timing import Pairs
from _bench.training import (
    NAMES,
    Shape,
    Training,
    add_training_arguments,
    common_flags,
    model_flags,
    shape_of,
    train,
    train_pairs,
    write_zipf_data,
)

from mhmoe_fairseq.analysis.plan.cluster import Cluster, exchange

PROMISED_RATIO = 0.85
DESCRIPTION = """\
Train one model on RANKS processes (torchrun, gloo, experts shared out over all of
them) and in one process, with the same threads in sum and the same batch per
update, by turns, and compare tokens per second. Both are fairseq-train: forward,
backward, sums over ranks, clipping, Adam and the logged metrics.

Both must have the same loss at the first update. Beside the speed stands what
passed between the ranks in an update, as the training logs it, and what
`mhmoe plan` expects: rows must agree exactly; bytes to other ranks are those of
an even routing in the plan and depend on the router's choices.
"""
EPILOG = f"""\
examples:
  python scripts/bench_parallel.py
      MH-MoE of 6 layers of 256, 8 experts, 16 x 512 tokens per update, two ranks
      of one thread against two threads: some minutes on two idle cores.
      The project's target: {PROMISED_RATIO} or more of one process's tokens per second
  python scripts/bench_parallel.py --size base --sentences 8 --pairs 7
      the paper's size; 12 GB of memory
  python scripts/bench_parallel.py --ranks 4 --threads 4 --size tiny --pairs 1
      four ranks; means little on fewer than four cores

What costs: every rank has the dense part whole, so its gradient is summed over the
ranks and its Adam runs on each of them; rows travel through the loopback; and the
slowest rank sets the pace. All but the last weigh less the more tokens an update
has.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(DESCRIPTION, EPILOG)
    add_numbers(parser, {"ranks": (2, "processes")})
    parser.add_argument("--model", choices=list(NAMES), default="mhmoe-params", help="default: %(default)s")
    add_training_arguments(parser, size="small", sentences=16)
    return parser


def check_shares(args: argparse.Namespace) -> None:
    """ValueError if the ranks cannot have equal parts."""
    for flag in ("sentences", "threads"):
        if getattr(args, flag) % args.ranks:
            raise ValueError(f"--{flag} ({getattr(args, flag)}) must be a multiple of --ranks ({args.ranks})")


def check_same(ranks: float, alone: float) -> None:
    """Raise RuntimeError unless the first losses agree: they are of the same weights and the same tokens."""
    if abs(ranks - alone) > 1e-3 * abs(alone):
        raise RuntimeError(
            f"the first update's loss is {ranks:.4f} bits on the ranks and {alone:.4f} in one process"
        )


def decide(pairs: Pairs, args: argparse.Namespace) -> tuple[str, bool]:
    """The target as one line, and whether it is met."""
    speed = pairs.swapped()
    line = (
        f"{args.ranks} ranks of {args.threads // args.ranks} thread(s) train at {PROMISED_RATIO} or more of the "
        f"tokens/s of one process with {args.threads}: {speed.ratio:.3f} {speed.range_text()}"
    )
    return line, speed.ratio >= PROMISED_RATIO


def traffic_table(log: dict[str, str], shape: Shape, args: argparse.Namespace) -> str:
    """What one MoE layer moved in one direction on all ranks, as logged and as planned."""
    if shape.moe is None or "a2a_rows" not in log:
        return "Nothing: every rank has all experts."
    tokens = args.sentences * args.tokens_per_sample
    cluster = Cluster(args.ranks, args.ranks, tokens // args.ranks, link=1.0, network=1.0)
    size = cluster.expert_parallel_size(None, shape.moe.num_experts)
    plan = exchange(shape.moe, cluster, size, element=4 if args.precision == "fp32" else 2, recompute=False)
    rows = [
        ("logged", f"{float(log['a2a_rows']):.0f}", f"{float(log['a2a_mb']):.3f}"),
        ("plan, even routing", f"{plan.rows * args.ranks}", f"{plan.off_rank * args.ranks / 1e6:.3f}"),
    ]
    return table(("one MoE layer, one direction, all ranks", "rows", "MB to other ranks"), rows)


def report_parts(pairs: Pairs, runs: tuple[Training, Training], shape: Shape, args: argparse.Namespace) -> list[str]:
    line, met = decide(pairs, args)
    tokens = args.sentences * args.tokens_per_sample
    rows = [
        (who, f"{seconds:.3f}", f"{tokens / seconds:.0f}", f"{speed:.3f}")
        for who, seconds, speed in (
            (f"{args.ranks} ranks, {args.threads // args.ranks} thread(s) each", pairs.first_median, 1 / pairs.ratio),
            (f"one process, {args.threads} threads", pairs.second_median, 1.0),
        )
    ]
    return [
        "## Target",
        f"{line}: {verdict(met)}",
        "## Speed",
        f"{NAMES[args.model]}, {args.size}, {shape.params / 1e6:.1f}M parameters: {args.sentences} x "
        f"{args.tokens_per_sample} tokens per update (Zipf draws), {args.precision}, gloo. {args.pairs} pairs of runs "
        f"by turns, a run's time is the median of {args.updates} updates; seconds are medians of the runs. First loss "
        f"{runs[0].first_loss:.4f} bits on the ranks, {runs[1].first_loss:.4f} in one process.",
        table(("", "s/update", "tokens/s", "of one process's speed"), rows),
        "## What passed between the ranks in an update",
        traffic_table(runs[0].log, shape, args),
        "## Flags",
        f"`{' '.join([*model_flags(args.model, args), *common_flags(args, args.ranks)])}`",
    ]


def run(args: argparse.Namespace) -> int:
    path = report_path(args.output, "-parallel")
    check_shares(args)
    with tempfile.TemporaryDirectory() as folder, Progress(args.pairs) as progress:
        data = write_zipf_data(Path(folder), args)
        pairs, *runs = train_pairs(
            lambda: train(data, args.model, args, ranks=args.ranks), lambda: train(data, args.model, args),
            args.pairs, lambda: progress(f"{args.ranks} ranks / one process", 1),
        )  # fmt: skip
        check_same(*(run.first_loss for run in runs))
        shape = shape_of(data, args.model, args)
    write_report(path, "Several processes against one", args.threads, report_parts(pairs, runs, shape, args))
    line, met = decide(pairs, args)
    say(f"{'met   ' if met else 'MISSED'} {line}")
    say(f"report: {path}")
    return int(args.check and not met)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError, RuntimeError) as error:
        say(f"bench_parallel: error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
