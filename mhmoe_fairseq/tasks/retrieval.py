"""Fine-tuning on finding images by their texts and texts by their images."""

import functools
from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from typing import Any, Optional

from fairseq.logging import metrics
from fairseq.tasks import register_task
from torch import Tensor, nn

from ..common.errors import UserError
from ..data.datasets.labelled import RetrievalDataset
from ..data.multimodal.index import NAMES
from ..metrics.recall import RANKS, VectorMeter
from ..models.heads import RetrievalHead
from .finetuning import HeadTask, ImageTextFineTuningConfig


@dataclass
class RetrievalTaskConfig(ImageTextFineTuningConfig):
    """Flags of retrieval."""

    retrieval_set: Optional[str] = field(
        default=None,
        metadata={"help": "coco_retrieval or flickr30k (default: the first of them that the data folder has)"},
    )


@register_task("mhmoe_retrieval", dataclass=RetrievalTaskConfig)
class RetrievalTask(HeadTask):
    """Images and their captions.

    The files are BEiT-3's: ``coco_retrieval.{train,val,test}.jsonl``, or ``flickr30k``'s. Validation compares all
    images with all captions of the split and logs in percent how often a caption of the image is among the 1, 5
    and 10 most similar ones (``text_r1``, ...), how often the caption's image is (``image_r1``, ...), and
    ``mean_recall``, the mean of the six: select with ``--best-checkpoint-metric mean_recall
    --maximize-best-checkpoint-metric``.
    """

    head_name = "retrieval"
    index_task, dataset_type = "retrieval", RetrievalDataset

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        names = NAMES[self.index_task]
        if args.retrieval_set not in (None, *names):
            raise UserError(f"--retrieval-set ({args.retrieval_set}) must be one of {', '.join(names)}")
        self.index_name = args.retrieval_set

    def build_head(self, embed_dim: int) -> nn.Module:
        """Return a new head for a model of that width."""
        return RetrievalHead(embed_dim)

    def evaluate_batch(self, sample: dict, model: nn.Module, criterion: Any) -> tuple[Tensor, Any, dict]:
        """The contrastive loss of a batch; recall over all batches so far, of all ranks, goes to fairseq's metrics."""
        found = criterion.embed(model, sample)
        metrics.log_custom(VectorMeter, "_vectors", criterion.vectors(found, sample))
        for name in (*(f"{direction}_r{rank}" for direction in ("text", "image") for rank in RANKS), "mean_recall"):
            metrics.log_derived(name, functools.partial(_recall, name))
        return criterion.outcome(sample, *criterion.compare(found))


def _recall(name: str, meters: Any) -> float:
    return round(meters["_vectors"].recalls[name], 2)
