"""``mhmoe diversity``: how many different experts image patches go to, over the checkpoints of a training."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ..analysis.reports.diversity_plots import draw_course, draw_overlays
from ..analysis.reports.plots import require_matplotlib
from ..analysis.reports.runs import read_settings
from ..analysis.routing.diversity import PatchDiversity, measure_diversity, num_updates, prepare_images
from ..common.arguments import existing_file, existing_folder, output_folder, plain_name, whole
from ..common.console import quiet, say
from ..common.errors import UserError
from ..common.files import require_files, write_json
from ..common.tables import markdown_table, number
from ..data.images.reading import read_image
from ..data.multimodal.index import index_files, read_index

_INDEXES = ("pair", "image", "captioning", "vqa", "nlvr2")  # the first that the folder has


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``mhmoe diversity``."""
    parser.add_argument(
        "checkpoints",
        type=existing_file,
        nargs="+",
        metavar="CHECKPOINT",
        help="checkpoint files of one training, one for each number of updates",
    )
    parser.add_argument(
        "--data", type=existing_folder, required=True, metavar="DIR", help="folder of mhmoe prepare image-text"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--split", type=plain_name, default="valid", help="train, valid or test: where images are taken from"
    )
    what.add_argument("--image", type=existing_file, nargs="+", metavar="FILE", help="images in place of a split's")
    parser.add_argument(
        "--images", "--pictures", type=whole(), default=8, metavar="N", help="how many of the split, evenly spread"
    )
    parser.add_argument(
        "--out", type=output_folder, metavar="DIR",
        help="folder for diversity.json, diversity.png and diversity-course.png (default: the first checkpoint's)",
    )  # fmt: skip
    parser.add_argument("--no-plots", action="store_true", help="only JSON; needs no matplotlib")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write.

    Raises:
        ValueError, OSError: for a bad flag, checkpoint, image or data folder.
    """
    if not args.no_plots:
        require_matplotlib()
    images = args.image or choose_images(args.data, args.split, args.images)
    require_files(images, "--data")
    for image in images:
        read_image(image)  # one that cannot be read ends it here
    with quiet():
        settings = [read_settings(checkpoint) for checkpoint in args.checkpoints]
        sizes = {(stored["task"].get("img_size"), stored["task"].get("patch_size")) for stored in settings}
        if len(sizes) > 1:
            raise UserError("the checkpoints are of models with different --img-size or --patch-size")
        # A training's last checkpoint is often its best, too: one of each number of updates is enough.
        by_updates = {num_updates(checkpoint): checkpoint for checkpoint in reversed(args.checkpoints)}
        measured = []
        for _, checkpoint in sorted(by_updates.items()):
            say(f"routing {len(images)} images with {checkpoint}")
            measured.append(measure_diversity(checkpoint, args.data, images))
        files = _write(args, measured, images, settings[0]["task"]["img_size"])
    say(describe(measured))
    say(f"written: {', '.join(map(str, files))}")
    return 0


def choose_images(data: Path, split: str, count: int) -> list[Path]:
    """Different images of a split, evenly spread over its index.

    Raises:
        FileNotFoundError, ValueError: if the folder has no index of images, or a broken one.
    """
    task = next((task for task in _INDEXES if index_files(data, task, split)[0].is_file()), _INDEXES[0])
    paths = read_index(data, task, split)["image_path"]
    different = list(dict.fromkeys(paths[row] for row in range(len(paths))))
    places = np.unique(np.linspace(0, len(different) - 1, count).astype(int))
    return [data / different[place] for place in places]


def _write(args: argparse.Namespace, measured: list[PatchDiversity], images: list[Path], img_size: int) -> list[Path]:
    out = args.out or args.checkpoints[0].parent
    files = [out / "diversity.json"]
    names = [str(path.relative_to(args.data)) if path.is_relative_to(args.data) else path.name for path in images]
    write_json(files[0], {"images": names, "checkpoints": [diversity.record() for diversity in measured]})
    if not args.no_plots:
        title = f"{args.checkpoints[0].parent.name}: different experts of each patch's sub-tokens"
        files += [out / "diversity.png", out / "diversity-course.png"]
        draw_overlays(files[1], prepare_images(images, img_size), measured, title)
        draw_course(files[2], measured, title)
    return files


def describe(measured: list[PatchDiversity]) -> str:
    """A row for every checkpoint."""
    layers = measured[0].layers
    header = ["updates", "experts per patch", "one colour", "others", *(f"layer {layer + 1}" for layer in layers)]
    rows = [
        [
            f"{diversity.updates:,}",
            *(number(diversity.mean(flat=flat)) for flat in (None, True, False)),
            *(number(diversity.mean(place)) for place in range(len(layers))),
        ]
        for diversity in measured
    ]
    return "\n".join([
        f"different experts of a patch's sub-tokens, at most {measured[0].most}, mean of the MoE layers; one colour: "
        "patches without any drawing",
        "",
        markdown_table(header, rows),
    ])  # fmt: skip
