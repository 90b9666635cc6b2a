"""Fine-tuning on classes of images."""

from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from pathlib import Path
from typing import Any, Optional

from fairseq.tasks import register_task

from ..common.errors import UserError
from ..common.files import read_json
from ..data.datasets.labelled import LabelledImages
from ..data.images.transforms import IMAGENET, EvaluationTransform, TrainTransform
from ..models.heads import ImageClassificationHead
from .finetuning import ClassifierConfig, HeadTask

CLASSES_FILE = "imagenet.classes.json"
_LEAST_CROP, _CENTRAL = 0.08, 0.875


@dataclass
class ImageClassificationTaskConfig(ClassifierConfig):
    """Flags of image classification."""

    num_classes: Optional[int] = field(
        default=None, metadata={"help": f"number of classes (default: as many as {CLASSES_FILE} in the data names)"}
    )
    imagenet_views: bool = field(
        default=False,
        metadata={
            "help": "as BEiT-3 on ImageNet: training crops of 8 % and more, evaluation on the central square of 7/8 of "
            "the shorter side, ImageNet's mean and deviation (default: as in the other tasks)"
        },
    )


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
        self.classes = read_class_names(self.folder, args.num_classes)
        self.classes_source = str(self.folder / CLASSES_FILE)

    def build_transform(self, split: str) -> Any:
        """What is done to a split's images: nothing random but in training."""
        if not self.args.imagenet_views:
            return super().build_transform(split)
        size, flip = self.args.img_size, not self.args.no_flip
        if split == "train":
            return TrainTransform(size, self.args.randaug, min_scale=_LEAST_CROP, flip=flip, by=IMAGENET)
        return EvaluationTransform(size, _CENTRAL, by=IMAGENET)


def read_class_names(folder: Path, num_classes: int | None) -> list[str]:
    """The names of the classes by label; numbers if the folder has no names.

    Args:
        num_classes: how many there must be, if given.

    Raises:
        UserError: if there are neither names nor a number, or both and they differ, or fewer than two.
    """
    file = folder / CLASSES_FILE
    if not file.is_file():
        if num_classes is None:
            raise UserError(f"--num-classes is missing, and so is {file}, which would name the classes")
        names = [str(label) for label in range(num_classes)]
    else:
        names = read_json(file)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{file}: must be a JSON list of the classes' names, by label")
        if num_classes not in (None, len(names)):
            raise UserError(f"--num-classes ({num_classes}): {file} names {len(names)} classes")
    if len(names) < 2:
        raise UserError(f"--num-classes ({len(names)}) must be at least 2")
    return names
