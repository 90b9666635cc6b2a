"""What all tasks on images and text share: flags, the dictionary, the shapes, the checkpoint to start from."""

from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from pathlib import Path
from typing import Any

from fairseq.data import Dictionary
from fairseq.models import BaseFairseqModel
from fairseq.tasks import LegacyFairseqTask
from omegaconf import MISSING

from ..common.errors import UserError
from ..data.binarised import check_folder
from ..data.datasets.base import DatasetSettings
from ..data.identity import MANIFEST, read_manifest
from ..data.multimodal.masking import mask_index
from ..training import ParallelTask, TrainingFlags
from .starting_checkpoint import check_resumed_sizes, check_starting_checkpoint

KIND = "image-text"  # in manifest.json


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

    A task of one's own sets ``num_visual_tokens`` if it predicts them, and adds its heads in ``add_heads``.

    Args:
        args: an ``ImageTextTaskConfig`` or a subclass's.

    Attributes:
        folder: the data.
        dictionary: of the text, with ``<mask>``, whose id is ``mask_index``.
        grid: rows and columns of patches.

    Raises:
        FileNotFoundError: if the data folder or its dictionary is missing.
        UserError: naming the flag or file, its value and the rule; or if the folder was prepared for another task.
    """

    num_visual_tokens = 0

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
        self.add_heads(model, may_be_new=not from_checkpoint)
        if not from_checkpoint:
            model.heads.leaves_out_others = True
            check_starting_checkpoint(model, self.args)
            check_resumed_sizes(model, self.args)
        return model

    def add_heads(self, model: BaseFairseqModel, may_be_new: bool) -> None:
        """Register the task's heads with ``model.register_head``; none by default.

        Args:
            may_be_new: whether a checkpoint may lack them, as one of pre-training does.
        """
