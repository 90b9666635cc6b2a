"""``mhmoe analyze``: which experts a checkpoint uses on a binarised set, as table, JSON and heat map."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UserError
from .activation import ACTIVE_THRESHOLD, Activation, mean, measured_activation, write_activation
from .console import quiet, say
from .data_identity import identify_data
from .plots import draw_activations, require_matplotlib
from .runs import read_settings
from .tables import markdown_table, number, percent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``mhmoe analyze``."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint file of an MoE language model")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with dict.txt and the split")
    parser.add_argument("--split", default="valid", help="train, valid or test")
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder for activation-SPLIT.json and .png (default: the checkpoint's)",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=float, default=ACTIVE_THRESHOLD, metavar="SHARE",
        help="an expert is active from this share of the uniform load on",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=32, help="blocks per batch")
    parser.add_argument("--no-plots", action="store_true", help="no heat map; needs no matplotlib")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write.

    Raises:
        ValueError, OSError: for a bad flag, checkpoint or data folder, before the measurement.
    """
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold ({args.threshold}) must be in [0, 1]")
    if not args.no_plots:
        require_matplotlib()
    read_settings(args.checkpoint)
    identity = identify_data(args.data)
    out = args.out or args.checkpoint.parent
    record = out / f"activation-{args.split}.json"
    with quiet():
        activation = measured_activation(
            record, args.checkpoint, args.data, args.split, identity.digest, args.batch_size
        )
        write_activation(record, activation, args.threshold)
        if not args.no_plots:
            draw_activations(record.with_suffix(".png"), {args.checkpoint.parent.name: activation}, args.threshold)
    say(describe(activation, args.threshold))
    say(f"written: {record}" + ("" if args.no_plots else f", {record.with_suffix('.png').name}"))
    return 0


def describe(activation: Activation, threshold: float) -> str:
    """A row for every MoE layer and their mean."""
    columns = (
        activation.active(threshold), activation.effective(), activation.max_over_mean(), activation.overflow(),
        activation.entropy,
    )  # fmt: skip
    names = [*(str(layer + 1) for layer in activation.layers), "mean"]
    rows = []
    for place, name in enumerate(names):
        active, effective, load_max, overflow, entropy = (
            mean(column) if name == "mean" else column[place] for column in columns
        )
        cells = [percent(active), percent(effective), number(load_max), percent(overflow), number(entropy, 3)]
        rows.append([name, *cells])
    header = ["layer", "active experts", "effective experts", "load max/mean", "overflow", "router entropy (nats)"]
    experts = len(activation.load[0])
    return "\n".join([
        f"{activation.split}: {activation.tokens:,} tokens, {activation.loss:.4f} bits per token, {experts} experts; "
        f"active: at least {threshold:.1%} of the uniform load; effective: exp(entropy of the load) / {experts}",
        "",
        markdown_table(header, rows),
    ])  # fmt: skip
