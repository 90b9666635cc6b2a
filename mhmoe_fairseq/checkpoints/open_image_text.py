"""Open a fine-tuned model of images and text, of one task, for evaluation."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils
from torch import nn

from ..common.errors import UserError
from ..models.language_model import find_checkpoint
from .open import find_device
from .read import read_checkpoint


def load_image_text_model(
    checkpoint: str | Path, task_name: str, data: str | Path | None = None, device: str | None = None
) -> tuple[nn.Module, Any, Path]:
    """The model in evaluation mode, its task, and the file they came from.

    Args:
        checkpoint: a checkpoint, or the folder that holds one.
        task_name: the task that it must have been trained with.
        data: the prepared folder (default: that of the training).
        device: where to put it (default: the GPU if there is one).

    Raises:
        FileNotFoundError: naming what is missing.
        ValueError: the file is no such checkpoint, or the data have another dictionary.
    """
    logging.getLogger("fairseq").setLevel(logging.WARNING)  # it logs its whole configuration at every load
    warnings.filterwarnings("ignore", message=".*pin_memory.*", category=UserWarning)  # there may be no GPU
    file = find_checkpoint(Path(checkpoint), None)
    trained_with = read_checkpoint(file)["cfg"]["task"]["_name"]
    if trained_with != task_name:
        raise UserError(
            f"{file}: was trained with task {trained_with}: fine-tune it with --task {task_name} --finetune-from-model"
        )
    overrides = {} if data is None else {"data": str(data)}
    try:
        [model], _, task = checkpoint_utils.load_model_ensemble_and_task([str(file)], arg_overrides=overrides)
    except RuntimeError as error:
        raise UserError(f"{file}: cannot be loaded ({str(error).splitlines()[0]})") from error
    return model.to(find_device(device)).eval(), task, file
