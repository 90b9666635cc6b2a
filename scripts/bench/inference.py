"""Tokens per second of language models in use: one token at a time, and scoring whole batches."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from fairseq.sequence_scorer import SequenceScorer
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.console import Target, add_numbers, conclude, make_parser, report_path, run_benchmark, write_report
from bench.timing import Pairs, seconds, take_turns
from bench.training import FAMILIES, PRECISIONS, SEED, add_model_arguments, model_options
from mhmoe_fairseq.common.tables import markdown_table
from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.counts import blank_dictionary
from mhmoe_fairseq.models.language_model import build_language_model

DESCRIPTION = """\
Compare models in use with X-MoE, by turns in one process:
  decoding   one-token steps after a prefix, with cached keys and values, as `mhmoe
             generate` and fairseq-generate take them; the output layer is part of a step
  scoring    the log-probability of every token of a batch, as fairseq-eval-lm and
             `mhmoe evaluate` compute it
Weights are fresh and tokens random.
"""
EPILOG = """\
examples:
  python scripts/bench/inference.py
      dense and MH-MoE (flops) against X-MoE at small, batches of 1 and 8, fp32 and bf16
  python scripts/bench/inference.py --size tiny --models mhmoe-flops --precisions bf16
"""
REFERENCE = "xmoe"
TARGET = ("mhmoe-flops", "small", 0.9)  # of X-MoE's tokens/s in one-token steps
Measured = dict[tuple[str, str, str, int], Pairs]  # by model, precision, what it does, and threads


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(DESCRIPTION, EPILOG)
    models = [name for name in FAMILIES if name not in (REFERENCE, "stock")]
    parser.add_argument("--models", nargs="+", choices=models, default=["mhmoe-flops", "dense"], help="what to compare")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="default: both")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], metavar="N", help="rows (default: 1 8)")
    add_numbers(parser, {"prefix": (32, "tokens before the first step"), "steps": (32, "timed steps")})
    add_model_arguments(parser, "small")
    return parser


class Model:
    """A model of a family, ready to be used, with what is timed: ``decode`` and ``score``."""

    def __init__(self, family: str, precision: str, args: argparse.Namespace) -> None:
        torch.manual_seed(SEED)
        self.args, self.dictionary = args, blank_dictionary(args.vocab)
        options = architecture_options(**model_options(family, precision, args))
        self.model = build_language_model(options, self.dictionary).eval()
        self.scorer = SequenceScorer(self.dictionary)

    def tokens(self, rows: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(SEED)
        return torch.randint(self.dictionary.nspecial, len(self.dictionary), (rows, length), generator=generator)

    @torch.no_grad()
    def decode(self, rows: int) -> float:
        """Returns the seconds of a step, after an untimed prefix."""
        args, state = self.args, {"is_first_step": True}
        tokens = self.tokens(rows, args.prefix + args.steps)
        self.model(tokens[:, : args.prefix], incremental_state=state)
        state["is_first_step"] = False

        def steps() -> None:
            for length in range(args.prefix + 1, args.prefix + args.steps + 1):
                self.model(tokens[:, :length], incremental_state=state)

        return seconds(steps, args.clock) / args.steps

    @torch.no_grad()
    def score(self, rows: int) -> float:
        """Returns the seconds of scoring a batch of rows as long as a sample."""
        tokens = self.tokens(rows, self.args.tokens_per_sample)
        sample = {"net_input": {"src_tokens": tokens}, "target": tokens.roll(-1, 1)}
        return seconds(lambda: self.scorer.generate([self.model], sample), self.args.clock)


def jobs(args: argparse.Namespace) -> dict[str, tuple[Callable[[Model], float], int]]:
    """Returns what is timed, by name: the call, and its tokens."""
    decoding = {f"decoding, batch {rows}": (lambda model, n=rows: model.decode(n), rows) for rows in args.batches}
    rows = max(args.batches)
    return {**decoding, f"scoring, batch {rows}": (lambda model: model.score(rows), rows * args.tokens_per_sample)}


def measure(args: argparse.Namespace) -> Measured:
    """Returns every model's times beside X-MoE's."""
    found: Measured = {}
    with tqdm(total=len(args.precisions) * len(args.models), unit="model", dynamic_ncols=True) as progress:
        for precision in args.precisions:
            reference = Model(REFERENCE, precision, args)
            for name in args.models:
                progress.set_description_str(f"{name} / {REFERENCE}, {precision}")
                model = Model(name, precision, args)
                for threads in args.threads:
                    torch.set_num_threads(threads)
                    for what, (call, _) in jobs(args).items():
                        turns = (lambda c=call, m=model: c(m)), (lambda c=call, m=reference: c(m))
                        take_turns(*turns, 1)  # untimed
                        found[name, precision, what, threads] = take_turns(*turns, args.pairs)
                progress.update()
    return found


def decide(found: Measured, args: argparse.Namespace) -> list[Target]:
    """Returns the targets that the measured sizes decide."""
    family, size, limit = TARGET
    return [
        (
            f"{FAMILIES[name]} decodes at {limit} or more of X-MoE's tokens/s ({size}, {precision}, {what}, "
            f"{threads} threads): {pairs.swapped().ratio:.3f} {pairs.swapped().range_text()}",
            pairs.swapped().ratio >= limit,
        )
        for (name, precision, what, threads), pairs in found.items()
        if (name, args.size) == (family, size) and what.startswith("decoding")
    ]


def speed_table(found: Measured, args: argparse.Namespace) -> str:
    """Returns a row for each comparison."""
    rows = []
    for (name, precision, what, threads), pairs in found.items():
        tokens = jobs(args)[what][1]
        rows.append((
            what, precision, f"{threads}", FAMILIES[name], f"{tokens / pairs.first_median:.0f}",
            f"{tokens / pairs.second_median:.0f}", f"**{pairs.swapped().ratio:.3f}**", pairs.swapped().range_text(),
        ))  # fmt: skip
    head = ("what", "precision", "threads", "model", "tokens/s", "X-MoE's", "ratio", "")
    return markdown_table(head, sorted(rows))


def run(args: argparse.Namespace) -> int:
    path = report_path(args.output, f"-inference-{args.size}")
    found = measure(args)
    method = (
        f"{args.size}: {args.steps} one-token steps after a prefix of {args.prefix} tokens; scoring of samples of "
        f"{args.tokens_per_sample} tokens. {args.pairs} pairs by turns with X-MoE after one untimed; medians."
    )
    targets = decide(found, args)
    write_report(path, "Inference benchmark", args.threads, targets, [method, speed_table(found, args)], args.clock)
    return conclude(path, targets, args.check)


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(run, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
