"""Two processes of one thread against one process of two threads: what sharing a training out costs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from _bench.console import Progress, add_common_arguments, positive, report_path, say
from _bench.parallel_report import PROMISED_RATIO, ParallelResults, verdict, write_report
from _bench.team import Team
from _bench.timing import time_pairs
from _bench.training import NAMES, TrainingSetting

DESCRIPTION = """\
Train one model on RANKS processes (gloo, experts shared out over all of them) and
in one process, with the same threads in sum and the same batch per update, by
turns, and compare tokens per second. Both train through fairseq's own trainer:
forward, backward, sums over ranks, clipping, Adam and the logged figures.

Before anything is timed, both must have the same loss at the first update. Beside
the speed stands what passed between the ranks in an update, counted at every
transfer, and what `mhmoe plan` expects: rows must agree exactly; bytes to other
ranks are those of an even routing in the plan and depend on the router's choices.
"""
EPILOG = f"""\
examples:
  python scripts/bench_parallel.py
      MH-MoE of 6 layers of 256, 8 experts, 16 x 512 tokens per update, two
      ranks of one thread against two threads: about 3 minutes on two idle cores.
      The project's target: {PROMISED_RATIO} or more of one process's tokens per second
  python scripts/bench_parallel.py --size base --sentences 8 --pairs 7
      the paper's size; 12 GB of memory
  python scripts/bench_parallel.py --ranks 4 --threads 4 --size tiny --pairs 1
      four ranks; means little on fewer than four cores

What costs: every rank has the dense part whole, so its gradient is summed over the
ranks and its Adam runs on each of them; rows travel through the loopback; and the
slowest rank sets the pace. All but the last weigh less the more tokens an update
has. The report shows where an update's time went.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=positive, default=2, metavar="W", help="processes (default: 2)")
    parser.add_argument("--model", choices=list(NAMES), default="mhmoe-params", help="default: %(default)s")
    parser.add_argument(
        "--size", choices=["tiny", "small", "base"], default="small", help="architecture (default: %(default)s)"
    )
    parser.add_argument("--experts", type=positive, default=8, metavar="E", help="X-MoE's experts (default: 8)")
    parser.add_argument("--heads", type=positive, default=4, metavar="H", help="MH-MoE heads (default: 4)")
    parser.add_argument("--top-k", type=positive, default=2, metavar="K", help="experts per sub-token (default: 2)")
    parser.add_argument(
        "--sentences", type=positive, default=16, metavar="N", help="samples per update, all ranks' (default: 16)"
    )
    parser.add_argument(
        "--tokens-per-sample", type=positive, default=512, metavar="N", help="tokens per sample (default: 512)"
    )
    parser.add_argument("--vocab", type=positive, default=8000, metavar="N", help="synthetic words (default: 8000)")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="as --mhmoe-precision (default: fp32)"
    )
    parser.add_argument("--check", action="store_true", help="exit with status 1 if the target is missed")
    add_common_arguments(parser)
    return parser


def setting_of(args: argparse.Namespace) -> TrainingSetting:
    """The batch and the model.

    Raises:
        ValueError: the ranks cannot have equal parts.
    """
    if args.sentences % args.ranks:
        raise ValueError(f"--sentences ({args.sentences}) must be a multiple of --ranks ({args.ranks})")
    if args.threads % args.ranks:
        raise ValueError(f"--threads ({args.threads}) must be a multiple of --ranks ({args.ranks})")
    return TrainingSetting.from_arguments(args)


def measure(args: argparse.Namespace, setting: TrainingSetting, progress: Progress) -> ParallelResults:
    """Everything, both contenders alive from start to end; the one that is not asked waits and uses no processor."""
    label = f"{args.ranks} x {args.threads // args.ranks} threads / 1 x {args.threads}"
    progress("start", 0)
    team = Team(args.model, setting, args.ranks, args.threads // args.ranks)
    alone = Team(args.model, setting, 1, args.threads)
    try:
        losses = (team()[0], alone()[0])
        check_same(*losses)
        pairs = time_pairs(team, alone, pairs=args.pairs, after_pair=lambda: progress(label, 1))
        return ParallelResults(
            shape=team.shape,
            params_alone=alone.shape["params"],
            losses=losses,
            pairs=pairs,
            sent=team.sent(),
            profiles=[*team.profile(), *alone.profile()],
        )
    finally:
        team.close()
        alone.close()


def check_same(one: float, other: float) -> None:
    """Raise RuntimeError unless the first losses agree: they are of the same weights and the same tokens."""
    if abs(one - other) > 1e-3 * abs(other):
        raise RuntimeError(f"the first update's loss is {one:.4f} bits on the ranks and {other:.4f} in one process")


def run(args: argparse.Namespace) -> int:
    path, setting = report_path(args.output, "-parallel"), setting_of(args)
    progress = Progress(args.pairs)
    try:
        results = measure(args, setting, progress)
    finally:
        progress.close()
    write_report(path, results, setting, name=args.model, ranks=args.ranks, threads=args.threads)
    line, is_met = verdict(results, args.ranks, args.threads)
    say(f"{'met   ' if is_met else 'MISSED'} {line}")
    say(f"report: {path}")
    return int(args.check and not is_met)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # what fairseq and TorchScale still call
    try:
        return run(args)
    except (ValueError, OSError, RuntimeError) as error:
        say(f"bench_parallel: error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
