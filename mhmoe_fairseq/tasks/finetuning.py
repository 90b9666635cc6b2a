"""Fine-tuning on images and text: what its tasks share, and those with a head of their own on the rows of an index."""

import logging
from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from pathlib import Path
from typing import Any, Optional

from fairseq.logging import metrics
from fairseq.models import BaseFairseqModel
from fairseq.tasks import FairseqTask, register_task
from torch import Tensor, nn

from ..common.errors import UserError
from ..common.files import read_json
from ..data.datasets.labelled import ImagePairs, IndexedDataset, LabelledImages, RetrievalDataset, VQADataset
from ..data.identity import read_manifest
from ..data.images.transforms import IMAGENET, EvaluationTransform, TrainTransform
from ..data.multimodal.index import ANSWERS_FILE, NAMES, Index, read_answers, read_index
from ..metrics.recall import RANKS, VectorMeter
from ..models.heads import ImageClassificationHead, NLVR2Head, RetrievalHead, VQAHead
from ..training.optimizer import scale_layers
from .base import ImageTextTask, ImageTextTaskConfig

logger = logging.getLogger(__name__)

_MOST_LISTED = 8
_CLASSES_FILE = "imagenet.classes.json"


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


@dataclass
class ImageClassificationTaskConfig(ClassifierConfig):
    """Flags of image classification."""

    num_classes: Optional[int] = field(
        default=None, metadata={"help": f"number of classes (default: as many as {_CLASSES_FILE} in the data names)"}
    )
    imagenet_views: bool = field(
        default=False,
        metadata={
            "help": "as BEiT-3 on ImageNet: training crops of 8 % and more, evaluation on the central square of 7/8 of "
            "the shorter side, ImageNet's mean and deviation (default: as in the other tasks)"
        },
    )


@dataclass
class RetrievalTaskConfig(ImageTextFineTuningConfig):
    """Flags of retrieval."""

    retrieval_set: Optional[str] = field(
        default=None,
        metadata={"help": "coco_retrieval or flickr30k (default: the first of them that the data folder has)"},
    )


class NamesClasses(FairseqTask):
    """Stands in front of a task whose checkpoints keep the names of its classes.

    Attributes:
        classes: the names by label; None for a task without names.
        classes_source: the file that they come from, for messages.
    """

    classes: list[str] | None = None
    classes_source: Path

    def state_dict(self) -> dict[str, Any]:
        """Return what checkpoints keep of the task: the names of the classes."""
        return {} if self.classes is None else {"classes": self.classes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the checkpoint's classes with the data's: a ``UserError`` says how they differ."""
        own = self.classes or []
        saved = state_dict.get("classes", own)
        if saved != own:
            names, others = _listed(own), _listed(saved)
            raise UserError(
                f"{self.classes_source} has the classes {names}; the checkpoint's are {others}, in this order"
            )


def _listed(names: list[str]) -> str:
    more = f", ... ({len(names):,})" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more


class ImageTextFineTuning(ImageTextTask):
    """Base of the fine-tuning tasks: the start from a pre-trained model, and how its layers learn.

    Attributes:
        views: more arguments of the transform of training images, and of others'.
    """

    views: tuple[dict[str, Any], dict[str, Any]] = {}, {}

    def build_model(self, args: Any, from_checkpoint: bool = False) -> BaseFairseqModel:
        """Build the model with the task's heads; for training, with the layers' learning rates."""
        model = super().build_model(args, from_checkpoint)
        if not from_checkpoint:
            scale_layers(model, self.args, self.args.layer_decay, self.args.head_lr_multiplier)
        return model

    def build_transform(self, split: str) -> Any:
        """Return what is done to a split's images: nothing random but in training."""
        training, evaluation = self.views
        if split == "train":
            return TrainTransform(self.args.img_size, self.args.randaug, flip=not self.args.no_flip, **training)
        return EvaluationTransform(self.args.img_size, **evaluation)


class HeadTask(NamesClasses, ImageTextFineTuning):
    """Base of the tasks with a head of their own, on the rows of an index.

    Attributes:
        head_type: the head's class; made of the model's width, the number of ``classes`` if there are any, and
            ``center`` if the task has that flag.
        index_task: whose index files it reads, see ``data.multimodal.index``.
        index_name: which of the data sets of that task; None for the only or first one.
        dataset_type: the data set's class; made of an index, settings, a transform and, again, the number of classes.
        may_be_derived: whether ``mhmoe prepare`` derives such labels where the source has none.
    """

    head_type: type[nn.Module]
    index_task = ""
    index_name: str | None = None
    dataset_type: type[IndexedDataset]
    may_be_derived = False

    @property
    def _sizes(self) -> tuple[int, ...]:
        return () if self.classes is None else (len(self.classes),)

    def build_head(self, embed_dim: int) -> nn.Module:
        """Return a new head for a model of that width."""
        options = {"center": self.args.center_features} if hasattr(self.args, "center_features") else {}
        return self.head_type(embed_dim, *self._sizes, **options)

    @property
    def has_derived_labels(self) -> bool:
        """Whether the manifest says that the labels are derived from the images' metadata."""
        return self.may_be_derived and bool(read_manifest(self.folder).get("derived"))

    def read_index(self, split: str) -> Index:
        """Return the rows of a split; an error names the file that is missing or broken, and its line."""
        return read_index(self.folder, self.index_task, split, self.index_name, vocabulary_size=len(self.dictionary))

    def read_split(self, split: str) -> IndexedDataset:
        """Return the samples of a split: whether they have labels is theirs to tell, with ``has_targets``."""
        settings, transform = self.dataset_settings(split), self.build_transform(split)
        return self.dataset_type(self.read_index(split), settings, transform, *self._sizes)

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """Check and load a split; a ``UserError`` says that it has no labels."""
        dataset = self.read_split(split)
        if not dataset.has_targets:
            raise UserError(
                f"{dataset.index.files[0]} has no labels to train on or to score by: only mhmoe evaluate reads it"
            )
        logger.info(f"{split}: {len(dataset):,} samples")
        self.datasets[split] = dataset


@register_task("mhmoe_nlvr2", dataclass=ClassifierConfig)
class NLVR2Task(HeadTask):
    """Statements about pairs of images: are they true?

    The files are BEiT-3's: ``nlvr2.{train,dev,test-P}.index.jsonl``. Validation logs ``accuracy`` in percent: select
    with ``--best-checkpoint-metric accuracy --maximize-best-checkpoint-metric``.
    """

    head_name, head_type = "nlvr2", NLVR2Head
    index_task, dataset_type = "nlvr2", ImagePairs
    may_be_derived = True


@register_task("mhmoe_vqa", dataclass=ClassifierConfig)
class VQATask(HeadTask):
    """Questions about images, answered from a vocabulary, with soft scores.

    The files are BEiT-3's: ``vqa.{train,trainable_val,rest_val,test}.jsonl`` and ``answer2label.txt``. Validation logs
    ``vqa_score``, the mean soft score of the answers in percent: select with ``--best-checkpoint-metric vqa_score
    --maximize-best-checkpoint-metric``.
    """

    head_name, head_type = "vqa", VQAHead
    index_task, dataset_type = "vqa", VQADataset
    may_be_derived = True

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.classes_source = self.folder / ANSWERS_FILE
        self.classes = read_answers(self.folder)


@register_task("mhmoe_image_classification", dataclass=ImageClassificationTaskConfig)
class ImageClassificationTask(HeadTask):
    """Classes of images.

    The files are BEiT-3's: ``imagenet.{train,val}.index.jsonl``, of which ``val`` is also the test split where there is
    no ``imagenet.test.index.jsonl``, and ``imagenet.classes.json``, the list of the classes' names, in place of which
    ``--num-classes`` may be given.
    Validation logs ``accuracy`` and ``accuracy5`` in percent: select with ``--best-checkpoint-metric accuracy
    --maximize-best-checkpoint-metric``.
    """

    head_name, head_type = "image_classification", ImageClassificationHead
    index_task, dataset_type = "imagenet", LabelledImages

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.classes_source = self.folder / _CLASSES_FILE
        self.classes = _class_names(self.classes_source, args.num_classes)
        if args.imagenet_views:
            self.views = {"min_scale": 0.08, "by": IMAGENET}, {"crop_fraction": 0.875, "by": IMAGENET}


def _class_names(file: Path, num_classes: int | None) -> list[str]:
    """Return the names of the classes by label; numbers if there is no such file."""
    if not file.is_file():
        if num_classes is None:
            raise UserError(f"--num-classes is missing, and so is {file}, which would name the classes")
        return [str(label) for label in range(num_classes)]
    names = read_json(file)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file}: must be a JSON list of the classes' names, by label")
    if num_classes not in (None, len(names)):
        raise UserError(f"--num-classes ({num_classes}): {file} names {len(names)} classes")
    if len(names) < 2:
        raise UserError(f"--num-classes ({len(names)}) must be at least 2")
    return names


@register_task("mhmoe_retrieval", dataclass=RetrievalTaskConfig)
class RetrievalTask(HeadTask):
    """Images and their captions, found by each other.

    The files are BEiT-3's: ``coco_retrieval.{train,val,test}.jsonl``, or ``flickr30k``'s. Validation compares all
    images with all captions of the split and logs in percent how often a caption of the image is among the 1, 5
    and 10 most similar ones (``text_r1``, ...), how often the caption's image is (``image_r1``, ...), and
    ``mean_recall``, the mean of the six: select with ``--best-checkpoint-metric mean_recall
    --maximize-best-checkpoint-metric``.
    """

    head_name, head_type = "retrieval", RetrievalHead
    index_task, dataset_type = "retrieval", RetrievalDataset

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        names = NAMES[self.index_task]
        if args.retrieval_set not in (None, *names):
            raise UserError(f"--retrieval-set ({args.retrieval_set}) must be one of {', '.join(names)}")
        self.index_name = args.retrieval_set

    def evaluate_batch(self, sample: dict, model: nn.Module, criterion: Any) -> tuple[Tensor, Any, dict]:
        """Return the contrastive loss; recall over all batches so far, of all ranks, goes to fairseq's metrics."""
        found = criterion.embed(model, sample)
        metrics.log_custom(VectorMeter, "_vectors", criterion.vectors(found, sample))
        for name in (*(f"{direction}_r{rank}" for direction in ("text", "image") for rank in RANKS), "mean_recall"):
            metrics.log_derived(name, lambda meters, name=name: round(meters["_vectors"].recalls[name], 2))
        return criterion.outcome(sample, *criterion.compare(found))
