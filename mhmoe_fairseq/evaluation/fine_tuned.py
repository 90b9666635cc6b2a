"""Open a model that was fine-tuned on images, and run it over a split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import utils
from fairseq.data import FairseqDataset
from torch import nn

from ..checkpoints.open import open_model, read_settings
from ..common.errors import UserError
from ..models.language_model import find_checkpoint
from ..tasks.finetuning import HeadTask


@dataclass(frozen=True)
class FineTuned:
    """A model with its task.

    Args:
        model: in evaluation mode.
        task: one of ``HeadTask``.
        file: the checkpoint.
    """

    model: nn.Module
    task: HeadTask
    file: Path

    @torch.no_grad()
    def batches(self, dataset: FairseqDataset, batch_size: int, num_workers: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of a data set, in order and every row once, on the model's device."""
        on_gpu = next(self.model.parameters()).is_cuda
        iterator = self.task.get_batch_iterator(
            dataset, max_sentences=batch_size, num_workers=num_workers, required_batch_size_multiple=1
        )
        for batch in iterator.next_epoch_itr(shuffle=False):
            yield utils.move_to_cuda(batch) if on_gpu else batch

    @torch.no_grad()
    def logits(self, batch: dict[str, Any]) -> torch.Tensor:
        """What the head says of a batch, in float32."""
        return self.model(**batch["net_input"], head=self.task.head_name)[0].float()


def load_fine_tuned(
    checkpoint: str | Path, tasks: tuple[str, ...], data: str | Path | None = None, device: str | None = None
) -> FineTuned:
    """Open a checkpoint.

    Args:
        checkpoint: a checkpoint, or the folder that holds one.
        tasks: those that it may have been trained with.
        data: the prepared folder (default: that of the training).
        device: where to put it (default: the GPU if there is one).

    Raises:
        FileNotFoundError: naming what is missing.
        ValueError: the file is no such checkpoint, or the data have another dictionary or other classes.
    """
    file = find_checkpoint(Path(checkpoint), None)
    task_name = read_settings(file)["task"]["_name"]
    if task_name not in tasks:
        raise UserError(
            f"{file}: was trained with task {task_name}, which predicts nothing: fine-tune it with --task "
            f"{tasks[0]} (or {', '.join(tasks[1:])}) and --finetune-from-model {file}"
        )
    opened = open_model(file, data, device)
    return FineTuned(opened.model, opened.task, opened.file)
