"""Fine-tuning on visual reasoning: is a statement about two images true?"""

from typing import Any

from fairseq.tasks import register_task
from torch import nn

from ..data.datasets import DatasetSettings, ImagePairs
from ..data.multimodal.index import Index
from ..models.heads import NLVR2Head
from .image_text_finetuning import ClassifierConfig, HeadTask


@register_task("mhmoe_nlvr2", dataclass=ClassifierConfig)
class NLVR2Task(HeadTask):
    """Statements about pairs of images.

    The files are BEiT-3's: ``nlvr2.{train,dev,test-P}.index.jsonl``. Validation logs ``accuracy`` in percent: select
    with ``--best-checkpoint-metric accuracy --maximize-best-checkpoint-metric``.
    """

    head_name = "nlvr2"
    index_task = "nlvr2"
    may_be_derived = True

    def build_head(self, embed_dim: int) -> nn.Module:
        """The head of a model of that width."""
        return NLVR2Head(embed_dim, center=self.args.center_features)

    def build_dataset(self, index: Index, settings: DatasetSettings, transform: Any) -> ImagePairs:
        """The statements of an index."""
        return ImagePairs(index, settings, transform)
