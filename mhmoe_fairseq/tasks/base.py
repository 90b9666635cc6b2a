"""What all tasks on images and text share: flags, the dictionary, the shapes; and the checkpoint to start from."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models import BaseFairseqModel
from fairseq.tasks import LegacyFairseqTask
from omegaconf import MISSING
from torch import Tensor, nn

from ..checkpoints.files import read_trained
from ..common.errors import UserError
from ..data.binarised import check_folder
from ..data.datasets.base import DatasetSettings
from ..data.identity import MANIFEST, read_manifest
from ..data.multimodal.masking import mask_index
from ..parallel import sharded_experts
from ..training import ParallelTask, TrainingFlags

KIND = "image-text"  # in manifest.json
RESUMED = "checkpoint_last.pt"  # fairseq's default: a run of the same task, in --save-dir
_FINGERPRINT = "vocabulary_fingerprint"
_HEADS = "classification_heads."


@dataclass
class ImageTextTaskConfig(TrainingFlags):
    """Flags that all tasks on images and text have; the model reads the sizes from here."""

    data: str = field(
        default=MISSING,
        metadata={"help": "folder of mhmoe prepare image-text, or BEiT-3's index files with dict.txt beside them"},
    )
    img_size: int = field(
        default=224, metadata={"help": "side of the square images that the model sees, a multiple of --patch-size"}
    )
    patch_size: int = field(default=16, metadata={"help": "side of a patch in pixels"})
    max_text_length: int = field(
        default=64, metadata={"help": "most tokens of a text, <s> and </s> counted; longer ones are cut"}
    )
    skip_bad_pictures: bool = field(  # the name that checkpoints store
        default=False,
        metadata={"help": "in training, let another sample take the place of one whose image cannot be read"},
    )


class ImageTextTask(ParallelTask, LegacyFairseqTask):
    """Base of the tasks on images and text.

    A task of one's own gives ``num_visual_tokens`` if it predicts them, and ``head_name`` if it has a head of its own,
    which ``build_head(embed_dim)`` makes for a model of that width.

    Attributes:
        head_name: in the model and in checkpoints; empty without a head.
        folder: the data.
        dictionary: of the text, with ``<mask>``, whose id is ``mask_index``.
        grid: rows and columns of patches.

    Raises:
        FileNotFoundError: if the data folder or its dictionary is missing.
        UserError: naming the flag or file, its value and the rule; or if the folder was prepared for another task.
    """

    head_name = ""
    build_head: Callable[[int], nn.Module]

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.folder = Path(args.data)
        check_folder(self.folder)
        kind = read_manifest(self.folder).get("kind", KIND)
        if kind != KIND:
            rule = f"images and text are made by mhmoe prepare {KIND}"
            raise UserError(f"{self.folder / MANIFEST}: this folder holds {kind} data: {rule}")
        self.dictionary = Dictionary.load(str(self.folder / "dict.txt"))
        self.mask_index = mask_index(self.dictionary)
        self.grid = self.dataset_settings("train").grid

    source_dictionary = target_dictionary = property(lambda self: self.dictionary)  # fairseq's names

    @property
    def num_visual_tokens(self) -> int:
        """Codes of patches that the model predicts."""
        return 0

    def dataset_settings(self, split: str) -> DatasetSettings:
        """Return what the data sets of a split are read by: ``train`` has other orders, crops and masks in every epoch.

        Masks of held-out splits are the same whatever ``--seed``, since runs with several seeds are compared.
        """
        return DatasetSettings(
            folder=self.folder,
            dictionary=self.dictionary,
            img_size=self.args.img_size,
            patch_size=self.args.patch_size,
            max_text_length=self.args.max_text_length,
            seed=self.args.seed if split == "train" else 0,
            training=split == "train",
            skip_bad_images=self.args.skip_bad_pictures,
        )

    def build_model(self, args: Any, from_checkpoint: bool = False) -> BaseFairseqModel:
        """Build the model with the task's heads; for training, check the checkpoint that it will start from.

        A ``UserError`` names a model that is none of ours, a bad flag, or a checkpoint that does not fit.
        """
        model = super().build_model(args, from_checkpoint)
        if not hasattr(model, "register_head"):
            raise UserError("--arch: this task needs a model of images and text of ours, such as mhmoe_beit3_tiny")
        if self.head_name:
            head = self.build_head(model.beit3.settings.encoder_embed_dim)
            model.register_head(self.head_name, head, may_be_new=not from_checkpoint)
        if not from_checkpoint:
            model.heads.leaves_out_others = True
            check_starting_checkpoint(model, self.args)
            check_resumed_sizes(model, self.args)
        return model


def check_starting_checkpoint(model: BaseFairseqModel, args: Any) -> None:
    """Compare the files of ``--finetune-from-model`` and ``--restore-file``, if there are any, with the model.

    They must have its dictionary and all of its parameters but new heads, and no other; a ``UserError`` names the first
    thing that differs. The model has its heads; if it loads checkpoints of other sizes, it says with
    ``fitted_state(state)`` what it would load.
    """
    for name in (args.finetune_from_model, args.restore_file):
        if name and name != RESUMED and Path(name).is_file():
            for difference in _differences(model, read_trained(Path(name))["model"], args.data):
                raise UserError(f"{name}: {difference}")


def check_resumed_sizes(model: BaseFairseqModel, args: Any) -> None:
    """Refuse, with a ``UserError``, to resume a run with its optimizer and position tables of other sizes.

    fairseq would load the resized tables beside moments of the old shape, and the first update would fail.
    """
    file = resumed_checkpoint(args)
    saved = {} if file is None or args.reset_optimizer else read_trained(file)
    if not saved.get("last_optimizer_state"):
        return
    for flag, unit, before, now in model.resized_tables(saved["model"]):
        new_run = f", or begin a new run with --finetune-from-model {file} and another --save-dir"
        if flag == "--max-text-length" and now > before:
            new_run = ""  # which would be refused, too
        raise UserError(
            f"{flag} ({getattr(args, flag[2:].replace('-', '_'))}): the model has positions for {now} {unit}, {file} "
            f"has them for {before}, and its optimizer's state cannot be resumed with another number: give {flag} as "
            f"in its training{new_run}"
        )


def resumed_checkpoint(args: Any) -> Path | None:
    """Return the file of ``--restore-file``, in ``--save-dir`` unless it is given as a path; None if there is none."""
    path = Path(args.save_dir, RESUMED) if args.restore_file == RESUMED else Path(args.restore_file)
    return path if path.is_file() else None


def _differences(model: BaseFairseqModel, state: Mapping[str, Tensor], data: str) -> Iterator[str]:
    """What is to be mended before a checkpoint's ``state`` can be loaded, the most telling first."""
    buffers = dict(model.named_buffers())
    for name, fingerprint in buffers.items():
        owner, found, _ = name.rpartition(_FINGERPRINT)
        if found and name in state and not torch.equal(state[name], fingerprint.cpu()):
            embedding = state[owner + model.get_submodule(owner.rstrip(".")).embedding_name]
            yield (
                f"its dictionary ({embedding.size(0):,} words, other symbols or another order) is not that of {data}: "
                "prepare the data with --data naming the folder that the pre-trained model was trained on"
            )
    try:
        state = model.fitted_state(state) if hasattr(model, "fitted_state") else state
    except ValueError as error:
        yield str(error)
    # A rank holds a part of the experts, checkpoints hold all: their shapes differ in the first dimension.
    sharded = {id(shard.parameter) for shard in sharded_experts(model)}
    expected = dict(model.named_parameters(remove_duplicate=False))  # tied weights are saved under both names
    remedy = "give --arch and the model's flags as in its training"
    for name, parameter in expected.items():
        first = 1 if id(parameter) in sharded else 0
        if name not in state:
            if not name.startswith(_HEADS):
                yield f"it has no parameter {name}: {remedy}"
        elif state[name].shape[first:] != parameter.shape[first:]:
            shapes = f"of shape {tuple(state[name].shape)}, this model's of {tuple(parameter.shape)}"
            yield f"its {name} is {shapes}: {remedy}"
    for name in sorted(state.keys() - expected.keys() - buffers.keys()):
        yield f"this model has no parameter {name}: {remedy}"
