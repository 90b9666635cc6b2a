"""Fine-tuning on visual reasoning: is a statement about two images true?"""

from fairseq.tasks import register_task

from ..data.datasets.labelled import ImagePairs
from ..models.heads import NLVR2Head
from .finetuning import ClassifierConfig, HeadTask


@register_task("mhmoe_nlvr2", dataclass=ClassifierConfig)
class NLVR2Task(HeadTask):
    """Statements about pairs of images.

    The files are BEiT-3's: ``nlvr2.{train,dev,test-P}.index.jsonl``. Validation logs ``accuracy`` in percent: select
    with ``--best-checkpoint-metric accuracy --maximize-best-checkpoint-metric``.
    """

    head_name, head_type = "nlvr2", NLVR2Head
    index_task, dataset_type = "nlvr2", ImagePairs
    may_be_derived = True
