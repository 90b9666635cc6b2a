"""Experts over the processes of a training."""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist

from ..moe.parallelism import ExpertParallelism
from ..parallel import expert_parallelism
from .flags import expert_parallel_size

logger = logging.getLogger(__name__)


def training_parallelism(options: Any) -> ExpertParallelism | None:
    """What the flags make of the processes that torch.distributed knows of; None for one process.

    Every process must call it, with the same options.

    Raises:
        ValueError: as ``expert_parallel_size``.
    """
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    size = expert_parallel_size(options, world_size)
    if world_size == 1:
        return None
    if size > 1:
        logger.info(f"expert parallelism: {size} of {world_size} processes share one bank of experts")
    elif options.moe_freq:
        logger.warning(
            "no expert parallelism: every process holds all experts, since that was asked for or their number and "
            f"that of the processes ({world_size}) have no common divisor"
        )
    return expert_parallelism(size)
