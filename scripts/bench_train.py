"""Training speed and memory of whole language models: dense, X-MoE and MH-MoE under both budgets."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
from collections.abc import Sequence

from _bench.console import (
    Progress,
    add_common_arguments,
    positive,
    report_path,
    say,
    set_threads,
)
from _bench.gemm_bound import GemmBound
from _bench.memory import MIB, in_fresh_process, measure
from _bench.setting import DTYPES
from _bench.timing import Pairs, time_pairs
from _bench.train_report import PROMISED, TrainResults, verdict, write_report
from _bench.training import NAMES, REFERENCE, Training, TrainingSetting

DESCRIPTION = """\
Train four language models for a few updates (forward, backward, Adam step) and
compare their tokens per second and peak memory:
  dense         no experts
  xmoe          X-MoE, the reference: one head
  mhmoe-params  MH-MoE with X-MoE's parameters (more work per token)
  mhmoe-flops   MH-MoE with X-MoE's FLOPs and parameters (more, smaller experts)
Each model is timed in turns with X-MoE, in one process, so that a slow moment
hits both. Memory is measured in a fresh process per model. The models are built
from the flags you would give to fairseq-train; the report lists them.
"""
EPILOG = """\
examples:
  python scripts/bench_train.py --quick
      MH-MoE (flops) against X-MoE only, no memory: the project's target
  python scripts/bench_train.py
      all four: 12 layers of 768, 8 experts, 8,000 words, 4 x 512 tokens per
      update; about 15 minutes on two cores, and 12 GB of memory
  python scripts/bench_train.py --size tiny --pairs 3
      a look at the report in a minute
  python scripts/bench_train.py --data data/english
      on the training split of a folder that `mhmoe prepare` wrote

The tokens are synthetic unless --data is given: independent draws by Zipf's law,
so that routing meets frequent and rare words. Weights are fresh, hence routing is
as balanced as at the start of a training.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rivals = [name for name in NAMES if name != REFERENCE]
    parser.add_argument("--quick", action="store_true", help="only mhmoe-flops against xmoe, and no memory")
    parser.add_argument("--models", nargs="+", choices=rivals, default=rivals, help="whom to time against xmoe")
    parser.add_argument(
        "--size", choices=["tiny", "small", "base"], default="base", help="architecture (default: base)"
    )
    parser.add_argument("--experts", type=positive, default=8, metavar="E", help="X-MoE's experts (default: 8)")
    parser.add_argument("--heads", type=positive, default=4, metavar="H", help="MH-MoE heads (default: 4)")
    parser.add_argument("--top-k", type=positive, default=2, metavar="K", help="experts per sub-token (default: 2)")
    parser.add_argument("--sentences", type=positive, default=4, metavar="N", help="samples per update (default: 4)")
    parser.add_argument(
        "--tokens-per-sample", type=positive, default=512, metavar="N", help="tokens per sample (default: 512)"
    )
    parser.add_argument("--vocab", type=positive, default=8000, metavar="N", help="synthetic words (default: 8000)")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="as --mhmoe-precision (default: fp32)"
    )
    parser.add_argument("--data", metavar="FOLDER", help="prepared data to train on, in place of synthetic tokens")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if the target is missed")
    parser.add_argument("--measure-memory", choices=list(NAMES), help=argparse.SUPPRESS)
    add_common_arguments(parser)
    return parser


def measure_here(args: argparse.Namespace) -> int:
    """The fresh process's part: one update, so that Adam's state exists, then measure the next; print JSON."""
    training = Training(args.measure_memory, TrainingSetting.from_arguments(args))
    training()
    training.clear()
    kept = training.tensors()
    found = measure(training, training.clear, kept)
    found["state"] = sum(tensor.untyped_storage().nbytes() for tensor in kept) / MIB
    print(json.dumps(found))
    return 0


def shape_of(training: Training, flags: Sequence[str]) -> dict:
    """What the report says about a model."""
    moe = training.moe()
    return {
        "flags": " ".join(flags),
        "params": training.num_params(),
        "experts": "-" if moe is None else f"{moe.num_experts} x {moe.expert_ffn_dim}",
        "flops": "-" if moe is None else f"{moe.flops_per_token() / 1e6:.1f}",
    }


def time_models(args: argparse.Namespace, names: Sequence[str], results: TrainResults, progress: Progress) -> None:
    """Fill in speed, a model at a time beside the reference: two models fit where four do not."""
    setting = TrainingSetting.from_arguments(args)
    for name in names:
        label = f"time {name} / {REFERENCE}"
        progress(label, 0)
        gc.collect()
        model, reference = Training(name, setting), Training(REFERENCE, setting)
        for key, training in ((name, model), (REFERENCE, reference)):
            results.shapes[key] = shape_of(training, setting.flags(key))
        results.pairs[name] = time_pairs(
            model, reference, pairs=args.pairs, after_pair=lambda label=label: progress(label, 1)
        )
        if model.moe() is not None:
            results.products[name] = time_products(model, reference, setting, args.pairs)


def time_products(model: Training, reference: Training, setting: TrainingSetting, pairs: int) -> Pairs:
    """Seconds of the matrix products of all MoE layers in an update, by turns."""
    bounds = [GemmBound(each.moe(), setting.tokens, DTYPES[setting.precision]) for each in (model, reference)]
    repeats = [each.num_moe_layers() for each in (model, reference)]

    def products(which: int) -> None:
        for _ in range(repeats[which]):
            bounds[which]()

    return time_pairs(lambda: products(0), lambda: products(1), pairs=pairs)


def measure_models(args: argparse.Namespace, names: Sequence[str], results: TrainResults, progress: Progress) -> None:
    """Fill in memory; the fresh processes get this run's flags."""
    given = args.given
    for name in names:
        progress(f"memory {name}", 0)
        results.memory[name] = in_fresh_process(__file__, [*given, "--measure-memory", name])
        progress(f"memory {name}", 1)


def run(args: argparse.Namespace) -> int:
    path = report_path(args.output, "-train-quick" if args.quick else "-train")
    timed = [PROMISED] if args.quick else args.models
    measured = [] if args.quick or args.no_memory else [REFERENCE, *args.models]
    results = TrainResults()
    progress = Progress(len(timed) * args.pairs + len(measured))
    try:
        measure_models(args, measured, results, progress)
        time_models(args, timed, results, progress)
    finally:
        progress.close()
    write_report(path, results, TrainingSetting.from_arguments(args), threads=args.threads, pairs=args.pairs)
    decided = verdict(results, TrainingSetting.from_arguments(args))
    if decided:
        say(f"{'met   ' if decided[1] else 'MISSED'} {decided[0]}")
    say(f"report: {path}")
    return int(args.check and decided is not None and not decided[1])


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(given)
    args.given = given
    set_threads(args.threads)
    try:
        return measure_here(args) if args.measure_memory else run(args)
    except (ValueError, OSError, RuntimeError) as error:
        say(f"bench_train: error: {error}")
        return 2


if __name__ == "__main__":
    logging.getLogger().setLevel(logging.WARNING)  # fairseq and hydra would write through the progress bar
    sys.exit(main())
