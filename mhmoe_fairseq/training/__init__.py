"""fairseq's side of training on several processes: launching, failures, optimizer, saving, resuming."""

from .checks import TrainingFlags
from .expert_state import prepare_sharded_model
from .launching import require_process_group
from .optimizer import MHMoEAdam
from .resuming import ResumableEpochBatchIterator
from .saving import save_atomically

__all__ = [
    "MHMoEAdam",
    "ResumableEpochBatchIterator",
    "TrainingFlags",
    "prepare_sharded_model",
    "require_process_group",
    "save_atomically",
]
