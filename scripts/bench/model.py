"""Training speed and memory of whole language models by turns: families, precisions, optimisers, ranks."""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fairseq.data import Dictionary
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.console import (
    Target,
    add_numbers,
    conclude,
    make_parser,
    operators_table,
    report_path,
    run_benchmark,
    write_report,
)
from bench.contenders import DTYPES, gemm_bound
from bench.timing import Operator, Pairs, take_turns, time_pairs
from bench.training import FAMILIES, Contender, Training, add_model_arguments, count, flags_of, write_zipf_data
from mhmoe_fairseq.analysis.plan.ranks import Cluster, exchange
from mhmoe_fairseq.common.tables import markdown_table
from mhmoe_fairseq.models.counts import ModelCounts
from mhmoe_fairseq.models.flags import expert_parallel_size

DESCRIPTION = """\
Train language models for a few updates and compare tokens per second and peak memory.
A contender is written FAMILY[:PRECISION][:OPTIMIZER][:RANKS], with the families
  dense         no experts
  xmoe          X-MoE, the reference: one head
  mhmoe-params  MH-MoE with X-MoE's parameters (more work per token)
  mhmoe-flops   MH-MoE with X-MoE's FLOPs and parameters (more, smaller experts)
  stock         fairseq's own transformer_lm and cross_entropy, its inner width chosen
                so that a token costs X-MoE's FLOPs
the precisions fp32 (default) and bf16 (--mhmoe-precision), the optimizers mhmoe_adam
(default) and adam (fairseq's own; stock has no other), and a number of processes that
share the experts out over gloo. Two contenders make a duel, FIRST/SECOND: each has a
process of its own with fairseq's Trainer, and their updates take turns, so that a slow
moment hits both. The report lists the flags, which you can give to fairseq-train.

With ranks both contenders have the same threads in sum and the same batch per update,
must have the same loss at the first update, and the rows that training says it moved
stand beside those of `mhmoe plan`.
"""
EPILOG = """\
examples:
  python scripts/bench/model.py
      what the project's targets speak of: base (12 layers of 768), 8 experts, 8,000
      words, 4 x 512 tokens per update; ten minutes on two cores, 15 GB of memory
  python scripts/bench/model.py --size tiny --rivals
      the other families, too
  python scripts/bench/model.py --size small --duels mhmoe-flops:bf16/dense:bf16 --profile
      one comparison, and where the time of both goes
  python scripts/bench/model.py --ranks 2 --size small --sentences 16
      two ranks of one thread against one process of two: the other target
  python scripts/bench/model.py --data data/english
      on the training split of a folder that `mhmoe prepare` wrote

The tokens are draws by Zipf's law unless --data is given. Weights are fresh, hence
routing is as balanced as at the start of a training.
"""
# Of the second's tokens/s, by size.
SPEED_LIMITS = {
    "mhmoe-flops:bf16/mhmoe-flops:fp32:adam": {"base": 3.0, "small": 1.8},
    "mhmoe-flops:fp32/mhmoe-flops:fp32:adam": {"base": 1.4},
    "mhmoe-flops:fp32/xmoe:fp32": {"base": 0.90, "tiny": 0.75},
    "mhmoe-flops:bf16/xmoe:bf16": {"base": 0.90, "tiny": 0.75},
}
# Of the second's peak memory in an update.
MEMORY_LIMITS = {
    "mhmoe-flops:bf16/mhmoe-flops:fp32": 0.75,
    "mhmoe-flops:fp32/mhmoe-flops:fp32:adam": 1.0,
}
RANKS_LIMIT = 0.85  # of one process's tokens/s
# Neighbours share a contender, which need not be built again.
RIVALS = (
    "dense:bf16/xmoe:bf16", "mhmoe-params:bf16/xmoe:bf16", "mhmoe-params:fp32/xmoe:fp32", "dense:fp32/xmoe:fp32",
    "xmoe:fp32/stock", "mhmoe-flops:fp32/stock", "mhmoe-flops:bf16/stock", "xmoe:bf16/stock",
)  # fmt: skip
Fighters = tuple[Contender, Contender]
Peaks = dict[Contender, dict[str, float | None]]


@dataclass(frozen=True)
class Duel:
    """Two contenders' updates by turns: their seconds, and each one's first loss in bits and last log."""

    fighters: Fighters
    threads: int
    pairs: Pairs
    first_losses: tuple[float, float]
    logs: tuple[dict[str, float], dict[str, float]]


def fighters_of(text: str) -> Fighters:
    """An argparse type: two contenders."""
    try:
        first, second = map(Contender.parse, text.split("/"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} must be FIRST/SECOND: {error}") from error
    return first, second


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(DESCRIPTION, EPILOG)
    what = "FIRST/SECOND: compare these alone"
    parser.add_argument("--duels", nargs="+", type=fighters_of, metavar="DUEL", help=what)
    parser.add_argument("--rivals", action="store_true", help="the families that no target speaks of, too")
    parser.add_argument("--profile", action="store_true", help="tell the operators above 2 %% of each update, too")
    parser.add_argument("--data", metavar="FOLDER", help="prepared data to train on, in place of synthetic tokens")
    ranks = "processes; from 2 on MH-MoE (params) is compared with itself in one process"
    add_numbers(parser, {"ranks": (1, ranks), "sentences": (4, "samples per update")})
    add_model_arguments(parser, "base")
    return parser


def chosen_duels(args: argparse.Namespace) -> list[Fighters]:
    """Returns what is compared; ``ValueError`` for ranks that cannot have equal parts."""
    if args.ranks > 1 and (args.duels or args.rivals):
        raise ValueError(f"--ranks ({args.ranks}) contradicts --duels and --rivals: write mhmoe-params:{args.ranks}")
    if args.ranks > 1:
        duels = [(Contender("mhmoe-params", ranks=args.ranks), Contender("mhmoe-params"))]
    else:
        duels = args.duels or [fighters_of(text) for text in (*SPEED_LIMITS, *(RIVALS if args.rivals else ()))]
    for ranks in {each.ranks for duel in duels for each in duel}:
        for flag, values in (("sentences", [args.sentences]), ("threads", args.threads)):
            if any(value % ranks for value in values):
                given = ", ".join(map(str, values))
                raise ValueError(f"--{flag} ({given}) must be a multiple of the ranks ({ranks})")
    return duels


def check_same(ranks: float, alone: float) -> None:
    """Raise RuntimeError unless the first losses agree: they are of the same weights and the same tokens."""
    if abs(ranks - alone) > 1e-3 * abs(alone):
        raise RuntimeError(f"the first update's loss is {ranks:.4f} bits on the ranks and {alone:.4f} in one process")


class Ring:
    """Lets contenders train by turns, each duel's in their own processes; a contender of the next duel is kept.

    Attributes:
        duels, peaks, operators: what was found out.
    """

    def __init__(self, data: str, args: argparse.Namespace) -> None:
        self.data, self.args = data, args
        self.trainings: dict[tuple[Contender, int], Training] = {}
        self.duels: list[Duel] = []
        self.peaks: Peaks = {}
        self.operators: dict[Contender, list[Operator]] = {}

    def enter(self, fighters: Fighters, threads: int) -> list[Training]:
        """Returns the trainings of two contenders; the others end first, for their memory."""
        wanted = [(fighter, threads) for fighter in fighters]
        for key in [key for key in self.trainings if key not in wanted]:
            self.trainings.pop(key).close()
        for key in wanted:
            if key not in self.trainings:
                self.trainings[key] = Training(key[0], self.data, self.args, threads)
        return [self.trainings[key] for key in wanted]

    def fight(self, fighters: Fighters, threads: int, progress: tqdm) -> None:
        """Times a duel; also measures whoever has not been measured."""
        progress.set_description_str(f"{fighters[0]} / {fighters[1]}, {threads} threads")
        first, second = self.enter(fighters, threads)
        if replace(fighters[0], ranks=1) == replace(fighters[1], ranks=1):
            check_same(first.first_loss, second.first_loss)
        pairs = take_turns(first.seconds, second.seconds, self.args.pairs, progress.update)
        losses = first.first_loss, second.first_loss
        self.duels.append(Duel(fighters, threads, pairs, losses, (first.log, second.log)))
        for fighter, training in zip(fighters, (first, second)):
            if fighter not in self.peaks:
                self.peaks[fighter] = training.peak()
                self.operators[fighter] = training.operators() if self.args.profile else []

    def __call__(self, duels: Sequence[Fighters]) -> None:
        """Fights every duel with every number of threads."""
        rounds = [(duel, threads) for threads in self.args.threads for duel in duels]
        try:
            with tqdm(total=len(rounds) * self.args.pairs, unit="pair", dynamic_ncols=True) as progress:
                for duel, threads in rounds:
                    self.fight(duel, threads, progress)
        finally:
            for training in self.trainings.values():
                training.close()


def decide(duels: Sequence[Duel], peaks: Peaks, args: argparse.Namespace) -> list[Target]:
    """Returns the targets that what was measured decides; at other sizes than the default ones none of speed."""
    found = []
    defaults = build_parser().parse_args([])
    same = ("experts", "heads", "top_k", "tokens_per_sample", "vocab", "sentences")
    is_default = all(getattr(args, flag) == getattr(defaults, flag) for flag in same)
    for duel in duels:
        first, second = duel.fighters
        name, limit = f"{first}/{second}", None
        if is_default:
            limit = SPEED_LIMITS.get(name, {}).get(args.size)
        if first.ranks > second.ranks == 1 and replace(first, ranks=1) == second:
            limit = RANKS_LIMIT
        if limit is not None:
            speed = duel.pairs.swapped()
            promise = f"{first} trains at {limit:.2f} or more of {second}'s tokens/s"
            where = f"({args.size}, {duel.threads} threads)"
            found.append((f"{promise} {where}: {speed.ratio:.3f} {speed.range_text()}", speed.ratio >= limit))
    for name, limit in MEMORY_LIMITS.items():
        first, second = fighters_of(name)
        if first in peaks and second in peaks:
            both = [what for what in ("tensors", "resident") if peaks[first][what] and peaks[second][what]]
            ratios = {what: peaks[first][what] / peaks[second][what] for what in both}
            text = ", ".join(f"{what} {ratio:.2f}x" for what, ratio in ratios.items())
            promise = f"an update of {first} needs at most {limit:.2f}x the memory of {second}'s ({args.size})"
            found.append((f"{promise}: {text}", all(round(ratio, 2) <= limit for ratio in ratios.values())))
    return found


def speed_table(duels: Sequence[Duel], args: argparse.Namespace) -> str:
    """Returns a row for each duel."""
    tokens = args.sentences * args.tokens_per_sample
    rows = [
        (
            f"{duel.fighters[0]}", f"{duel.fighters[1]}", f"{duel.threads}", f"{duel.pairs.first_median:.3f}",
            f"{duel.pairs.second_median:.3f}", f"{tokens / duel.pairs.first_median:.0f}",
            f"{tokens / duel.pairs.second_median:.0f}", f"**{duel.pairs.swapped().ratio:.3f}**",
            duel.pairs.swapped().range_text(),
        )
        for duel in duels
    ]  # fmt: skip
    head = ("first", "second", "threads", "first s/update", "second's", "first tokens/s", "second's", "speed of first")
    return markdown_table((*head, ""), rows)


def models_table(counts: dict[str, ModelCounts], peaks: Peaks) -> str:
    """Returns a row for each contender: sizes, and peak memory in an update."""
    rows = []
    for contender, peak in peaks.items():
        shape = counts.get(contender.family)
        moe = shape and shape.moe
        rows.append((
            f"{contender}", FAMILIES[contender.family], f"{shape.total / 1e6:.1f}M" if shape else "-",
            f"{shape.flops_per_token / 1e6:.1f}" if shape else "as xmoe",
            f"{moe.num_experts} x {moe.expert_ffn_dim}" if moe else "-",
            *("-" if peak[what] is None else f"{peak[what]:.0f}" for what in ("tensors", "resident", "process")),
        ))  # fmt: skip
    head = ("contender", "model", "parameters", "MFLOP/token", "experts x width", "MiB, tensors", "resident")
    return markdown_table((*head, "whole process"), rows)


def products_table(counts: dict[str, ModelCounts], duels: Sequence[Duel], args: argparse.Namespace) -> str:
    """Returns what matrix products alone permit."""
    rows, tokens = [], args.sentences * args.tokens_per_sample
    for duel in duels:
        first, second = (counts.get(fighter.family) for fighter in duel.fighters)
        if first and second and first.moe and second.moe and first is not second:
            bounds = [gemm_bound(each.moe, tokens, DTYPES[duel.fighters[0].precision]) for each in (first, second)]
            calls = [lambda b=b, n=each.moe_layers: [b() for _ in range(n)] for b, each in zip(bounds, (first, second))]
            products = time_pairs(*calls, pairs=args.pairs, clock=args.clock)
            ours, theirs, update = products.first_median, products.second_median, duel.pairs.second_median
            limit = update / (update + ours - theirs)
            rows.append((
                f"{duel.fighters[0]}", f"{duel.fighters[1]}", f"{ours:.3f}", f"{theirs:.3f}", f"{products.ratio:.3f}",
                f"{limit:.3f}",
            ))  # fmt: skip
    head = ("first", "second", "first's products, s/update", "second's", "ratio", "speed that they alone would permit")
    return markdown_table(head, rows) if rows else ""


def traffic_table(duel: Duel, shape: ModelCounts, args: argparse.Namespace) -> str:
    """What one MoE layer moved in one direction on all ranks, as logged and as planned."""
    log, ranks = duel.logs[0], duel.fighters[0].ranks
    if shape.moe is None or "a2a_rows" not in log:
        return "Nothing: every rank has all experts."
    cluster = Cluster(ranks, ranks, args.sentences * args.tokens_per_sample // ranks, 1.0, 1.0)
    size = expert_parallel_size(shape.moe.num_experts, None, ranks)
    element = 4 if duel.fighters[0].precision == "fp32" else 2
    plan = exchange(shape.moe, cluster, size, element=element, recompute=False)
    rows = [
        ("logged", f"{float(log['a2a_rows']):.0f}", f"{float(log['a2a_mb']):.3f}"),
        ("plan, even routing", f"{plan.rows * ranks}", f"{plan.off_rank * ranks / 1e6:.3f}"),
    ]
    return markdown_table(("one MoE layer, one direction, all ranks", "rows", "MB to other ranks"), rows)


def report_parts(ring: Ring, counts: dict[str, ModelCounts], args: argparse.Namespace) -> list[str]:
    parts = [
        "## Speed",
        f"{args.size}: {args.sentences} x {args.tokens_per_sample} tokens per update from {args.data or 'Zipf draws'}. "
        f"Updates took turns for {args.pairs} pairs, after one of each; seconds are medians, the speed is the pairs'.",
        speed_table(ring.duels, args),
        "## Models, and peak memory of an update (MiB of the first rank)",
        "Tensors and resident: beyond weights and the optimiser's state. Whole process: beyond the imports.",
        models_table(counts, ring.peaks),
    ]
    for duel in ring.duels:
        if duel.fighters[0].ranks > 1:
            losses = "First loss {:.4f} bits on the ranks, {:.4f} of the second.".format(*duel.first_losses)
            table = traffic_table(duel, counts[duel.fighters[0].family], args)
            parts += [f"## What passed between the ranks of {duel.fighters[0]} in an update", losses, table]
    if products := products_table(counts, ring.duels, args):
        parts += [
            "## What matrix products alone permit",
            "The products of all MoE layers, forward and backward, as `torch.mm` into preallocated outputs with equal "
            "rows for each expert, by turns. The last column is the speed if everything else took the second's "
            "time and these products their own: what no implementation with `torch.mm` can exceed at these shapes.",
            products,
        ]
    for contender, operators in ring.operators.items():
        if operators:
            parts += [f"## Where the time of {contender} goes (operators above 2 %)", operators_table(operators)]
    flags = [f"- {contender}: `{shlex.join(flags_of(contender, args))}`" for contender in ring.peaks]
    return [*parts, "## Flags", "\n".join(flags)]


def run(args: argparse.Namespace) -> int:
    duels = chosen_duels(args)
    path = report_path(args.output, "-parallel" if args.ranks > 1 else f"-train-{args.size}")
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or write_zipf_data(Path(folder), args)
        dictionary = Dictionary.load(str(Path(data) / "dict.txt"))
        families = {fighter.family for duel in duels for fighter in duel if fighter.family != "stock"}
        counts = {family: count(family, args, dictionary) for family in families}
        ring = Ring(data, args)
        ring(duels)
    targets = decide(ring.duels, ring.peaks, args)
    parts = report_parts(ring, counts, args)
    write_report(path, "Whole-model training benchmark", args.threads, targets, parts, args.clock)
    return conclude(path, targets, args.check)


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(run, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
