"""Captions of a split, or of single images, by a fine-tuned model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from fairseq import utils

from ..checkpoints.open import open_model, read_settings
from ..common.errors import UserError
from ..data.datasets import CaptionDataset
from ..data.images.reading import read_image
from ..data.images.transforms import EvaluationTransform
from ..data.multimodal.index import index_files, read_index
from ..metrics.captions import read_ground_truth
from ..models.captions import CaptionSearch
from ..models.language_model import find_checkpoint
from ..tasks.captioning import GROUND_TRUTH, NAME, CaptioningTask

TASK = "mhmoe_captioning"
SPLITS = tuple(GROUND_TRUTH)


class Captioner:
    """A model fine-tuned with task ``mhmoe_captioning``.

    Args:
        checkpoint: its file, or the folder that holds it.
        data: prepared data (default: those of the training).
        device: where the model works (default: the GPU if there is one).

    Raises:
        FileNotFoundError: naming what is missing.
        ValueError: the file is no such checkpoint, or the data have another dictionary.
    """

    task: CaptioningTask

    def __init__(self, checkpoint: str | Path, data: str | Path | None = None, device: str | None = None) -> None:
        trained_with = read_settings(find_checkpoint(Path(checkpoint), None))["task"]["_name"]
        if trained_with != TASK:
            raise UserError(f"{checkpoint}: was trained with task {trained_with}, not with {TASK}")
        opened = open_model(checkpoint, data, device)
        self.model, self.task, self.file = opened.model, opened.task, opened.file
        self.transform = EvaluationTransform(self.task.args.img_size)

    def references(self, split: str) -> dict[int, list[str]] | None:
        """The captions that a split's are scored against; None if the data have none.

        Raises:
            UserError: naming the file, if it is not of the split's images, each of them and no other.
        """
        file = self.task.folder / GROUND_TRUTH[split]
        if not file.is_file():
            return None
        references = read_ground_truth(file)
        index = read_index(self.task.folder, "captioning", split, NAME)
        images = dict.fromkeys(index["image_id"].tolist())
        pairs = ((references, images, file, index.files[0]), (images, references, index.files[0], file))
        for some, others, has, lacks in pairs:
            alone = [image for image in some if image not in others]
            if alone:
                raise UserError(
                    f"{has}: {len(alone)} of {len(some)} images are not in {lacks}, first image_id {alone[0]}"
                )
        return references

    def training_captions(self) -> dict[int, list[str]] | None:
        """The captions of the training images, by image id; None if the data have none."""
        if not index_files(self.task.folder, "captioning", "train", NAME)[0].is_file():
            return None
        index = read_index(self.task.folder, "captioning", "train", NAME, vocabulary_size=len(self.task.dictionary))
        captions: dict[int, list[str]] = {}
        for row, image in enumerate(index["image_id"].tolist()):
            captions.setdefault(image, []).append(self.task.decode(tuple(index["text_segment"][row].tolist())))
        return captions

    def caption_split(self, split: str, search: CaptionSearch, batch_size: int = 32) -> dict[int, str]:
        """A caption for every image of a split, by image id, in the index's order.

        Raises:
            FileNotFoundError, ValueError: naming the index or image that is missing or broken.
        """
        index = read_index(self.task.folder, "captioning", split, NAME)
        settings = self.task.dataset_settings(split)
        dataset = CaptionDataset(index, settings, self.transform)
        batches = self.task.get_batch_iterator(
            dataset, max_sentences=batch_size, required_batch_size_multiple=1
        ).next_epoch_itr(shuffle=False)
        captions: dict[int, str] = {}
        for batch in batches:
            batch = utils.move_to_cuda(batch) if self._is_on_gpu else batch
            written = self.task.write_captions(self.model, batch["net_input"]["images"], search)
            captions.update(zip(batch["image_ids"].tolist(), written))
        return captions

    def caption_images(self, paths: Sequence[Path], search: CaptionSearch, batch_size: int = 32) -> Iterator[str]:
        """A caption for every file.

        Raises:
            ValueError: naming the file that is missing or no image, and the rule.
        """
        device = next(self.model.parameters()).device
        for start in range(0, len(paths), batch_size):
            batch = [self.transform(read_image(path)) for path in paths[start : start + batch_size]]
            yield from self.task.write_captions(self.model, torch.stack(batch).to(device), search)

    @property
    def _is_on_gpu(self) -> bool:
        return next(self.model.parameters()).device.type == "cuda"
