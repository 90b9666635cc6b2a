"""What fine-tuning tasks share: learning rates by layer, transforms, a head, a split's labels, names of classes."""

import logging
from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from typing import Any

from fairseq.models import BaseFairseqModel
from fairseq.tasks import FairseqTask
from torch import nn

from ..common.errors import UserError
from ..data.datasets.base import DatasetSettings, ImageTextDataset
from ..data.identity import read_manifest
from ..data.images.transforms import EvaluationTransform, TrainTransform
from ..data.multimodal.index import Index, read_index
from ..training.optimizer import scale_learning_rates
from .base import ImageTextTask, ImageTextTaskConfig

logger = logging.getLogger(__name__)

_MOST_LISTED = 8


@dataclass
class ImageTextFineTuningConfig(ImageTextTaskConfig):
    """Flags of all fine-tuning tasks on images and text."""

    layer_decay: float = field(
        default=1.0,
        metadata={"help": "each layer below the top learns at this factor of the next one's rate; 1 for one rate"},
    )
    head_lr_multiplier: float = field(
        default=1.0, metadata={"help": "factor of the learning rate in the task's new head"}
    )
    randaug: bool = field(default=False, metadata={"help": "RandAugment on the training images"})
    no_flip: bool = field(
        default=False, metadata={"help": "never mirror the training images, where texts speak of left and right"}
    )


@dataclass
class ClassifierConfig(ImageTextFineTuningConfig):
    """Flags of the tasks whose head chooses among answers or classes."""

    center_features: bool = field(
        default=False,
        metadata={
            "help": "the head's norm first takes away the features' running mean, so that a new head learns from what "
            "tells the images apart: for short trainings; not in BEiT-3"
        },
    )


class NamesClasses(FairseqTask):
    """Stands in front of a task whose checkpoints keep the names of its classes.

    Attributes:
        classes: the names by label; None for a task without names.
        classes_source: the file that they come from, for messages.
    """

    classes: list[str] | None = None
    classes_source = ""

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints keep of the task: the names of the classes."""
        return {} if self.classes is None else {"classes": self.classes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the checkpoint's classes with the data's: a ``UserError`` says how they differ."""
        saved = state_dict.get("classes", self.classes)
        if saved != self.classes:
            names, others = _listed(self.classes or []), _listed(saved)
            raise UserError(
                f"{self.classes_source} has the classes {names}; the checkpoint's are {others}, in this order"
            )


def _listed(names: list[str]) -> str:
    more = f", ... ({len(names):,})" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more


class ImageTextFineTuning(ImageTextTask):
    """Base of the fine-tuning tasks: the start from a pre-trained model, and how its layers learn."""

    def build_model(self, args: Any, from_checkpoint: bool = False) -> BaseFairseqModel:
        """Build the model with the task's heads; for training, with the layers' learning rates."""
        model = super().build_model(args, from_checkpoint)
        if not from_checkpoint:
            scale_learning_rates(model, self.args, self.args.layer_decay, self.args.head_lr_multiplier)
        return model

    def build_transform(self, split: str) -> Any:
        """What is done to a split's images: nothing random but in training."""
        if split == "train":
            return TrainTransform(self.args.img_size, self.args.randaug, flip=not self.args.no_flip)
        return EvaluationTransform(self.args.img_size)


class HeadTask(NamesClasses, ImageTextFineTuning):
    """Base of the tasks with a head of their own, on the rows of an index.

    Attributes:
        head_name: in the model and in checkpoints.
        head_type: the head's class; made of the model's width, the number of ``classes`` if there are any, and
            ``center``.
        index_task: whose index files it reads, see ``data.multimodal.index``.
        index_name: which of the data sets of that task; None for the only or first one.
        dataset_type: the data set's class; made of an index, settings, a transform and, again, the number of classes.
        may_be_derived: whether ``mhmoe prepare`` derives such labels where the source has none.
    """

    head_name = ""
    head_type: type[nn.Module]
    index_task = ""
    index_name: str | None = None
    dataset_type: type[ImageTextDataset]
    may_be_derived = False

    @property
    def _sizes(self) -> tuple[int, ...]:
        return () if self.classes is None else (len(self.classes),)

    def build_head(self, embed_dim: int) -> nn.Module:
        """Return a new head for a model of that width."""
        return self.head_type(embed_dim, *self._sizes, center=self.args.center_features)

    def add_heads(self, model: BaseFairseqModel, may_be_new: bool) -> None:
        """Register the head."""
        model.register_head(self.head_name, self.build_head(model.beit3.settings.encoder_embed_dim), may_be_new)

    def build_dataset(self, index: Index, settings: DatasetSettings, transform: Any) -> ImageTextDataset:
        """Return the data set of an index."""
        return self.dataset_type(index, settings, transform, *self._sizes)

    @property
    def has_derived_labels(self) -> bool:
        """Whether the manifest says that the labels are derived from the images' metadata."""
        return self.may_be_derived and bool(read_manifest(self.folder).get("derived"))

    def read_index(self, split: str) -> Index:
        """Return the rows of a split; an error names the file that is missing or broken, and its line."""
        return read_index(self.folder, self.index_task, split, self.index_name, vocabulary_size=len(self.dictionary))

    def read_split(self, split: str) -> ImageTextDataset:
        """Return the samples of a split: whether they have labels is theirs to tell, with ``has_targets``."""
        return self.build_dataset(self.read_index(split), self.dataset_settings(split), self.build_transform(split))

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """Check and load a split; a ``UserError`` says that it has no labels."""
        dataset = self.read_split(split)
        if not getattr(dataset, "has_targets", True):
            raise UserError(
                f"{dataset.index.files[0]} has no labels to train on or to score by: only mhmoe evaluate reads it"
            )
        logger.info(f"{split}: {len(dataset):,} samples")
        self.datasets[split] = dataset
