"""``mhmoe predict``: scores of a model that was fine-tuned on images, and its predictions as submission files."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from ..common.arguments import existing_folder, existing_path, output_file, plain_name, whole
from ..common.errors import UserError
from ..common.files import sha256_of, write_json

if TYPE_CHECKING:
    from ..evaluation.fine_tuned import FineTuned
    from ..evaluation.image_predictions import Predictions

DERIVED = "These labels are derived from the images' metadata by templates: they are neither VQAv2's nor NLVR2's."
TASKS = ("mhmoe_vqa", "mhmoe_nlvr2", "mhmoe_image_classification", "mhmoe_retrieval")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``mhmoe predict``."""
    parser.add_argument(
        "checkpoint", type=existing_path, metavar="CHECKPOINT", help="a fine-tuned checkpoint, or the folder with one"
    )
    parser.add_argument(
        "--data", type=existing_folder, metavar="DIR", help="the prepared folder; that of the training if not given"
    )
    parser.add_argument(
        "--split",
        type=plain_name,
        default="test",
        metavar="NAME",
        help="train, valid or test; for questions test-dev too",
    )
    parser.add_argument(
        "--output", type=output_file, metavar="FILE",
        help="write the predictions: of questions JSON as VQAv2's server takes it, of statements NLVR2's CSV, of "
        "classes a CSV, of retrieval the figures as JSON",
    )  # fmt: skip
    parser.add_argument(
        "--scores", type=output_file, metavar="FILE", help="write the scores and what one gets without images as JSON"
    )
    parser.add_argument("--batch-size", type=whole(), default=32, metavar="N", help="rows that the model sees together")
    parser.add_argument(
        "--num-workers", type=whole(at_least=0), default=0, metavar="N", help="processes that decode images"
    )
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even if there is a GPU")


def run(args: argparse.Namespace) -> int:
    """Prints the split's scores, if it has labels, beside what one gets without looking at images."""
    # Imported late, so that `mhmoe predict --help` is quick.
    from ..evaluation.fine_tuned import load_fine_tuned
    from ..evaluation.image_predictor import predict_split

    model = load_fine_tuned(args.checkpoint, TASKS, args.data, "cpu" if args.cpu else None)
    predictions = predict_split(model, args.split, args.batch_size, args.num_workers)
    if not predictions.figures and args.output is None:
        raise UserError(f"--split {args.split} has no labels to score by: give --output FILE for the predictions")
    is_derived = model.task.has_derived_labels
    sys.stdout.write(predictions.describe() + "\n")
    if is_derived:
        sys.stdout.write(f"{DERIVED}\n")
    if args.output is not None:
        predictions.write(args.output)
    if args.scores is not None:
        write_json(args.scores, _scores(predictions, model, is_derived))
    return 0


def _scores(predictions: Predictions, model: FineTuned, is_derived: bool) -> dict[str, Any]:
    return {
        "checkpoint_sha256": sha256_of(model.file),
        "task": model.task.head_name,
        "split": predictions.split,
        "count": predictions.count,
        "figures": predictions.figures,
        "baselines": predictions.baselines,
        "derived": is_derived,
    }
