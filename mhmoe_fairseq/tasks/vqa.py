"""Fine-tuning on visual question answering: the answers of a vocabulary, with soft scores."""

from typing import Any

from fairseq.tasks import register_task

from ..data.datasets.labelled import VQADataset
from ..data.multimodal.index import ANSWERS_FILE, read_answers
from ..models.heads import VQAHead
from .finetuning import ClassifierConfig, HeadTask


@register_task("mhmoe_vqa", dataclass=ClassifierConfig)
class VQATask(HeadTask):
    """Questions about images.

    The files are BEiT-3's: ``vqa.{train,trainable_val,rest_val,test}.jsonl`` and ``answer2label.txt``. Validation logs
    ``vqa_score``, the mean soft score of the answers in percent: select with ``--best-checkpoint-metric vqa_score
    --maximize-best-checkpoint-metric``.
    """

    head_name, head_type = "vqa", VQAHead
    index_task, dataset_type = "vqa", VQADataset
    may_be_derived = True

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.classes = read_answers(self.folder)
        self.classes_source = str(self.folder / ANSWERS_FILE)
