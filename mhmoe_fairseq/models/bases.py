"""What both models are made of beside their layers: a dictionary, experts over the processes of a training."""

import hashlib
import logging
import struct
from typing import Any

import torch
import torch.distributed as dist
from fairseq.data import Dictionary
from torch import Tensor, nn

from ..common.errors import UserError
from ..moe import MergedConfig, MHMoEConfig
from ..moe.parallelism import ExpertParallelism
from ..parallel import expert_parallelism
from ..torchscale_ext.settings import Settings
from ..training import ParallelTask
from .flags import expert_parallel_size, shared_out
from .precision import require_one_precision

logger = logging.getLogger(__name__)


class RemembersVocabulary(nn.Module):
    """Stands among a module's bases: refuses a checkpoint of another dictionary, even where the sizes agree.

    The state has one tensor that is no parameter, a fingerprint of the dictionary.

    Attributes:
        vocabulary_fingerprint: int64 ``(4,)``.
        embedding_name: of the embedding's weight within the module, for messages.
    """

    vocabulary_fingerprint: Tensor
    embedding_name: str
    dictionary: Dictionary

    def remember_vocabulary(self, dictionary: Dictionary, embedding_name: str) -> None:
        """Take the fingerprint, once in the constructor."""
        self.embedding_name = embedding_name
        self.register_buffer("vocabulary_fingerprint", torch.tensor(fingerprint(dictionary)))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        own = self.vocabulary_fingerprint
        saved = state_dict.setdefault(prefix + "vocabulary_fingerprint", own)
        if not saved.is_meta and not own.is_meta and not torch.equal(saved.cpu(), own.cpu()):
            embedding = state_dict.get(prefix + self.embedding_name)
            words = "" if embedding is None else f"{embedding.size(0):,} "
            raise UserError(
                f"the checkpoint's dictionary ({words}words) is not this data's dict.txt ({len(self.dictionary):,} "
                "words): use the data folder that the model was trained on, or one prepared with its dictionary"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def fingerprint(dictionary: Dictionary) -> list[int]:
    """Four 64-bit numbers from the SHA-256 of the symbols in order."""
    digest = hashlib.sha256("\n".join(dictionary.symbols).encode()).digest()
    return list(struct.unpack("<4q", digest))


def spread_experts(settings: Settings, options: Any, task: Any) -> None:
    """Set ``parallel`` where a task of ours builds a model for training; every process must call it alike.

    For evaluation, in one process, and of TorchScale's own layer, every process has all experts. Errors are those of
    ``expert_parallel_size`` and ``require_one_precision``.
    """
    if isinstance(task, ParallelTask) and task.is_training:
        require_one_precision(options.mhmoe_precision)
        moe = None if settings.feed_forward == "torchscale" else settings.moe
        settings.parallel = training_parallelism(moe, options.mhmoe_expert_parallel_size, shared_out(options))


def training_parallelism(moe: MHMoEConfig | None, asked: int | None, by: str = "experts") -> ExpertParallelism | None:
    """The processes that torch.distributed knows of, as ``--mhmoe-expert-parallel-size`` asks; None for one process.

    Args:
        by: of ``PARALLELISMS``.
    """
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    spread = None if isinstance(moe, MergedConfig) else moe  # merged experts are needed all together
    size = 1
    if spread is not None:
        number = spread.num_banks if by == "heads" else spread.total_experts
        size = expert_parallel_size(number, asked, world_size, what=f"the number of {by}")
    if world_size == 1:
        return None
    if size > 1:
        logger.info(f"expert parallelism: {size} of {world_size} processes share the {by} of a layer")
    elif spread is not None:
        logger.warning(
            f"no expert parallelism: every process holds all {by}, since that was asked for or their number and "
            f"that of the processes ({world_size}) have no common divisor"
        )
    return expert_parallelism(size, by)
