"""Which processes share a bank of experts, and which hold the same experts."""

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class RankGroups:
    """One process's place among ``world_size`` processes in expert-parallel groups of ``size``.

    Groups are consecutive ranks (fast links first): with 4 ranks and size 2, {0, 1} and {2, 3} share a bank each, and
    {0, 2} and {1, 3} hold the same experts.

    Attributes:
        size: processes that share one bank of experts.
        rank: this process's number among them.
        experts: their process group.
        replicas: the group of the processes with the same experts, one from each bank.
        world_size: all data-parallel processes.
    """

    size: int
    rank: int
    experts: dist.ProcessGroup
    replicas: dist.ProcessGroup
    world_size: int

    @property
    def num_replicas(self) -> int:
        """Banks of experts in the world."""
        return self.world_size // self.size


def rank_groups(size: int) -> RankGroups:
    """Make the groups; every process of the world must call it, with the same size.

    Raises:
        ValueError: if ``size`` does not divide the world.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if world_size % size:
        raise ValueError(f"expert-parallel size ({size}) must divide the number of processes ({world_size})")
    first = rank - rank % size
    experts = _group(range(first, first + size))
    replicas = _group(range(rank % size, world_size, size))
    return RankGroups(size, rank % size, experts, replicas, world_size)


def _group(ranks: range) -> dist.ProcessGroup:
    # Made by its members alone: in a large world there are many groups.
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup), "this process is a member"
    return group
