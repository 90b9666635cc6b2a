"""What fine-tuning tasks on images and text share: learning rates by layer, transforms, a head, a split's labels."""

import abc
import logging
from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from typing import Any

from fairseq.models import BaseFairseqModel
from torch import nn

from ..common.errors import UserError
from ..common.files import read_json
from ..data.datasets import DatasetSettings, ImageTextDataset
from ..data.images.transforms import EvaluationTransform, TrainTransform
from ..data.multimodal.index import Index, read_index
from ..training.optimizer import scale_learning_rates
from .classes import require_same_classes
from .image_text_task import ImageTextTask, ImageTextTaskConfig

logger = logging.getLogger(__name__)


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


class ImageTextFineTuning(ImageTextTask):
    """Base of the fine-tuning tasks: the start from a pre-trained model, and how its layers learn."""

    def build_model(self, args: Any, from_checkpoint: bool = False) -> BaseFairseqModel:
        """Build the model with the task's heads; for training, with the layers' learning rates.

        Raises:
            ValueError: as :class:`ImageTextTask`'s, and for bad or impossible learning rates.
        """
        model = super().build_model(args, from_checkpoint)
        if not from_checkpoint:
            scale_learning_rates(model, self.args, self.args.layer_decay, self.args.head_lr_multiplier)
        return model

    def build_transform(self, split: str) -> Any:
        """What is done to a split's images: nothing random but in training."""
        if split == "train":
            return TrainTransform(self.args.img_size, self.args.randaug, flip=not self.args.no_flip)
        return EvaluationTransform(self.args.img_size)


class HeadTask(ImageTextFineTuning, abc.ABC):
    """A task with a head of its own, on the rows of an index.

    A subclass gives the attributes, ``build_head`` and ``build_dataset``.

    Attributes:
        head_name: in the model and in checkpoints.
        index_task: whose index files it reads, see ``data.multimodal.index``.
        index_name: which of the data sets of that task; None for the only or first one.
        may_be_derived: whether ``mhmoe prepare`` derives such labels where the source has none.
    """

    head_name = ""
    index_task = ""
    index_name: str | None = None
    may_be_derived = False

    @abc.abstractmethod
    def build_head(self, embed_dim: int) -> nn.Module:
        """The head of a model of that width."""

    @abc.abstractmethod
    def build_dataset(self, index: Index, settings: DatasetSettings, transform: Any) -> ImageTextDataset:
        """The data set of an index."""

    def add_heads(self, model: BaseFairseqModel, may_be_new: bool) -> None:
        """Register the head."""
        model.register_head(self.head_name, self.build_head(model.beit3.settings.encoder_embed_dim), may_be_new)

    @property
    def has_derived_labels(self) -> bool:
        """Whether the manifest says that the labels are derived from the images' metadata."""
        manifest = self.folder / "manifest.json"
        return self.may_be_derived and manifest.is_file() and bool(read_json(manifest).get("derived"))

    def read_index(self, split: str) -> Index:
        """The rows of a split, checked.

        Raises:
            FileNotFoundError, ValueError: naming the file that is missing or broken, and its line.
        """
        return read_index(self.folder, self.index_task, split, self.index_name, vocabulary_size=len(self.dictionary))

    def read_split(self, split: str) -> ImageTextDataset:
        """The samples of a split: whether they have labels is theirs to tell, with ``has_targets``.

        Raises:
            FileNotFoundError, ValueError: as ``read_index``.
        """
        settings = self.dataset_settings(split, self.args.seed)
        return self.build_dataset(self.read_index(split), settings, self.build_transform(split))

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """Check and load a split with labels.

        Raises:
            FileNotFoundError, ValueError: as ``read_index``, or because the split has no labels.
        """
        dataset = self.read_split(split)
        if not getattr(dataset, "has_targets", True):
            raise UserError(
                f"{dataset.index.files[0]} has no labels to train on or to score by: only mhmoe predict reads it"
            )
        logger.info(f"{split}: {len(dataset):,} samples")
        self.datasets[split] = dataset


class ClassTask(HeadTask):
    """A task whose head has an output for each class; checkpoints keep the classes' names.

    Attributes:
        classes: their names, by label.
        classes_source: where they come from, for messages.
    """

    classes: list[str]
    classes_source = ""

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints keep of the task: the names of the classes."""
        return {"classes": self.classes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the checkpoint's classes with the data's.

        Raises:
            UserError: if they differ or come in another order.
        """
        require_same_classes(self.classes_source, self.classes, state_dict.get("classes", self.classes))
