"""fairseq's side of training on several processes: launching, failures, optimizer, saving, resuming."""

from .batches import ResumableEpochBatchIterator
from .checks import TrainingFlags
from .expert_state import prepare_sharded_model
from .optimizer import MHMoEAdam
from .saving import save_atomically
from .task import ParallelTask
from .two_stage import TwoStageSchedule

__all__ = [
    "MHMoEAdam",
    "ParallelTask",
    "ResumableEpochBatchIterator",
    "TrainingFlags",
    "TwoStageSchedule",
    "prepare_sharded_model",
    "save_atomically",
]
