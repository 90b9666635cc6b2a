"""fairseq's side of training on several processes: launching, failures, optimizer, saving, resuming."""

from .batches import ResumableEpochBatchIterator
from .checks import TrainingFlags
from .expert_state import prepare_sharded_model
from .failures import refuse_in_one_line
from .optimizer import MHMoEAdam
from .saving import save_atomically
from .task import ParallelTask

__all__ = [
    "MHMoEAdam",
    "ParallelTask",
    "ResumableEpochBatchIterator",
    "TrainingFlags",
    "prepare_sharded_model",
    "refuse_in_one_line",
    "save_atomically",
]
