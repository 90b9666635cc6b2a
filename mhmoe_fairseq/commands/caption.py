"""``mhmoe caption``: captions of a split, with their scores, or of single images."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.arguments import existing_file, existing_folder, existing_path, output_file, real, whole
from ..common.errors import UserError
from ..common.files import atomic_open, sha256_of, write_json

if TYPE_CHECKING:
    from ..evaluation.caption_decoding import Captioner
    from ..metrics.captions.report import CaptionScores
    from ..models.captions import CaptionSearch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``mhmoe caption``."""
    parser.add_argument(
        "checkpoint", type=existing_path, metavar="CHECKPOINT", help="a checkpoint, or the folder that holds one"
    )
    parser.add_argument(
        "--data",
        type=existing_folder,
        metavar="DIR",
        help="prepared images and captions; those of the training if not given",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--split", choices=("valid", "test"), default="test", help="whose images are captioned")
    what.add_argument(
        "--image", nargs="+", type=existing_file, metavar="FILE", help="images to caption in place of a split"
    )
    parser.add_argument(
        "--output", type=output_file, metavar="FILE",
        help='write [{"image_id", "caption"}], the layout that COCO\'s evaluation server takes; of --image image_path',
    )  # fmt: skip
    parser.add_argument("--scores", type=output_file, metavar="FILE", help="write the scores as JSON")
    parser.add_argument("--no-java", action="store_true", help="leave out METEOR and SPICE even if they can be had")
    parser.add_argument(
        "--beam", type=whole(), metavar="B", help="hypotheses that are kept, 1 is greedy; the training's"
    )
    parser.add_argument(
        "--length-penalty", type=real(), metavar="P",
        help="captions are compared by log-probability over their length to the power P; the training's",
    )  # fmt: skip
    parser.add_argument("--max-len", type=whole(), metavar="N", help="most tokens of a caption; the training's")
    parser.add_argument(
        "--batch-size", type=whole(), default=32, metavar="N", help="images that are decoded together"
    )
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even if there is a GPU")


def run(args: argparse.Namespace) -> int:
    """Prints the scores of a split, or the captions of images."""
    if args.image is not None and args.scores is not None:
        raise UserError("--scores: single images have no reference captions to be scored against")
    # Imported late, so that `mhmoe caption --help` is quick.
    from ..evaluation.caption_decoding import Captioner

    captioner = Captioner(args.checkpoint, args.data, "cpu" if args.cpu else None)
    trained = captioner.task.search
    search = captioner.task.build_search(
        trained.beam if args.beam is None else args.beam,
        trained.length_penalty if args.length_penalty is None else args.length_penalty,
        trained.max_len if args.max_len is None else args.max_len,
    )
    if args.image is not None:
        return _caption_images(captioner, args, search)
    return _caption_split(captioner, args, search)


def _caption_images(captioner: Captioner, args: argparse.Namespace, search: CaptionSearch) -> int:
    records = []
    for path, caption in zip(args.image, captioner.caption_images(args.image, search, args.batch_size)):
        _say(f"{path}: {caption}")
        records.append({"image_path": str(path), "caption": caption})
    _write_captions(args.output, records)
    return 0


def _caption_split(captioner: Captioner, args: argparse.Namespace, search: CaptionSearch) -> int:
    from ..metrics.captions.report import score_captions

    references = captioner.references(args.split)
    captions = captioner.caption_split(args.split, search, args.batch_size)
    _write_captions(args.output, [{"image_id": image, "caption": caption} for image, caption in captions.items()])
    _say(
        f"{args.split}: {len(captions)} captions, beam {search.beam}, length penalty {search.length_penalty}, "
        f"at most {search.max_len} tokens"
    )
    if references is None:
        _say("scores: absent, the data have no reference captions of this split")
        return 0
    scores = score_captions(captions, references, with_java=not args.no_java)
    _say(describe(scores))
    constant = _constant_scores(captioner, references)
    if constant is not None:
        figures = ", ".join(f"{name} {value:.2f}" for name, value in constant["figures"].items())
        _say(f"without looking, the same caption for all, {constant['caption']!r}: {figures}")
    if args.scores is not None:
        how = {"checkpoint_sha256": sha256_of(captioner.file), "split": args.split, "search": asdict(search)}
        write_json(args.scores, {**how, **asdict(scores), "figures": scores.figures(), "constant": constant})
    return 0


def _constant_scores(captioner: Captioner, references: dict[int, list[str]]) -> dict[str, Any] | None:
    """The training caption that fits most images, and its scores; None if there are no training captions."""
    from ..metrics.caption_baseline import best_constant_caption
    from ..metrics.captions.report import score_captions

    training = captioner.training_captions()
    if training is None:
        return None
    caption = best_constant_caption(training)
    scores = score_captions(dict.fromkeys(references, caption), references, with_java=False)
    known = {name: value for name, value in scores.figures().items() if value is not None}
    return {"caption": caption, "figures": known}


def describe(scores: CaptionScores) -> str:
    """Two lines: what was scored, and the figures; then why others are absent."""
    figures = ", ".join(f"{name} {value:.2f}" for name, value in scores.figures().items() if value is not None)
    lines = [f"scored on {scores.images} images with {scores.references} reference captions, times 100:", figures]
    return "\n".join([*lines, *(f"{name.upper()}: absent, {reason}" for name, reason in scores.absent.items())])


def _write_captions(path: Path | None, records: list[dict[str, Any]]) -> None:
    if path is None:
        return
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    with atomic_open(path) as stream:
        stream.write(f"[\n{lines}\n]\n".encode())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
