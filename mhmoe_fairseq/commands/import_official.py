"""``mhmoe checkpoint import-official``: checkpoints of the official MH-MoE repository become ours."""

from __future__ import annotations

import argparse

from ..common.arguments import existing_file, existing_folder, output_folder
from ..common.console import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``mhmoe checkpoint import-official``."""
    parser.add_argument(
        "checkpoint", metavar="CKPT", type=existing_file,
        help="a whole checkpoint, or one of NAME-shared.pt, NAME-rank-0.pt, ...: all of them are then read",
    )  # fmt: skip
    parser.add_argument(
        "--out", required=True, metavar="DIR", type=output_folder, help="folder for model.pt or moe_layers.pt"
    )
    parser.add_argument(
        "--data", metavar="DIR", type=existing_folder,
        help="folder with the model's dict.txt (and sentencepiece.model), copied beside model.pt",
    )  # fmt: skip
    parser.add_argument(
        "--routing", choices=("capacity", "dropless"), default="capacity",
        help="capacity, what the model was trained with, or dropless, where results do not depend on the batch",
    )  # fmt: skip
    parser.add_argument(
        "--layers-only", action="store_true",
        help="write only the MoE layers, for MHMoELayer in plain PyTorch: moe_layers.pt, {layer: {config, state}}",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace files of these names in --out")


def run(args: argparse.Namespace) -> int:
    """Import the checkpoint; a line for each thing done."""
    from ..checkpoints.official.importing import import_official

    lines = import_official(
        args.checkpoint, args.out, routing=args.routing, data=args.data, layers_only=args.layers_only,
        overwrite=args.overwrite,
    )  # fmt: skip
    for line in lines:
        say(line)
    return 0
