"""Captions by a fine-tuned model: of a split with their scores, or of single images."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.open import Opened
from ..common.errors import UserError
from ..common.timing import tracked
from ..data.datasets.labelled import CaptionDataset
from ..data.images.reading import read_image
from ..data.images.transforms import EvaluationTransform
from ..data.multimodal.index import Index, index_files, read_index
from ..metrics.captions import best_constant_caption, read_ground_truth, score_captions
from ..models.captions import CaptionSearch
from ..tasks.captioning import GROUND_TRUTH, NAME
from .expert_loads import LoadCounter
from .images import write_objects
from .records import Metric, Record

TASK = "mhmoe_captioning"
_CONSTANT = "one caption for all"


def evaluate_captions(
    opened: Opened,
    split: str,
    counter: LoadCounter,
    *,
    output: Path | None = None,
    no_java: bool = False,
    beam: int | None = None,
    length_penalty: float | None = None,
    max_len: int | None = None,
    batch_size: int = 32,
) -> Record:
    """Caption every image of a split, and score the captions times 100, as in papers' tables.

    Experts are not counted: while they write they see every hypothesis of the search.

    Args:
        split: ``valid`` or ``test``.
        output: file of ``[{"image_id", "caption"}]``, the layout that COCO's evaluation server takes.
        no_java: leave out METEOR and SPICE even if they can be had.
        beam, length_penalty, max_len: as in ``find_search``.

    Raises:
        FileNotFoundError, UserError: naming the flag, index, image or file of references that is missing or wrong.
    """
    if split not in GROUND_TRUTH:
        raise UserError(f"--split {split}: must be one of {', '.join(GROUND_TRUTH)}")
    search = find_search(opened, beam, length_penalty, max_len)
    index = read_index(opened.task.folder, "captioning", split, NAME)
    references = _references(opened.task.folder / GROUND_TRUTH[split], index)
    if references is None and output is None:
        raise UserError(f"--split {split} has no captions to score by: give --output FILE for the model's")
    training = None if references is None else _training_captions(opened)
    dataset = CaptionDataset(index, opened.task.dataset_settings(split), EvaluationTransform(opened.task.args.img_size))
    captions: dict[int, str] = {}
    for batch in opened.batches(dataset, batch_size):
        written = opened.task.write_captions(opened.model, batch["net_input"]["images"], search)
        captions.update(zip(batch["image_ids"].tolist(), written))
    if output is not None:
        write_objects(output, [{"image_id": image, "caption": caption} for image, caption in captions.items()])
    settings: dict[str, Any] = {"beam": search.beam, "length penalty": search.length_penalty}
    settings |= {"most tokens": search.max_len, "captions": len(captions)}
    if references is None:
        return Record("captions", split, {}, absent={"CIDEr": "the data have no reference captions of this split"})
    settings["references"] = sum(map(len, references.values()))
    values, absent = score_captions(captions, references, with_java=not no_java)
    constant: dict[str, float] = {}
    if training is not None:
        settings[_CONSTANT] = best_constant_caption(training)
        constant, _ = score_captions(dict.fromkeys(references, settings[_CONSTANT]), references, with_java=False)
    metrics = {
        name: Metric(value, "x100", None, len(captions), {_CONSTANT: constant[name]} if name in constant else {})
        for name, value in values.items()
    }
    return Record("captions", split, metrics, absent=absent, settings=settings)


def find_search(opened: Opened, beam: int | None, length_penalty: float | None, max_len: int | None) -> CaptionSearch:
    """How to decode; what is None is as in the model's training.

    Args:
        length_penalty: captions are compared by log-probability over their length to this power.

    Raises:
        UserError: the model writes no captions; or naming the flag, its value and the rule.
    """
    if opened.task_name != TASK:
        raise UserError(f"{opened.file}: was trained with task {opened.task_name}, and {TASK} writes captions")
    trained = opened.task.search
    return opened.task.build_search(
        trained.beam if beam is None else beam,
        trained.length_penalty if length_penalty is None else length_penalty,
        trained.max_len if max_len is None else max_len,
    )


def caption_images(opened: Opened, paths: Sequence[Path], search: CaptionSearch, batch_size: int = 32) -> Iterator[str]:
    """A caption for every file, in order.

    Raises:
        UserError: a file is missing or no image.
    """
    transform = EvaluationTransform(opened.task.args.img_size)
    for start in tracked(range(0, len(paths), batch_size), "caption", "batches"):
        batch = torch.stack([transform(read_image(path)) for path in paths[start : start + batch_size]])
        yield from opened.task.write_captions(opened.model, batch.to(opened.device), search)


def _references(file: Path, index: Index) -> dict[int, list[str]] | None:
    """The captions that a split's are scored against; None if there is no such file.

    Raises:
        UserError: naming the file, if it is not of the split's images, each of them and no other.
    """
    if not file.is_file():
        return None
    references = read_ground_truth(file)
    images = dict.fromkeys(index["image_id"].tolist())
    pairs = ((references, images, file, index.files[0]), (images, references, index.files[0], file))
    for some, others, has, lacks in pairs:
        alone = [image for image in some if image not in others]
        if alone:
            raise UserError(f"{has}: {len(alone)} of {len(some)} images are not in {lacks}, first image_id {alone[0]}")
    return references


def _training_captions(opened: Opened) -> dict[int, list[str]] | None:
    """The captions of the training images, by image id; None if the data have none."""
    task = opened.task
    if not index_files(task.folder, "captioning", "train", NAME)[0].is_file():
        return None
    index = read_index(task.folder, "captioning", "train", NAME, vocabulary_size=len(task.dictionary))
    captions: dict[int, list[str]] = {}
    for row, image in enumerate(index["image_id"].tolist()):
        captions.setdefault(image, []).append(task.decode(tuple(index["text_segment"][row].tolist())))
    return captions
