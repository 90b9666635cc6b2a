"""Fine-tuning on visual question answering: the answers of a vocabulary, with soft scores."""

from typing import Any

from fairseq.data import Dictionary
from fairseq.tasks import register_task
from torch import nn

from ..data.datasets import DatasetSettings, VQADataset
from ..data.multimodal.answers import ANSWERS_FILE, read_answers
from ..data.multimodal.index import Index
from ..models.heads import VQAHead
from .image_text_finetuning import ClassifierConfig, ClassTask


@register_task("mhmoe_vqa", dataclass=ClassifierConfig)
class VQATask(ClassTask):
    """Questions about images.

    The files are BEiT-3's: ``vqa.{train,trainable_val,rest_val,test}.jsonl`` and ``answer2label.txt``. Validation logs
    ``vqa_score``, the mean soft score of the answers in percent: select with ``--best-checkpoint-metric vqa_score
    --maximize-best-checkpoint-metric``.
    """

    head_name = "vqa"
    index_task = "vqa"
    may_be_derived = True

    def __init__(self, args: Any, dictionary: Dictionary) -> None:
        super().__init__(args, dictionary)
        self.classes = read_answers(self.folder)
        self.classes_source = str(self.folder / ANSWERS_FILE)

    def build_head(self, embed_dim: int) -> nn.Module:
        """The head of a model of that width."""
        return VQAHead(embed_dim, len(self.classes), self.args.center_features)

    def build_dataset(self, index: Index, settings: DatasetSettings, transform: Any) -> VQADataset:
        """The questions of an index."""
        return VQADataset(index, settings, transform, len(self.classes))
