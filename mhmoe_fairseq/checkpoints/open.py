"""Open a trained language model for evaluation."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import torch
from fairseq.hub_utils import GeneratorHubInterface

from ..common.errors import UserError
from ..models.language_model import MHMoELanguageModel

logger = logging.getLogger(__name__)


def load_language_model(
    checkpoint: str | Path, data: str | Path | None = None, device: str | None = None
) -> GeneratorHubInterface:
    """A trained model of any architecture and task of ours, with its tokenizer, in evaluation mode.

    Args:
        checkpoint: a checkpoint, or the folder that holds one.
        data: folder with dict.txt and the tokenizer's model (default: the checkpoint's own, or its training data).
        device: where to put it (default: the GPU if there is one). A GPU that does not exist becomes the CPU, since
            lm-eval asks for ``cuda:0`` on every machine.

    Raises:
        FileNotFoundError: naming what is missing.
        ValueError: the file is no checkpoint, the dictionary is not the model's, or there is no such device.
    """
    logging.getLogger("fairseq").setLevel(logging.WARNING)  # it logs its whole configuration at every load
    place = find_device(device)
    try:
        folder = None if data is None else str(data)
        model = MHMoELanguageModel.from_pretrained(str(checkpoint), data_name_or_path=folder)
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{checkpoint}: no readable checkpoint ({str(error).splitlines()[0]})") from error
    return model.to(place).eval()


def was_trained_with(model: GeneratorHubInterface, flag: str) -> bool:
    """Whether a switch of its task, such as ``mhmoe_language_token``, was on in a model's training."""
    return bool(getattr(model.task.args, flag, False))


def find_device(name: str | None) -> torch.device:
    """The device called ``name``.

    Raises:
        UserError: it is no device's name.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name}: no such device (cpu, cuda, cuda:1, ...)") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        logger.info(f"{name}: there is no GPU, the model stays on the CPU")
        return torch.device("cpu")
    return device
