"""Time and peak memory of the MH-MoE layer against its bound and its rivals."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from _bench import contenders
from _bench.console import (
    Progress,
    add_common_arguments,
    command_line,
    positive,
    report_path,
    say,
    set_threads,
    today,
)
from _bench.machine import describe
from _bench.memory import measure
from _bench.plot import write_plot
from _bench.records import Results, targets
from _bench.report import write_report
from _bench.setting import DTYPES, Setting
from _bench.sweep import RIVALS, Plan, Runner, full_plan, quick_plan

DESCRIPTION = """\
Measure the MH-MoE layer (forward and backward) against
  gemm             the time its matrix products alone take: the bound
  loop             the plain loop over experts, with autograd
  torchscale       TorchScale's static X-MoE on the same sub-tokens
  mixtral-grouped  Hugging Face's Mixtral block, grouped_mm, at equal FLOPs
  mixtral-eager    the same block with its loop over experts
and write a dated Markdown report with a plot. Before timing, our layer is
compared with the plain loop (values and all gradients, 1e-5 relative); a
difference stops the run. A rival whose package is missing is left out, and the
report says so.
"""
EPILOG = """\
examples:
  python scripts/bench_layer.py --quick
      the acceptance points only (about ten minutes): time at T=2048, E=8 and 32,
      and peak memory at T=2048, 4096, 8192, all in fp32
  python scripts/bench_layer.py
      the whole sweep: T=512..8192, E=8/32/128, fp32 and bf16 (an hour or two)
  python scripts/bench_layer.py --tokens 512 2048 --experts 8 --dtypes bf16 --rivals gemm loop
      a part of it

reading the report:
  "ours / rival" below 1 means that ours is faster; the range behind it is the
  smallest and the largest pair, a wide one means that the machine was busy.
  Only runs on an idle machine are worth keeping. An interrupted run leaves a
  report that says it is incomplete.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only the points that the project's targets speak of")
    parser.add_argument(
        "--tokens",
        type=positive,
        nargs="+",
        default=[512, 1024, 2048, 4096, 8192],
        metavar="T",
        help="tokens per batch (default: 512 1024 2048 4096 8192)",
    )
    parser.add_argument(
        "--experts", type=positive, nargs="+", default=[8, 32, 128], metavar="E", help="experts (default: 8 32 128)"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="number formats (default: fp32 bf16)"
    )
    parser.add_argument(
        "--rivals", nargs="+", choices=RIVALS, default=list(RIVALS), help="whom to compare with (default: all)"
    )
    parser.add_argument(
        "--embed-dim", type=positive, default=768, metavar="D", help="model dimension (default: %(default)s)"
    )
    parser.add_argument("--heads", type=positive, default=4, metavar="H", help="MH-MoE heads (default: %(default)s)")
    parser.add_argument(
        "--top-k", type=positive, default=2, metavar="K", help="experts per sub-token (default: %(default)s)"
    )
    parser.add_argument(
        "--ffn-dim", type=positive, default=3072, metavar="F", help="inner width of one expert (default: %(default)s)"
    )
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    parser.add_argument(
        "--measure-memory", choices=[name for name in contenders.NAMES if name != "gemm"], help=argparse.SUPPRESS
    )
    add_common_arguments(parser)
    return parser


def chosen_settings(args: argparse.Namespace) -> list[Setting]:
    """Every combination asked for, checked before anything runs."""
    sizes = {"embed_dim": args.embed_dim, "num_heads": args.heads, "top_k": args.top_k, "ffn_dim": args.ffn_dim}
    return [
        Setting(tokens, experts, dtype, **sizes)
        for dtype in args.dtypes
        for experts in args.experts
        for tokens in args.tokens
    ]


def check_quick(args: argparse.Namespace) -> None:
    """``--quick`` has its own sizes.

    Raises:
        ValueError: sizes are given as well.
    """
    parser = build_parser()
    for flag in ("tokens", "experts", "dtypes", "embed_dim", "heads", "top_k", "ffn_dim"):
        if args.quick and getattr(args, flag) != parser.get_default(flag):
            raise ValueError(f"--{flag.replace('_', '-')} contradicts --quick, which measures the targets' own sizes")


def make_plan(args: argparse.Namespace, results: Results) -> Plan:
    """What to run, without the rivals that cannot run here; those are noted in ``results``."""
    settings = chosen_settings(args)  # first: bad sizes end the run before anything is said
    rivals = []
    for name in args.rivals:
        reason = contenders.unavailable(name)
        if reason:
            results.notes.append(f"{contenders.NAMES[name]} was left out: {reason}.")
            say(results.notes[-1])
        else:
            rivals.append(name)
    plan = quick_plan(rivals) if args.quick else full_plan(settings, rivals)
    if args.no_memory:
        plan = Plan(plan.verify, plan.duels, (), plan.breakdown)
    return plan


def measure_here(args: argparse.Namespace) -> int:
    """The fresh process's part: warm up on few tokens, then measure one full step; print JSON."""
    (setting,) = chosen_settings(args)
    small = contenders.build(args.measure_memory, Setting(**{**vars(setting), "tokens": min(64, setting.tokens)}))
    small()
    del small
    step = contenders.build(args.measure_memory, setting)
    print(json.dumps(measure(step, step.clear, step.tensors())))
    return 0


def report_writer(path: Path, args: argparse.Namespace) -> Callable[..., None]:
    """A function that writes the report as it stands; ``complete=True`` for the last time."""
    fixed = {"machine": describe(args.threads), "command": command_line(), "date": today(), "pairs": args.pairs}

    def write(results: Results, *, complete: bool = False) -> None:
        write_report(path, results, complete=complete, **fixed)

    return write


def run(args: argparse.Namespace) -> int:
    check_quick(args)
    path = report_path(args.output, "-quick" if args.quick else "")
    write = report_writer(path, args)
    noted = Results()
    plan = make_plan(args, noted)
    progress = Progress(plan.steps(args.pairs))
    runner = Runner(__file__, pairs=args.pairs, threads=args.threads, on_progress=progress, on_part=write)
    runner.results.notes.extend(noted.notes)
    try:
        results = runner.run(plan)
    finally:
        progress.close()
    if not write_plot(path.with_suffix(".png"), results):
        results.notes.append("No plot: matplotlib is not installed.")
    write(results, complete=True)
    return summarise(results, path, check=args.check)


def summarise(results: Results, path: Path, *, check: bool) -> int:
    """One line per target, one for the report; the exit status."""
    decided = targets(results)
    for target in decided:
        say(f"{'met   ' if target.met else 'MISSED'} {target.promise}: {target.measured}")
    say(f"report: {path}")
    return int(check and not all(target.met for target in decided))


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    set_threads(args.threads)
    try:
        return measure_here(args) if args.measure_memory else run(args)
    except (ValueError, OSError, RuntimeError) as error:
        say(f"bench_layer: error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
