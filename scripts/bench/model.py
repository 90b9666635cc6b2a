"""Speed and memory of whole language models by turns: families, precisions, optimisers, ranks; training and use."""

import argparse
import itertools
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fairseq.data import Dictionary
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import console
from bench.console import Target
from bench.memory import Peak, ratios_text
from bench.timing import Operator, Pairs, take_turns
from bench.training import SIZES, Contender, Training, count, flags_of, write_zipf_data
from mhmoe_fairseq.common.tables import markdown_table
from mhmoe_fairseq.models.counts import ModelCounts

DESCRIPTION = """\
Compare tokens per second and peak memory of language models in training. A contender is
FAMILY[:PRECISION][:OPTIMIZER][:RANKS]; families are dense, xmoe (the reference: one head),
mhmoe-params (X-MoE's parameters), mhmoe-flops (X-MoE's FLOPs and parameters) and stock
(fairseq's transformer_lm, as wide as gives a token X-MoE's FLOPs); precisions fp32 and bf16;
optimizers mhmoe_adam and fairseq's adam; ranks share threads, batch and experts. Each has a
process of its own with fairseq's Trainer, and the updates of two take turns.
"""
EPILOG = """\
examples (docs/benchmarks/README.md says more):
  python scripts/bench/model.py                          the targets, at base: ten minutes, 15 GB
  python scripts/bench/model.py --size small --duels mhmoe-flops:bf16/stock xmoe/dense --profile
  python scripts/bench/model.py --size small --inference
  python scripts/bench/model.py --ranks 2 --size small --sentences 16
"""
# Of the second's tokens/s, by size; {} where no target speaks of a duel.
LIMITS = {
    "update": {
        "mhmoe-flops:bf16/mhmoe-flops:fp32:adam": {"base": 3.0, "small": 1.8},
        "mhmoe-flops:fp32/mhmoe-flops:fp32:adam": {"base": 1.4},
        "mhmoe-flops:fp32/xmoe:fp32": {"base": 0.90, "tiny": 0.75},
        "mhmoe-flops:bf16/xmoe:bf16": {"base": 0.90, "tiny": 0.75}, "xmoe:fp32/stock": {},
    },
    "decode": {
        "mhmoe-flops:fp32/xmoe:fp32": {"small": 0.9}, "dense:fp32/xmoe:fp32": {},
        "dense:bf16/xmoe:bf16": {}, "mhmoe-flops:bf16/xmoe:bf16": {"small": 0.9},
    },
}  # fmt: skip
MEMORY_LIMITS = {"mhmoe-flops:bf16/mhmoe-flops:fp32": 0.75, "mhmoe-flops:fp32/mhmoe-flops:fp32:adam": 1.0}
RANKS_LIMIT = 0.85
# What is timed, and of how many rows: updates, or one-token steps and scoring.
TRAINING, INFERENCE = (("update", 0),), (("decode", 1), ("decode", 8), ("score", 8))
Fighters = tuple[Contender, Contender]


class Duel(NamedTuple):
    """Two contenders' steps by turns, of how many rows and on how many threads."""

    fighters: Fighters
    what: str
    rows: int
    threads: int
    pairs: Pairs

    def step(self) -> str:
        return f"{self.what} of {self.rows}" if self.rows else self.what

    def tokens(self, args: argparse.Namespace) -> int:
        """Returns the tokens of a step."""
        return (self.rows or args.sentences) * (1 if self.what == "decode" else args.tokens_per_sample)


def fighters_of(text: str) -> Fighters:
    """An argparse type: two contenders."""
    try:
        first, second = map(Contender.parse, text.split("/"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} must be FIRST/SECOND: {error}") from error
    return first, second


def build_parser() -> argparse.ArgumentParser:
    parser = console.make_parser(DESCRIPTION, EPILOG)
    parser.add_argument("--duels", nargs="+", type=fighters_of, metavar="FIRST/SECOND", help="compare these alone")
    parser.add_argument("--inference", action="store_true", help="one-token steps and scoring, no training")
    parser.add_argument("--profile", action="store_true", help="tell the operators above 2 %% of each update, too")
    parser.add_argument("--data", metavar="FOLDER", help="prepared data to train on, in place of draws by Zipf's law")
    parser.add_argument("--size", choices=list(SIZES), default="base", help="architecture")
    console.add_numbers(parser, {
        "ranks": (1, "processes; from 2 on mhmoe-params is compared with itself in one process"),
        "sentences": (4, "samples per update"), "tokens-per-sample": (512, "most tokens of a sample"),
        "experts": (8, "X-MoE's experts"), "heads": (4, "MH-MoE heads"), "top-k": (2, "experts per sub-token"),
        "vocab": (8000, "synthetic words"),
    })  # fmt: skip
    return parser


def chosen_duels(args: argparse.Namespace) -> list[Fighters]:
    """Returns what is compared; ``ValueError`` for ranks that cannot have equal parts."""
    defaults = list(LIMITS["decode" if args.inference else "update"])
    if args.ranks > 1:
        defaults = [f"mhmoe-params:{args.ranks}/mhmoe-params"]
        if args.duels or args.inference:
            raise ValueError(f"--ranks ({args.ranks}) contradicts --duels and --inference")
    duels = args.duels or list(map(fighters_of, defaults))
    for ranks in {each.ranks for duel in duels for each in duel}:
        for name, values in (("sentences", [args.sentences]), ("threads", args.threads)):
            if any(value % ranks for value in values):
                given = ", ".join(map(str, values))
                raise ValueError(f"--{name} ({given}) must be a multiple of the ranks ({ranks})")
    return duels


@dataclass
class Results:
    """Everything that one run found out."""

    duels: list[Duel] = field(default_factory=list)
    peaks: dict[Contender, Peak] = field(default_factory=dict)
    profiles: dict[Contender, list[Operator]] = field(default_factory=dict)


def fight(fighters: Fighters, threads: int, data: str, args: argparse.Namespace, results: Results, bar: tqdm) -> None:
    """Times a duel of processes of their own; also measures whoever trains and has not been measured."""
    with ExitStack() as stack:
        trainings = [stack.enter_context(closing(Training(each, data, args, threads))) for each in fighters]
        losses = [training.first_loss for training in trainings]
        if fighters[0].ranks > 1 and abs(losses[0] - losses[1]) > 1e-3 * losses[1]:
            raise RuntimeError("the first loss is {:.4f} bits on the ranks and {:.4f} in one process".format(*losses))
        for step in INFERENCE if args.inference else TRAINING:
            turns = [partial(training.seconds, *step) for training in trainings]
            results.duels.append(Duel(fighters, *step, threads, take_turns(turns, args.pairs, bar.update)))
        for fighter, training in zip(fighters, trainings):
            if fighter not in results.peaks and not args.inference:
                results.peaks[fighter] = training.ask("peak")[0]
                if args.profile:
                    results.profiles[fighter] = training.ask("operators")[0]


def decide(results: Results, args: argparse.Namespace) -> Iterator[Target]:
    """Yields the targets that what was measured decides; at other sizes than the default ones none of speed."""
    defaults = build_parser().parse_args([])
    same = ("experts", "heads", "top_k", "tokens_per_sample", "vocab", "sentences")
    is_default = all(getattr(args, flag) == getattr(defaults, flag) for flag in same)
    for duel in results.duels:
        first, second = duel.fighters
        limit = LIMITS.get(duel.what, {}).get(f"{first}/{second}", {}).get(args.size) if is_default else None
        if limit := RANKS_LIMIT if first.ranks > 1 else limit:
            speed, where = duel.pairs.swapped(), f"{args.size}, {duel.step()}, {duel.threads} threads"
            promise = f"{first} has at least {limit:.2f} of {second}'s tokens/s ({where})"
            yield f"{promise}: {speed.ratio:.3f} {speed.range_text()}", speed.ratio >= limit
    for name, limit in MEMORY_LIMITS.items():
        first, second = fighters_of(name)
        if first in results.peaks and second in results.peaks:
            promise = f"an update of {first} needs at most {limit:.2f}x the memory of {second}'s ({args.size})"
            text, worst = ratios_text(results.peaks[first], results.peaks[second])
            yield f"{promise}: {text}", round(worst, 2) <= limit


def speed_table(duels: Sequence[Duel], args: argparse.Namespace) -> str:
    """Returns a row for each duel."""
    rows = []
    for duel in duels:
        speed, steps = duel.pairs.swapped(), [1e3 * median for median in duel.pairs.medians]
        rows.append((
            duel.step(), *map(str, duel.fighters), f"{duel.threads}",
            *(f"{step:.1f}" for step in steps), *(f"{1e3 * duel.tokens(args) / step:.0f}" for step in steps),
            f"**{speed.ratio:.3f}** {speed.range_text()}",
        ))  # fmt: skip
    head = ("step", "first", "second", "threads", "first ms", "second's", "first tokens/s", "second's")
    return markdown_table((*head, "speed, first / second"), rows)


def models_table(counts: dict[str, ModelCounts], peaks: dict[Contender, Peak]) -> str:
    """Returns a row for each contender: sizes, and peak memory in an update."""
    rows = []
    for contender, peak in peaks.items():
        cells, shape = ["-", "as xmoe", "-"], counts.get(contender.family)
        if shape:
            experts = f"{shape.moe.num_experts} x {shape.moe.expert_ffn_dim}" if shape.moe else "-"
            cells = [f"{shape.total / 1e6:.1f}M", f"{shape.flops_per_token / 1e6:.1f}", experts]
        memory = ("-" if size is None else f"{size:.0f}" for size in map(peak.get, ("tensors", "resident")))
        rows.append((f"{contender}", *cells, *memory))
    head = ("contender", "parameters", "MFLOP/token", "experts x width", "MiB, tensors", "MiB, resident")
    return markdown_table(head, rows) if rows else ""


def run(args: argparse.Namespace) -> tuple[Path, list[Target]]:
    """Returns where the report is, and the targets."""
    duels, results = chosen_duels(args), Results()
    kind = "parallel" if args.ranks > 1 else "inference" if args.inference else "train"
    path = console.report_path(args.output, f"-{kind}-{args.size}")
    total = len(duels) * len(args.threads) * len(INFERENCE if args.inference else TRAINING) * args.pairs
    with tempfile.TemporaryDirectory() as folder, tqdm(total=total, unit="pair", dynamic_ncols=True) as progress:
        data = args.data or write_zipf_data(Path(folder), args)
        dictionary = Dictionary.load(str(Path(data) / "dict.txt"))
        families = {fighter.family for duel in duels for fighter in duel if fighter.family != "stock"}
        counts = {family: count(family, args, dictionary) for family in families}
        for threads, fighters in itertools.product(args.threads, duels):
            progress.set_description_str(f"{fighters[0]} / {fighters[1]}, {threads} threads")
            fight(fighters, threads, data, args, results, progress)
    tokens = f"{args.size}: {args.sentences} x {args.tokens_per_sample} tokens per update"
    turns = f"Steps took turns for {args.pairs} pairs after one of each; times are medians, the speed is the pairs'."
    sections = {
        "Speed": f"{tokens} from {args.data or 'Zipf draws'}. {turns}\n\n{speed_table(results.duels, args)}",
        "Models, and peak memory of an update": models_table(counts, results.peaks),
        **console.operator_sections(results.profiles),
        "Flags": "\n".join(
            f"- {each}: `{shlex.join(flags_of(each, args))}`" for each in dict.fromkeys(itertools.chain(*duels))
        ),
    }
    targets = list(decide(results, args))
    console.write_report(path, "Whole-model benchmark", args, targets, sections)
    return path, targets


if __name__ == "__main__":
    sys.exit(console.run_benchmark(run, build_parser()))
