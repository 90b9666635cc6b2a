"""Time of what a language model computes around its MoE layers, against PyTorch's operations and TorchScale's."""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchscale.component.multihead_attention import MultiheadAttention
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import console
from bench.timing import Pairs, seconds, take_turns
from mhmoe_fairseq.common.arguments import whole
from mhmoe_fairseq.common.tables import markdown_table
from mhmoe_fairseq.models.cross_entropy import predict
from mhmoe_fairseq.moe.cpu import kernels
from mhmoe_fairseq.torchscale_ext.attention import SelfAttention
from mhmoe_fairseq.torchscale_ext.positions import RotaryPositions
from mhmoe_fairseq.torchscale_ext.settings import DecoderSettings

DESCRIPTION = """\
Measure forward and backward of the output layer with its cross entropy, of causal self-attention and of rotary
positions against the plain ways: linear, log-softmax and loss; TorchScale's attention; four real products.
"""
EPILOG = """\
The outputs are compared before they are timed. MHMOE_CPU_KERNELS=0 measures without the compiled kernels.
"""
PADDING = 1


class Way(NamedTuple):
    """A computation, and what its gradients are taken by."""

    forward: Callable[[], Tensor]
    inputs: Iterable[Tensor]

    def step(self) -> None:
        """Forward and backward."""
        output = self.forward()
        torch.autograd.grad(output, list(self.inputs), torch.ones_like(output))


class Duel(NamedTuple):
    """Ours and another way to the same output."""

    what: str
    other: str
    ways: tuple[Way, Way]

    def check(self) -> None:
        """Raises ``RuntimeError`` where the outputs differ by more than bf16 rounds."""
        ours, other = (way.forward().detach().float() for way in self.ways)
        if (error := float((ours - other).norm() / other.norm())) > 0.02:
            raise RuntimeError(f"{self.what}: the outputs of ours and of {self.other} differ by {error:.1%}")


def output_layer(args: argparse.Namespace, width: int) -> Duel:
    """The sum of losses of all tokens, 2 % of which are padding."""
    layer, x = nn.Linear(width, args.vocab, bias=False), torch.randn(args.tokens, width, requires_grad=True)
    targets = torch.randint(2, args.vocab, (args.tokens,))
    targets[::50] = PADDING

    def plain() -> Tensor:
        log_probs = layer(x).log_softmax(-1, dtype=torch.float32)
        return F.nll_loss(log_probs, targets, ignore_index=PADDING, reduction="sum")

    def ours() -> Tensor:
        return predict(x, layer, targets, PADDING).losses.sum()

    inputs = [x, layer.weight]
    return Duel(f"output layer, {args.vocab:,} x {width}", "plain", (Way(ours, inputs), Way(plain, inputs)))


def attention(args: argparse.Namespace, width: int, positions: int) -> Duel:
    """Causal self-attention with its projections."""
    settings = DecoderSettings(decoder_embed_dim=width, decoder_attention_heads=args.heads)
    ours, theirs = (
        SelfAttention(settings, width, args.heads),
        MultiheadAttention(settings, width, args.heads, self_attention=True, subln=settings.subln),
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(max(1, args.tokens // positions), positions, width, requires_grad=True)
    mask = torch.full((positions, positions), -torch.inf).triu(1)
    ways = (
        Way(partial(ours, x, is_causal=True), [x, *ours.parameters()]),
        Way(lambda: theirs(x, x, x, attn_mask=mask)[0], [x, *theirs.parameters()]),
    )
    return Duel(f"attention, {positions} positions of {width}, {args.heads} heads", "TorchScale", ways)


def rotary(args: argparse.Namespace, width: int, positions: int, dtype: torch.dtype) -> Duel:
    """Of the queries of all tokens."""
    dim = width // args.heads
    turn = RotaryPositions(dim, positions)
    x = torch.randn(max(1, args.tokens // positions), args.heads, positions, dim).to(dtype).requires_grad_()
    cos, sin = (part.to(dtype) for part in turn.turns.unbind(-1))

    def four_products() -> Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    ways = Way(partial(turn, x), [x]), Way(four_products, [x])
    return Duel(f"rotary, {positions} positions of {args.heads} x {dim}", "four products", ways)


def duels(args: argparse.Namespace, dtype: torch.dtype) -> Iterator[Duel]:
    """Yields all of one type."""
    for width in args.widths:
        yield output_layer(args, width)
        for positions in args.positions:
            yield attention(args, width, positions)
            yield rotary(args, width, positions, dtype)


def fight(duel: Duel, args: argparse.Namespace, progress: tqdm) -> Pairs:
    """Compares and times."""
    duel.check()
    turns = [partial(seconds, way.step, args.clock) for way in duel.ways]
    return take_turns(turns, args.pairs, progress.update)


def run(args: argparse.Namespace) -> tuple[Path, list[console.Target]]:
    """Returns where the report is; nothing is promised."""
    for width in args.widths:
        if width % (2 * args.heads):
            raise ValueError(f"--widths ({width}) must be multiples of 2 x --heads ({args.heads}): rotary turns pairs")
    path, rows = console.report_path(args.output, "-around"), []
    count = len(args.threads) * 2 * len(args.widths) * (1 + 2 * len(args.positions))
    with tqdm(total=count * args.pairs, unit="pair", dynamic_ncols=True) as progress:
        for threads, dtype in itertools.product(args.threads, (torch.float32, torch.bfloat16)):
            torch.set_num_threads(threads)
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                for duel in duels(args, dtype):
                    progress.set_description_str(duel.what)
                    pairs = fight(duel, args, progress)
                    ours, other = (f"{1e3 * median:.1f}" for median in pairs.medians)
                    ratio = f"**{pairs.ratio:.2f}** {pairs.range_text()}"
                    rows.append((duel.what, str(dtype)[6:], f"{threads}", duel.other, ours, other, ratio))
    head = ("what", "type", "threads", "other way", "ours, ms", "other, ms", "ours / other")
    about = (
        f"Forward and backward of {args.tokens:,} tokens; medians of {args.pairs} pairs that took turns; bfloat16 is "
        f"autocast's. Compiled kernels: {kernels.absence() or 'loaded'}."
    )
    sections = {"Time": f"{about}\n\n{markdown_table(head, rows)}"}
    console.write_report(path, "Around the MoE layers", args, [], sections)
    return path, []


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser."""
    parser = console.make_parser(DESCRIPTION, EPILOG)
    console.add_numbers(
        parser,
        {"tokens": (4096, "of a step"), "vocab": (8000, "symbols"), "heads": (4, "of attention")},
    )
    for name, default, what in (("widths", [128, 256], "of the model"), ("positions", [128, 512], "of a sequence")):
        parser.add_argument(f"--{name}", type=whole(), nargs="+", default=default, metavar="N", help=what)
    return parser


if __name__ == "__main__":
    sys.exit(console.run_benchmark(run, build_parser()))
