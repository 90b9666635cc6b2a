"""Training speed and memory of whole language models: dense, X-MoE and MH-MoE under both budgets."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from _bench.console import Progress, make_parser, report_path, say, table, verdict, write_report
from _bench.layers import DTYPES, GemmBound
from _bench.timing import Pairs, time_pairs
from _bench.training import (
    NAMES,
    REFERENCE,
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

DESCRIPTION = """\
Train four language models for a few updates with fairseq-train and compare
their tokens per second and peak memory:
  dense         no experts
  xmoe          X-MoE, the reference: one head
  mhmoe-params  MH-MoE with X-MoE's parameters (more work per token)
  mhmoe-flops   MH-MoE with X-MoE's FLOPs and parameters (more, smaller experts)
Each model's runs take turns with X-MoE's, so that a slow moment hits both. The
report lists the flags, which you can give to fairseq-train yourself.
"""
EPILOG = """\
examples:
  python scripts/bench_train.py --quick
      MH-MoE (flops) against X-MoE only: the project's target
  python scripts/bench_train.py
      all four: 12 layers of 768, 8 experts, 8,000 words, 4 x 512 tokens per
      update; half an hour on two cores, and 12 GB of memory
  python scripts/bench_train.py --size tiny --pairs 3
      a look at the report in some minutes
  python scripts/bench_train.py --data data/english
      on the training split of a folder that `mhmoe prepare` wrote

The tokens are synthetic unless --data is given: independent draws by Zipf's law,
so that routing meets frequent and rare words. Weights are fresh, hence routing is
as balanced as at the start of a training.
"""
PROMISED = "mhmoe-flops"
PROMISED_RATIO = 0.95


@dataclass
class Results:
    """By model: its shape, seconds of an update beside X-MoE's, seconds of the MoE layers' products, the last run."""

    shapes: dict[str, Shape] = field(default_factory=dict)
    pairs: dict[str, Pairs] = field(default_factory=dict)
    products: dict[str, Pairs] = field(default_factory=dict)
    runs: dict[str, Training] = field(default_factory=dict)


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(DESCRIPTION, EPILOG)
    rivals = [name for name in NAMES if name != REFERENCE]
    parser.add_argument("--quick", action="store_true", help="only mhmoe-flops against xmoe")
    parser.add_argument("--models", nargs="+", choices=rivals, default=rivals, help="whom to time against xmoe")
    parser.add_argument("--data", metavar="FOLDER", help="prepared data to train on, in place of synthetic tokens")
    add_training_arguments(parser, size="base", sentences=4)
    return parser


def decide(results: Results, args: argparse.Namespace) -> tuple[str, bool] | None:
    """The target as one line and whether it is met; None if it was not measured, or at another setting."""
    defaults = build_parser().parse_args([])
    same = ("size", "experts", "heads", "top_k", "tokens_per_sample", "vocab", "precision")
    if PROMISED not in results.pairs or any(getattr(args, name) != getattr(defaults, name) for name in same):
        return None
    speed = results.pairs[PROMISED].swapped()
    line = f"{NAMES[PROMISED]} trains at {PROMISED_RATIO} or more of X-MoE's tokens/s: {speed.ratio:.3f} "
    return line + speed.range_text(), speed.ratio >= PROMISED_RATIO


def time_products(shape: Shape, reference: Shape, args: argparse.Namespace) -> Pairs:
    """Seconds of the matrix products of all MoE layers in an update, by turns."""
    tokens = args.sentences * args.tokens_per_sample
    bounds = [GemmBound(each.moe, tokens, DTYPES[args.precision]) for each in (shape, reference)]
    calls = [lambda b=b, n=each.layers: [b() for _ in range(n)] for b, each in zip(bounds, (shape, reference))]
    return time_pairs(*calls, pairs=args.pairs)


def measure(data: str, args: argparse.Namespace) -> Results:
    """Time every model beside the reference."""
    names = [PROMISED] if args.quick else args.models
    results = Results(shapes={name: shape_of(data, name, args) for name in (*names, REFERENCE)})
    with Progress(len(names) * args.pairs) as progress:
        for name in names:
            progress(f"{name} / {REFERENCE}")
            results.pairs[name], *last = train_pairs(
                lambda name=name: train(data, name, args), lambda: train(data, REFERENCE, args),
                args.pairs, lambda name=name: progress(f"{name} / {REFERENCE}", 1),
            )  # fmt: skip
            results.runs |= zip((name, REFERENCE), last)
            if results.shapes[name].moe is not None:
                results.products[name] = time_products(results.shapes[name], results.shapes[REFERENCE], args)
    return results


def speed_table(results: Results, tokens: int) -> str:
    rows = []
    all_pairs = list(results.pairs.values())
    reference = Pairs(sum((pairs.second for pairs in all_pairs), ()), sum((pairs.second for pairs in all_pairs), ()))
    for name in sorted(results.shapes, key=list(NAMES).index):
        shape, pairs = results.shapes[name], results.pairs.get(name, reference)
        moe = ("-", "-") if shape.moe is None else (
            f"{shape.moe.num_experts} x {shape.moe.expert_ffn_dim}", f"{shape.moe.flops_per_token() / 1e6:.1f}"
        )  # fmt: skip
        rows.append((
            NAMES[name], f"{shape.params / 1e6:.1f}M", *moe, f"{pairs.first_median:.3f}",
            f"{tokens / pairs.first_median:.0f}", f"**{1 / pairs.ratio:.3f}**",
            f"{results.runs[name].resident_mib:.0f}",
        ))  # fmt: skip
    head = ("model", "parameters", "experts x width", "MoE layer MFLOP/token", "s/update", "tokens/s")
    return table((*head, "of X-MoE's speed", "peak MiB of the process"), rows)


def products_table(results: Results) -> str:
    rows = []
    for name, products in results.products.items():
        ours, theirs, update = products.first_median, products.second_median, results.pairs[name].second_median
        limit = update / (update + ours - theirs)
        rows.append((NAMES[name], f"{ours:.3f}", f"{theirs:.3f}", f"{products.ratio:.3f}", f"{limit:.3f}"))
    head = ("model", "its products, s/update", "X-MoE's", "ratio", "speed that they alone would permit")
    return table(head, rows)


def report_parts(results: Results, args: argparse.Namespace) -> list[str]:
    decided = decide(results, args)
    flags = [f"- {NAMES[name]}: `{' '.join(model_flags(name, args))}`" for name in results.shapes]
    return [
        "## Target",
        "Not measured: it is about the default setting." if decided is None else f"{decided[0]}: {verdict(decided[1])}",
        "## Speed and memory",
        f"{args.sentences} x {args.tokens_per_sample} tokens per update from {args.data or 'Zipf draws'}. Each model's "
        f"runs of fairseq-train took turns with X-MoE's for {args.pairs} pairs; a run's time is the median of "
        f"{args.updates} updates, seconds are medians of the runs, the speed is the median over the pairs.",
        speed_table(results, args.sentences * args.tokens_per_sample),
        "## What matrix products alone permit",
        "The products of all MoE layers, forward and backward, as `torch.mm` into preallocated outputs with equal rows "
        "for each expert, by turns. The last column is X-MoE's speed if everything else took X-MoE's time and these "
        "products their own: what no implementation with `torch.mm` can exceed at these shapes.",
        products_table(results) if results.products else "There are none but X-MoE's.",
        "## Flags",
        "\n".join([*flags, f"\nAll with `{' '.join(common_flags(args))}`."]),
    ]


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    path = report_path(args.output, "-train-quick" if args.quick else "-train")
    with tempfile.TemporaryDirectory() as folder:
        results = measure(args.data or write_zipf_data(Path(folder), args), args)
    write_report(path, "Whole-model training benchmark", args.threads, report_parts(results, args))
    decided = decide(results, args)
    if decided:
        say(f"{'met   ' if decided[1] else 'MISSED'} {decided[0]}")
    say(f"report: {path}")
    return int(args.check and decided is not None and not decided[1])


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError, RuntimeError) as error:
        say(f"bench_train: error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
