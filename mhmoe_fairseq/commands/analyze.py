"""``mhmoe analyze``: which experts a checkpoint uses on a split, by language or modality where there are several; or to
how many experts patches of images (``--diversity``) or polysemous words (``--polysemy``) go over a training; tables,
JSON and plots. Or a page (``--view``) on which every sub-token of a text or an image shows its experts."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..common.arguments import (
    add_device_arguments,
    existing_file,
    existing_folder,
    existing_path,
    output_folder,
    plain_name,
    real,
    whole,
)
from ..common.console import quiet, say
from ..common.errors import UserError
from ..common.files import require_files, sha256_of, write_json
from ..common.ranges import flag
from ..common.tables import markdown_table, number
from ..evaluation.records import ACTIVE_THRESHOLD, Record, read_kept, record_file, write_record

if TYPE_CHECKING:
    from torch import Tensor

_INDEXES = ("pair", "image", "captioning", "vqa", "nlvr2")  # of images: the first that the folder has
# What is measured, and flags that have a meaning for it; other flags have one for all.
_FLAGS = {
    "": ("threshold", "batch_size"),
    "--diversity": ("image", "images"),
    "--polysemy": ("batch_size",),
    "--view": ("image", "text", "words"),
}
Measured = TypeVar("Measured")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``mhmoe analyze``."""
    parser.add_argument(
        "checkpoints", type=existing_path, nargs="+", metavar="CHECKPOINT",
        help="checkpoint of a model with experts, or the folder that holds one; several of one training with "
        "--diversity, of any with --polysemy",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=existing_folder, required=True, metavar="DIR", help="prepared folder with the split"
    )
    parser.add_argument("--split", type=plain_name, default="valid", help="train, valid or test")
    parser.add_argument(
        "--out", type=output_folder, metavar="DIR",
        help="folder for routing-SPLIT.json, diversity.json or record-polysemy-SPLIT.json and plots, or view.html "
        "(checkpoint's)",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=real(at_least=0, at_most=1), metavar="SHARE",
        help=f"an expert is active from this share of the uniform load on (default: {ACTIVE_THRESHOLD})",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=whole(), metavar="N", help="blocks, or images, per batch")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--diversity", action="store_true",
        help="show to how many experts the patches of images go, a row for every checkpoint (P1's figures 8 and 10)",
    )  # fmt: skip
    kind.add_argument(
        "--polysemy", type=existing_file, metavar="WORDS",
        help="show to how many experts the tokens of polysemous words go, beside a matched control, a row for every "
        "checkpoint (P1's figure 7): words.json of mhmoe prepare words, or lists of your own, "
        '{"polysemous": ["bank", ...], "control": ["river", ...]}',
    )  # fmt: skip
    kind.add_argument(
        "--view", action="store_true",
        help="write view.html, which shows the experts of every sub-token of texts or images, by layer, in a browser",
    )  # fmt: skip
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", type=existing_file, nargs="+", metavar="FILE", help="with --view: texts")
    text.add_argument("--words", metavar="TEXT", help="with --view: a text; of pairs with --image, its caption")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--image", type=existing_file, nargs="+", metavar="FILE",
        help="with --diversity: images in place of a split's; with --view: images, or with as many texts pairs",
    )  # fmt: skip
    what.add_argument(
        "--images", "--pictures", type=whole(), metavar="N",
        help="with --diversity: how many of the split, evenly spread (default: 8)",
    )  # fmt: skip
    add_device_arguments(parser)
    parser.add_argument("--no-plots", action="store_true", help="only tables and JSON; needs no matplotlib")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; a bad flag, checkpoint, image or data folder ends it before the measurement."""
    from ..analysis.reports.plots import require_matplotlib
    from ..models.language_model import find_checkpoint

    kind = next((name for name in _FLAGS if name and getattr(args, name[2:])), "")
    for name in sorted({name for names in _FLAGS.values() for name in names} - {*_FLAGS[kind]}):
        if getattr(args, name) is not None:
            needed = " or ".join(other for other, names in _FLAGS.items() if name in names)
            raise UserError(f"{flag(name)} {f'has no meaning with {kind}' if kind else f'needs {needed}'}")
    if len(args.checkpoints) > 1 and kind in ("", "--view"):
        raise UserError("several checkpoints need --diversity or --polysemy")
    if not args.no_plots and not args.view:
        require_matplotlib()
    args.checkpoints = [find_checkpoint(path, None) for path in args.checkpoints]
    work = {"--diversity": _analyze_diversity, "--polysemy": _analyze_polysemy, "--view": _write_view}
    files = work.get(kind, _analyze_routing)(args)
    say(f"written: {', '.join(map(str, files))}")
    return 0


def _write_view(args: argparse.Namespace) -> list[Path]:
    """Route the texts and images and write the page that shows them."""
    from ..analysis.reports.view import write_view
    from ..analysis.routing.view import read_sources, route_view

    sources = read_sources(args.text or [], args.words, args.image or [])
    [checkpoint] = args.checkpoints
    file = (args.out or checkpoint.parent) / "view.html"
    with quiet():
        view = route_view(checkpoint, args.data, sources, "cpu" if args.cpu else None, args.precision)
        write_view(file, view)
    positions = sum(len(sample.tokens) for sample in view.samples)
    say(f"{positions:,} positions in {len(view.layers)} MoE layers; open the page in a browser")
    return [file]


def _analyze_routing(args: argparse.Namespace) -> list[Path]:
    """Measure a split's routing, or read what was measured; print and draw it."""
    from ..analysis.reports.plots import draw_all
    from ..analysis.reports.routing import activation_plot, describe_routing, part_plots
    from ..analysis.routing.measure import measure_routing
    from ..checkpoints.open import precision_of
    from ..data.identity import identify_data

    [checkpoint] = args.checkpoints
    out = args.out or checkpoint.parent
    file, threshold = out / f"routing-{args.split}.json", ACTIVE_THRESHOLD if args.threshold is None else args.threshold
    device = "cpu" if args.cpu else None
    precision = precision_of(checkpoint, args.precision, device)
    origin = (sha256_of(checkpoint), identify_data(args.data).digest, args.split, precision)
    record = _read_kept(file, origin)
    with quiet():
        if record is None:
            kept = _read_kept(record_file(checkpoint.parent, args.split), origin)
            record = measure_routing(
                checkpoint, args.data, args.split, args.batch_size, kept, say, device, args.precision
            )
            write_record(file, record)
        files = [file]
        if not args.no_plots:
            model = checkpoint.resolve().parent.name
            activation = activation_plot(file.stem, {model: record.expert_loads}, threshold)
            plots = draw_all(out, [activation, *part_plots(file.stem, model, record)])
            files += [path for _, path in plots]
    say(describe_routing(record, threshold))
    return files


def _read_kept(file: Path, origin: tuple[str, str, str, str]) -> Record | None:
    """A record with expert loads of this very checkpoint, data, split and precision; None if there is none."""
    record = read_kept(file, origin)
    return None if record is None or record.experts is None else record


def _analyze_diversity(args: argparse.Namespace) -> list[Path]:
    """Route images with every checkpoint, print, write and draw to how many experts their patches go."""
    from ..analysis.routing.diversity import measure_diversity, prepare_images
    from ..checkpoints.open import read_settings

    folders = {checkpoint.resolve().parent for checkpoint in args.checkpoints}
    if len(folders) > 1:
        raise UserError(f"--diversity: follows one training, and the checkpoints lie in {len(folders)} folders")
    paths = args.image or choose_images(args.data, args.split, args.images or 8)
    require_files(paths, "--data")
    tasks = [read_settings(checkpoint)["task"] for checkpoint in args.checkpoints]
    sizes = {(task.get("img_size"), task.get("patch_size")) for task in tasks}
    if len(sizes) > 1:
        raise UserError("the checkpoints are of models with different --img-size or --patch-size")
    [(img_size, _)] = sizes
    if img_size is None:
        raise UserError(f"{args.checkpoints[0]} is a language model: it has no image patches")
    images = prepare_images(paths, img_size)

    def measure(origin: dict[str, Any]) -> dict[str, Any]:
        say(f"routing {len(images)} images with {origin['path']}")
        return measure_diversity(origin, args.data, images, "cpu" if args.cpu else None, args.precision)

    with quiet():
        measured = _over_updates(args.checkpoints, measure)
        files = _write_diversity(args, measured, paths, images)
    say(describe_diversity(measured))
    return files


def _over_updates(checkpoints: Iterable[Path], measure: Callable[[dict[str, Any]], Measured]) -> list[Measured]:
    """What is measured of each checkpoint, described as ``describe_checkpoint`` does, in the order of updates."""
    from ..evaluation.evaluate import describe_checkpoint

    # A training's last checkpoint is often its best, too: the same file under two names is measured once.
    origins = {origin["sha256"]: origin for origin in map(describe_checkpoint, reversed([*checkpoints]))}
    return [measure(origin) for origin in sorted(origins.values(), key=lambda origin: origin["updates"] or 0)]


def _analyze_polysemy(args: argparse.Namespace) -> list[Path]:
    """Route a split with every checkpoint, print, write and draw to how many experts the words of both lists go."""
    from ..analysis.reports.plots import draw_all
    from ..analysis.reports.polysemy import course_of, describe_polysemy, polysemy_plots
    from ..analysis.routing.polysemy import measure_polysemy
    from ..data.word_lists import read_word_lists

    lists, device = read_word_lists(args.polysemy), "cpu" if args.cpu else None

    def measure(origin: dict[str, Any]) -> Record:
        say(f"routing {args.split} with {origin['path']}")
        return measure_polysemy(
            Path(origin["path"]), args.data, args.split, lists, args.batch_size, device, args.precision
        )

    trainings: dict[Path, list[Path]] = {}
    for checkpoint in args.checkpoints:
        trainings.setdefault(checkpoint.resolve().parent, []).append(checkpoint)
    if args.out and len(trainings) > 1:
        raise UserError(f"--out ({args.out}) is for one training; {len(trainings)} have their records in their folders")
    files, courses = [], {}
    with quiet():
        for training, checkpoints in trainings.items():
            records, out = _over_updates(checkpoints, measure), args.out or checkpoints[0].parent
            name = "/".join(training.parts[-2:]) if training.name.startswith("seed-") else training.name
            courses[str(training) if name in courses else name] = records
            files.append(record_file(out, f"polysemy-{args.split}"))
            write_record(files[-1], course_of(records))
            if not args.no_plots:
                plots = polysemy_plots(f"polysemy-{args.split}", name, records)
                files += [path for _, path in draw_all(out, plots)]
    say(describe_polysemy(courses))
    return files


def choose_images(data: Path, split: str, count: int) -> list[Path]:
    """Different images of a split, evenly spread over its index, which must be there and whole."""
    import numpy as np

    from ..data.multimodal.index import index_files, read_index

    task = next((task for task in _INDEXES if index_files(data, task, split)[0].is_file()), _INDEXES[0])
    paths = read_index(data, task, split)["image_path"]
    different = list(dict.fromkeys(paths[row] for row in range(len(paths))))
    return [data / different[at] for at in np.unique(np.linspace(0, len(different) - 1, count).astype(int))]


def _write_diversity(
    args: argparse.Namespace, measured: list[dict[str, Any]], paths: list[Path], images: "Tensor"
) -> list[Path]:
    import numpy as np

    from ..analysis.reports.plots import draw_curves, draw_overlays
    from ..analysis.routing.diversity import shown

    out = args.out or args.checkpoints[0].parent
    files = [out / "diversity.json"]
    names = [str(path.relative_to(args.data)) if path.is_relative_to(args.data) else path.name for path in paths]
    write_json(files[0], {"images": names, "checkpoints": measured})
    if args.no_plots:
        return files
    files += [out / "diversity.png", out / "diversity-course.png"]
    title = f"{args.checkpoints[0].resolve().parent.name}: different experts of each patch's sub-tokens"
    rows = {f"{each['updates']:,}\nupdates": np.mean(each["counts"], axis=1) for each in measured}
    draw_overlays(files[1], [shown(image) for image in images], rows, title)
    curves = {
        name: points
        for name, mean in (("patches of one colour", "mean_flat"), ("other patches", "mean_drawn"))
        if (points := [(each["updates"], each[mean]) for each in measured if each[mean] is not None])
    }
    draw_curves(files[2], curves, title, "experts per patch, mean of the layers")
    return files


def describe_diversity(measured: list[dict[str, Any]]) -> str:
    """A table with a row for every checkpoint."""
    columns = {
        "updates": [f"{each['updates']:,}" for each in measured],
        "experts per patch": [number(each["mean"]) for each in measured],
        "one colour": [number(each["mean_flat"]) for each in measured],
        "others": [number(each["mean_drawn"]) for each in measured],
    }
    for index, layer in enumerate(measured[0]["layers"]):
        columns[f"layer {layer + 1}"] = [number(each["mean_by_layer"][index]) for each in measured]
    table = markdown_table(list(columns), list(zip(*columns.values())))
    return (
        f"different experts of a patch's sub-tokens, at most {measured[0]['most']}, mean of the MoE layers; "
        f"one colour: patches without any drawing\n\n{table}"
    )
