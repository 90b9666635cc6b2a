"""``mhmoe analyze``: which experts a checkpoint uses on a prepared set, and which each language or modality, as tables,
JSON and heat maps."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..analysis.reports.language_plots import draw_language_loads, draw_language_matrices
from ..analysis.reports.language_report import describe_languages
from ..analysis.reports.modality_routing_report import describe_modalities
from ..analysis.reports.plots import draw_activations, draw_group_loads, require_matplotlib
from ..analysis.reports.runs import read_settings
from ..analysis.routing.activation import ACTIVE_THRESHOLD, Activation, mean, measured_activation, write_activation
from ..analysis.routing.language_routing import (
    LanguageRouting,
    activation_file,
    is_multilingual,
    languages_file,
    measured_languages,
)
from ..analysis.routing.modality_routing import ModalityRouting, is_multimodal, measured_modalities, modalities_file
from ..common.arguments import existing_file, existing_folder, output_folder, plain_name, real, whole
from ..common.console import quiet, say
from ..common.tables import markdown_table, number, percent
from ..data.identity import identify_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``mhmoe analyze``."""
    parser.add_argument(
        "checkpoint", type=existing_file, metavar="CHECKPOINT", help="checkpoint file of a model with experts"
    )
    parser.add_argument(
        "--data", type=existing_folder, required=True, metavar="DIR", help="prepared folder with the split"
    )
    parser.add_argument("--split", type=plain_name, default="valid", help="train, valid or test")
    parser.add_argument(
        "--out", type=output_folder, metavar="DIR",
        help="folder for activation-SPLIT.json and .png, languages- or modalities-SPLIT (default: the checkpoint's)",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=real(at_least=0, at_most=1), default=ACTIVE_THRESHOLD, metavar="SHARE",
        help="an expert is active from this share of the uniform load on",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=whole(), default=32, help="blocks, or images, per batch")
    parser.add_argument("--no-plots", action="store_true", help="no heat map; needs no matplotlib")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write.

    Raises:
        ValueError, OSError: for a bad flag, checkpoint or data folder, before the measurement.
    """
    if not args.no_plots:
        require_matplotlib()
    settings = read_settings(args.checkpoint)
    identity = identify_data(args.data)
    out = args.out or args.checkpoint.parent
    record = activation_file(out, args.split)
    measured = (args.checkpoint, args.data, args.split, identity.digest, args.batch_size)
    groups: LanguageRouting | ModalityRouting | None = None
    with quiet():
        if is_multilingual(settings):
            activation, groups = measured_languages(out, *measured)
        elif is_multimodal(settings):
            activation, groups = measured_modalities(out, *measured, settings["criterion"])
        else:
            activation = measured_activation(record, *measured)
        write_activation(record, activation, args.threshold)
        files = [record]
        if isinstance(groups, LanguageRouting):
            files.append(languages_file(out, args.split))
        elif groups is not None:
            files.append(modalities_file(out, args.split))
        if not args.no_plots:
            files += _draw(args, out, activation, groups)
    is_text = not isinstance(groups, ModalityRouting)
    say(describe(activation, args.threshold, "tokens" if is_text else "positions", "token" if is_text else "target"))
    if isinstance(groups, LanguageRouting):
        say("\n" + describe_languages(groups))
    elif groups is not None:
        say("\n" + describe_modalities(groups, args.threshold))
    say(f"written: {', '.join(map(str, files))}")
    return 0


def _draw(
    args: argparse.Namespace, out: Path, activation: Activation, groups: LanguageRouting | ModalityRouting | None
) -> list[Path]:
    name = args.checkpoint.parent.name
    figure = activation_file(out, args.split).with_suffix(".png")
    draw_activations(figure, {name: activation}, args.threshold)
    if groups is None:
        return [figure]
    if isinstance(groups, ModalityRouting):
        loads = out / f"modalities-{args.split}-load.png"
        draw_group_loads(loads, groups.load_GLE, groups.layers, groups.groups, f"{name}: expert load by modality")
        return [figure, loads]
    loads, matrices = (out / f"languages-{args.split}-{kind}.png" for kind in ("load", "overlap"))
    draw_language_loads(loads, groups, name)
    draw_language_matrices(matrices, groups, name)
    return [figure, loads, matrices]


def describe(activation: Activation, threshold: float, positions: str = "tokens", target: str = "token") -> str:
    """A row for every MoE layer and their mean.

    Args:
        positions: what was routed.
        target: what the loss is of.
    """
    columns = (
        activation.active(threshold), activation.effective(), activation.max_over_mean(), activation.overflow(),
        activation.entropy,
    )  # fmt: skip
    names = [*activation.row_names, "mean"]
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
        f"{activation.split}: {activation.tokens:,} {positions}, {activation.loss:.4f} bits per {target}, "
        f"{experts} experts; "
        f"active: at least {threshold:.1%} of the uniform load; effective: exp(entropy of the load) / {experts}",
        "",
        markdown_table(header, rows),
    ])  # fmt: skip
