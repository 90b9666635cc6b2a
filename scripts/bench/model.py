"""Speed and memory of whole language models by turns: families, precisions, optimisers, ranks; training and use."""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fairseq.data import Dictionary
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import console
from bench.console import Target
from bench.contenders import DTYPES, gemm_bound
from bench.memory import Peak, ratios_text
from bench.timing import Operator, Pairs, take_turns, time_pairs
from bench.training import SIZES, Contender, Training, count, flags_of, write_zipf_data
from mhmoe_fairseq.analysis.plan.ranks import Cluster, exchange
from mhmoe_fairseq.common.tables import markdown_table
from mhmoe_fairseq.models.counts import ModelCounts
from mhmoe_fairseq.models.flags import expert_parallel_size

DESCRIPTION = """\
Compare tokens per second and peak memory of language models in training. A contender is
FAMILY[:PRECISION][:OPTIMIZER][:RANKS]; families are dense, xmoe (the reference: one head),
mhmoe-params (X-MoE's parameters), mhmoe-flops (X-MoE's FLOPs and parameters) and stock
(fairseq's transformer_lm, as wide as gives a token X-MoE's FLOPs); precisions fp32 and bf16;
optimizers mhmoe_adam and fairseq's adam; ranks share threads, batch and experts. Each has a
process of its own with fairseq's Trainer, and the updates of two take turns.
"""
EPILOG = """\
examples:
  python scripts/bench/model.py                          the targets, at base: ten minutes, 15 GB
  python scripts/bench/model.py --size small --duels mhmoe-flops:bf16/dense:bf16 --profile
  python scripts/bench/model.py --size small --inference
  python scripts/bench/model.py --ranks 2 --size small --sentences 16
Tokens are draws by Zipf's law unless --data is given. docs/benchmarks/README.md says more.
"""
# Of the second's tokens/s, by size; {} where no target speaks of a duel. Neighbours share a contender, which is kept.
LIMITS = {
    "update": {
        "mhmoe-flops:bf16/mhmoe-flops:fp32:adam": {"base": 3.0, "small": 1.8},
        "mhmoe-flops:fp32/mhmoe-flops:fp32:adam": {"base": 1.4},
        "mhmoe-flops:fp32/xmoe:fp32": {"base": 0.90, "tiny": 0.75},
        "mhmoe-flops:bf16/xmoe:bf16": {"base": 0.90, "tiny": 0.75},
    },
    "decode": {
        "mhmoe-flops:fp32/xmoe:fp32": {"small": 0.9}, "dense:fp32/xmoe:fp32": {},
        "dense:bf16/xmoe:bf16": {}, "mhmoe-flops:bf16/xmoe:bf16": {"small": 0.9},
    },
}  # fmt: skip
RIVALS = (
    "dense:bf16/xmoe:bf16", "mhmoe-params:bf16/xmoe:bf16", "mhmoe-params:fp32/xmoe:fp32", "dense:fp32/xmoe:fp32",
    "xmoe:fp32/stock", "mhmoe-flops:fp32/stock", "mhmoe-flops:bf16/stock", "xmoe:bf16/stock",
)  # fmt: skip
MEMORY_LIMITS = {"mhmoe-flops:bf16/mhmoe-flops:fp32": 0.75, "mhmoe-flops:fp32/mhmoe-flops:fp32:adam": 1.0}
RANKS_LIMIT = 0.85
# What is timed, and of how many rows: updates, or one-token steps and scoring.
TRAINING, INFERENCE = (("update", 0),), (("decode", 1), ("decode", 8), ("score", 8))
Fighters = tuple[Contender, Contender]


class Duel(NamedTuple):
    """Two contenders' steps by turns, of how many rows and on how many threads; the first's last log."""

    fighters: Fighters
    what: str
    rows: int
    threads: int
    pairs: Pairs
    log: dict[str, float]

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
    for name, what in {
        "rivals": "the families that no target speaks of, too", "inference": "one-token steps and scoring, no training",
        "profile": "tell the operators above 2 %% of each update, too",
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", action="store_true", help=what)
    parser.add_argument("--data", metavar="FOLDER", help="prepared data to train on, in place of synthetic tokens")
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
    duels = args.duels or [fighters_of(text) for text in LIMITS["decode" if args.inference else "update"]]
    if args.rivals:
        duels = [*duels, *map(fighters_of, RIVALS)]
    if args.ranks > 1:
        if args.duels or args.rivals or args.inference:
            raise ValueError(f"--ranks ({args.ranks}) contradicts --duels, --rivals and --inference")
        duels = [(Contender("mhmoe-params", ranks=args.ranks), Contender("mhmoe-params"))]
    for ranks in {each.ranks for duel in duels for each in duel}:
        for name, values in (("sentences", [args.sentences]), ("threads", args.threads)):
            if any(value % ranks for value in values):
                given = ", ".join(map(str, values))
                raise ValueError(f"--{name} ({given}) must be a multiple of the ranks ({ranks})")
    return duels


class Ring:
    """Lets contenders take turns, each duel's in their own processes; a contender of the next duel is kept."""

    def __init__(self, data: str, args: argparse.Namespace) -> None:
        self.data, self.args = data, args
        self.trainings: dict[tuple[Contender, int], Training] = {}
        self.duels: list[Duel] = []
        self.peaks: dict[Contender, Peak] = {}
        self.operators: dict[Contender, list[Operator]] = {}

    def __call__(self, duels: Sequence[Fighters]) -> None:
        """Fights every duel with every number of threads."""
        rounds = [(duel, threads) for threads in self.args.threads for duel in duels]
        steps = INFERENCE if self.args.inference else TRAINING
        try:
            with tqdm(total=len(rounds) * len(steps) * self.args.pairs, unit="pair", dynamic_ncols=True) as progress:
                for fighters, threads in rounds:
                    progress.set_description_str(f"{fighters[0]} / {fighters[1]}, {threads} threads")
                    self.fight(fighters, threads, steps, progress)
        finally:
            self.keep([])

    def keep(self, wanted: Sequence[tuple[Contender, int]]) -> None:
        """Ends the trainings that are not wanted, for their memory, and starts those that are missing."""
        for key in [key for key in self.trainings if key not in wanted]:
            self.trainings.pop(key).close()
        for contender, threads in wanted:
            if (contender, threads) not in self.trainings:
                self.trainings[contender, threads] = Training(contender, self.data, self.args, threads)

    def fight(self, fighters: Fighters, threads: int, steps: Sequence[tuple[str, int]], progress: tqdm) -> None:
        """Times a duel; also measures whoever trains and has not been measured."""
        self.keep([(fighter, threads) for fighter in fighters])
        first, second = (self.trainings[fighter, threads] for fighter in fighters)
        losses = [training.first_loss for training in (first, second)]
        if fighters[0].ranks > 1 and abs(losses[0] - losses[1]) > 1e-3 * losses[1]:
            raise RuntimeError("the first loss is {:.4f} bits on the ranks and {:.4f} in one process".format(*losses))
        for step in steps:
            turns = (lambda s=step: first.seconds(*s)), (lambda s=step: second.seconds(*s))
            if self.args.inference:
                take_turns(*turns, 1)  # untimed, as each one's first update
            pairs = take_turns(*turns, self.args.pairs, progress.update)
            self.duels.append(Duel(fighters, *step, threads, pairs, first.log))
        for fighter, training in zip(fighters, (first, second)):
            if fighter not in self.peaks and not self.args.inference:
                self.peaks[fighter] = training.ask("peak")[0]
                self.operators[fighter] = training.ask("operators")[0] if self.args.profile else []


def decide(duels: Sequence[Duel], peaks: dict[Contender, Peak], args: argparse.Namespace) -> list[Target]:
    """Returns the targets that what was measured decides; at other sizes than the default ones none of speed."""
    found, defaults = [], build_parser().parse_args([])
    same = ("experts", "heads", "top_k", "tokens_per_sample", "vocab", "sentences")
    is_default = all(getattr(args, flag) == getattr(defaults, flag) for flag in same)
    for duel in duels:
        first, second = duel.fighters
        limit = LIMITS.get(duel.what, {}).get(f"{first}/{second}", {}).get(args.size) if is_default else None
        if limit := RANKS_LIMIT if first.ranks > 1 else limit:
            speed, where = duel.pairs.swapped(), f"{args.size}, {duel.step()}, {duel.threads} threads"
            promise = f"{first} has at least {limit:.2f} of {second}'s tokens/s ({where})"
            found.append((f"{promise}: {speed.ratio:.3f} {speed.range_text()}", speed.ratio >= limit))
    for name, limit in MEMORY_LIMITS.items():
        first, second = fighters_of(name)
        if first in peaks and second in peaks:
            promise = f"an update of {first} needs at most {limit:.2f}x the memory of {second}'s ({args.size})"
            text, worst = ratios_text(peaks[first], peaks[second])
            found.append((f"{promise}: {text}", round(worst, 2) <= limit))
    return found


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
        memory = ("-" if size is None else f"{size:.0f}" for size in map(peak.get, ("tensors", "resident", "process")))
        rows.append((f"{contender}", *cells, *memory))
    head = ("contender", "parameters", "MFLOP/token", "experts x width", "MiB, tensors", "resident", "whole process")
    return markdown_table(head, rows)


def products_table(counts: dict[str, ModelCounts], duels: Sequence[Duel], args: argparse.Namespace) -> str:
    """Returns what matrix products alone permit; nothing where both have the same."""
    rows = []
    for duel in duels:
        shapes = [counts.get(fighter.family) for fighter in duel.fighters]
        if duel.what == "update" and shapes[0] is not shapes[1] and all(shape and shape.moe for shape in shapes):
            dtype = DTYPES[duel.fighters[0].precision]
            bounds = [gemm_bound(shape.moe, duel.tokens(args), dtype) for shape in shapes]
            calls = [lambda b=b, n=shape.moe_layers: [b() for _ in range(n)] for b, shape in zip(bounds, shapes)]
            (ours, theirs), update = time_pairs(*calls, args.pairs, args.clock).medians, duel.pairs.medians[1]
            times = (f"{1e3 * ours:.1f}", f"{1e3 * theirs:.1f}", f"{update / (update + ours - theirs):.3f}")
            rows.append((*map(str, duel.fighters), *times))
    head = ("first", "second", "first's products, ms", "second's", "speed that they alone would permit")
    return markdown_table(head, rows) if rows else ""


def traffic(duel: Duel, shape: ModelCounts, args: argparse.Namespace) -> str:
    """Tells what one MoE layer moved in one direction on all ranks, as logged and as planned."""
    ranks, size = duel.fighters[0].ranks, expert_parallel_size(shape.moe.num_experts, None, duel.fighters[0].ranks)
    if "a2a_rows" not in duel.log:
        return "No rows: every rank has all experts."
    cluster = Cluster(ranks, ranks, duel.tokens(args) // ranks, 1.0, 1.0)
    element = DTYPES[duel.fighters[0].precision].itemsize
    plan = exchange(shape.moe, cluster, size, element=element, recompute=False)
    logged = f"{float(duel.log['a2a_rows']):.0f} rows, {float(duel.log['a2a_mb']):.3f} MB to other ranks"
    return f"{logged}; planned, even routing: {plan.rows * ranks} rows, {plan.off_rank * ranks / 1e6:.3f} MB."


def report_parts(ring: Ring, counts: dict[str, ModelCounts], args: argparse.Namespace) -> list[str]:
    parts = [
        "## Speed",
        f"{args.size}: {args.sentences} x {args.tokens_per_sample} tokens per update from {args.data or 'Zipf draws'}. "
        f"Steps took turns for {args.pairs} pairs after one of each; times are medians, the speed is the pairs'.",
        speed_table(ring.duels, args),
    ]
    if ring.peaks:
        text = "MiB of the first rank, beyond weights and the optimiser's state; of the process, beyond its imports."
        parts += ["## Models, and peak memory of an update", text, models_table(counts, ring.peaks)]
    for duel in ring.duels:
        if duel.fighters[0].ranks > 1:
            moved = traffic(duel, counts[duel.fighters[0].family], args)
            parts.append(f"One MoE layer of {duel.fighters[0]} moved, one direction, all ranks: {moved}")
    if products := products_table(counts, ring.duels, args):
        text = "All MoE layers' products as `torch.mm` into preallocated outputs, equal rows for each expert, by turns."
        parts += ["## What matrix products alone permit", text, products]
    for contender, operators in ring.operators.items():
        if operators:
            parts += [f"## Where the time of {contender} goes", console.operators_table(operators)]
    flags = {f"- {each}: `{shlex.join(flags_of(each, args))}`": None for duel in ring.duels for each in duel.fighters}
    return [*parts, "## Flags", "\n".join(flags)]


def run(args: argparse.Namespace) -> int:
    duels = chosen_duels(args)
    kind = "-parallel" if args.ranks > 1 else "-inference" if args.inference else "-train"
    path = console.report_path(args.output, f"{kind}-{args.size}")
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or write_zipf_data(Path(folder), args)
        dictionary = Dictionary.load(str(Path(data) / "dict.txt"))
        families = {fighter.family for duel in duels for fighter in duel if fighter.family != "stock"}
        counts = {family: count(family, args, dictionary) for family in families}
        ring = Ring(data, args)
        ring(duels)
    targets, parts = decide(ring.duels, ring.peaks, args), report_parts(ring, counts, args)
    console.write_report(path, "Whole-model benchmark", args.threads, targets, parts, args.clock)
    return console.conclude(path, targets, args.check)


if __name__ == "__main__":
    sys.exit(console.run_benchmark(run, build_parser()))
