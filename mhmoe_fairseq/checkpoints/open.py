"""Open a trained model: the one way for evaluation, analysis and generation."""

import contextlib
import functools
import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, utils
from fairseq.hub_utils import GeneratorHubInterface
from torch import nn

from ..common.arguments import PRECISIONS
from ..common.console import quiet
from ..common.errors import UserError
from ..common.timing import tracked
from ..data.identity import DataIdentity, identify_data
from ..models.counts import stack_of_layers
from ..models.language_model import MHMoELanguageModel, find_checkpoint
from ..models.precision import resolve
from .files import read_trained

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A trained model in evaluation mode, with its task set up and, by section, the checkpoint's configuration."""

    model: Any
    task: Any
    settings: dict[str, Any]
    file: Path

    @property
    def task_name(self) -> str:
        """The name that the task is registered under."""
        return self.settings["task"]["_name"]

    @property
    def data(self) -> Path:
        """The first folder that the task reads."""
        return Path(utils.split_paths(self.task.args.data)[0])

    @functools.cached_property
    def identity(self) -> DataIdentity:
        """Which data that folder holds."""
        return identify_data(self.data)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def precision(self) -> str:
        """What it computes in: ``fp32``, ``bf16`` or ``fp16``."""
        return (self.model if hasattr(self.model, "beit3") else self.model.decoder).precision

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder's or encoder's layers; ``layer.moe_layer`` exists where ``layer.is_moe_layer``."""
        return stack_of_layers(self.model).layers

    @classmethod
    def of_text_model(cls, hub: GeneratorHubInterface, file: Path) -> "Opened":
        """What ``open_text_model`` opened from a file."""
        return cls(hub.models[0], hub.task, read_settings(file), file)

    def batches(self, dataset: Any, batch_size: int, num_workers: int = 0) -> Iterator[dict[str, Any]]:
        """Every example of a data set once, in its order, on the model's device.

        Raises:
            UserError: if the batch size is not positive.
        """
        if batch_size < 1:
            raise UserError(f"--batch-size ({batch_size}) must be at least 1")
        iterator = self.task.get_batch_iterator(
            dataset, max_sentences=batch_size, num_workers=num_workers, required_batch_size_multiple=1
        )
        for batch in tracked(iterator.next_epoch_itr(shuffle=False), "evaluate", "batches"):
            yield utils.apply_to_sample(lambda tensor: tensor.to(self.device), batch)


def open_model(
    checkpoint: str | Path,
    data: str | Path | None = None,
    device: str | None = None,
    overrides: Mapping[str, Any] = {},
    precision: str | None = None,
) -> Opened:
    """Open a checkpoint of any model and task of ours.

    Args:
        checkpoint: a file, or the folder that holds one.
        data: the prepared folder (default: that of the training).
        device: see ``find_device``.
        overrides: settings of the task or model to change, by name.
        precision: ``fp32``, ``bf16`` or ``auto`` (default: the training's).

    Raises:
        FileNotFoundError: naming what is missing.
        UserError: the file is no such checkpoint, its weights do not fit, or the data have another dictionary.
    """
    target, file = find_device(device), find_checkpoint(Path(checkpoint), None)
    settings = read_settings(file)
    changes = {**overrides, **_in_precision(precision, target)}
    changes |= {} if data is None else {"data": Path(data).resolve()}
    # Configurations hold no paths before omegaconf 2.1.
    changes = {name: str(value) if isinstance(value, Path) else value for name, value in changes.items()}
    with _opening(file):
        models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(file)], arg_overrides=changes)
    model = models[0].to(target).eval()
    model.make_generation_fast_()  # as fairseq's own commands do
    return Opened(model, task, settings, file)


def open_text_model(
    checkpoint: str | Path, data: str | Path | None = None, device: str | None = None, precision: str | None = None
) -> GeneratorHubInterface:
    """Open a language model together with its tokenizer.

    Arguments and errors are those of ``open_model``, but ``data`` has dict.txt and the vocabulary (default: the
    checkpoint's own folder, or its training data).
    """
    target = find_device(device)
    changes = _in_precision(precision, target)
    with _opening(checkpoint):
        folder = None if data is None else str(data)
        model = MHMoELanguageModel.from_pretrained(str(checkpoint), data_name_or_path=folder, **changes)
    return model.to(target).eval()


def _in_precision(asked: str | None, device: torch.device) -> dict[str, str]:
    """The setting to change for a precision other than the training's."""
    if asked is None:
        return {}
    if asked not in PRECISIONS:
        raise UserError(f"precision ({asked}) must be one of {', '.join(PRECISIONS)}")
    return {"mhmoe_precision": resolve(asked, device.type)}


def precision_of(file: Path, asked: str | None, device: str | None) -> str:
    """Returns the precision that a checkpoint's model would be opened in, without opening it; see ``open_model``."""
    return resolve(asked or read_settings(file)["model"].get("mhmoe_precision"), find_device(device).type)


def read_settings(file: Path) -> dict[str, Any]:
    """The configuration stored in a checkpoint, by section; its tensors are not read.

    Raises:
        UserError: if the file holds none of our models.
    """
    settings = read_trained(file)["cfg"]
    try:
        model, _, _ = settings["model"], settings["task"]["data"], settings["task"]["_name"]
        model["encoder_layers" if "encoder_layers" in model else "decoder_layers"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is not a checkpoint of a mhmoe model") from error
    return settings


def was_trained_with(model: GeneratorHubInterface, flag: str) -> bool:
    """Whether a switch of its task, such as ``mhmoe_language_token``, was on in a model's training."""
    return bool(getattr(model.task.args, flag, False))


def find_device(name: str | None) -> torch.device:
    """The device called ``name``, by default the GPU if there is one.

    A GPU that does not exist becomes the CPU, since lm-eval asks for ``cuda:0`` on every machine.

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


@contextlib.contextmanager
def _opening(checkpoint: str | Path) -> Iterator[None]:
    """Mutes fairseq, which logs its whole configuration at every load; what goes wrong is one line about the file."""
    try:
        with quiet():
            yield
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())  # names of weights that are missing stand in lines of their own
        raise UserError(f"{checkpoint}: cannot be loaded ({reason})") from error
