"""fairseq's side of training on several processes: launching, failures, optimizer, saving, resuming."""

from .checks import TrainingFlags
from .expert_state import prepare_sharded_model
from .optimizer import MHMoEAdam
from .pretrained import check_pretrained
from .resuming import ResumableEpochBatchIterator
from .saving import save_atomically
from .task import ParallelTask

__all__ = [
    "MHMoEAdam",
    "ParallelTask",
    "ResumableEpochBatchIterator",
    "TrainingFlags",
    "check_pretrained",
    "prepare_sharded_model",
    "save_atomically",
]
