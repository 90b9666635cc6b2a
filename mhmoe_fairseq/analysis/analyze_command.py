"""``mhmoe analyze``: which experts a checkpoint uses on a binarised set, and which each language, as tables, JSON and
heat maps."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UserError
from .activation import ACTIVE_THRESHOLD, Activation, mean, measured_activation, write_activation
from .console import quiet, say
from .data_identity import identify_data
from .language_plots import draw_language_loads, draw_language_matrices
from .language_report import describe_languages
from .language_routing import LanguageRouting, activation_file, is_multilingual, languages_file, measured_languages
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
        help="folder for activation-SPLIT.json and .png, and languages-SPLIT (default: the checkpoint's)",
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
    settings = read_settings(args.checkpoint)
    identity = identify_data(args.data)
    out = args.out or args.checkpoint.parent
    record = activation_file(out, args.split)
    measured = (args.checkpoint, args.data, args.split, identity.digest, args.batch_size)
    languages = None
    with quiet():
        if is_multilingual(settings):
            activation, languages = measured_languages(out, *measured)
        else:
            activation = measured_activation(record, *measured)
        write_activation(record, activation, args.threshold)
        files = [record] if languages is None else [record, languages_file(out, args.split)]
        if not args.no_plots:
            files += _draw(args, out, activation, languages)
    say(describe(activation, args.threshold))
    if languages is not None:
        say("\n" + describe_languages(languages))
    say(f"written: {', '.join(map(str, files))}")
    return 0


def _draw(
    args: argparse.Namespace, out: Path, activation: Activation, languages: LanguageRouting | None
) -> list[Path]:
    name = args.checkpoint.parent.name
    figure = activation_file(out, args.split).with_suffix(".png")
    draw_activations(figure, {name: activation}, args.threshold)
    if languages is None:
        return [figure]
    loads, matrices = (out / f"languages-{args.split}-{kind}.png" for kind in ("load", "overlap"))
    draw_language_loads(loads, languages, name)
    draw_language_matrices(matrices, languages, name)
    return [figure, loads, matrices]


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
