"""fairseq's side of training on several processes: launching, failures, optimizer, saving, resuming."""

from .checks import TrainingFlags
from .expert_state import prepare_sharded_model
from .guarded_task import GuardedTask
from .messages import refuse_in_one_line
from .optimizer import MHMoEAdam
from .parallel_task import ParallelTask
from .pretrained import check_pretrained
from .resuming import ResumableEpochBatchIterator
from .saving import save_atomically

__all__ = [
    "GuardedTask",
    "MHMoEAdam",
    "ParallelTask",
    "ResumableEpochBatchIterator",
    "TrainingFlags",
    "check_pretrained",
    "prepare_sharded_model",
    "refuse_in_one_line",
    "save_atomically",
]
