"""Who shares experts, which parameters are a part of a larger one, and states as if one process held the whole.

A state dictionary taken from a sharded module must hold all experts, but the processes' parts can only be brought
together where all processes take part, and ``state_dict()`` is often called on one of them. So the two steps are apart:
``ShardedParameter.provide`` hands in the whole tensor that was gathered before, the next ``state_dict()`` uses it up.
"""

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

_ATTRIBUTE = "expert_shards"


@dataclass(frozen=True)
class RankGroups:
    """One process among ``world_size`` processes in expert-parallel groups of ``size``.

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


@dataclass
class ExpertShards:
    """What a sharded module remembers: who shares it, and whole tensors that wait for ``state_dict()``."""

    groups: RankGroups
    provided: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardedParameter:
    """A parameter of which this process holds rows ``first`` to ``first + parameter.size(0)`` of dim 0.

    Attributes:
        name: in the model, as in its state dictionary.
        attribute: its name in ``module``, which owns it.
        parameter: this process's part.
        groups: the processes with the other parts, and with the same part.
        full_size: the whole's size in dim 0, the number of experts.
    """

    name: str
    module: nn.Module
    attribute: str
    parameter: nn.Parameter
    groups: RankGroups
    full_size: int
    first: int

    def part(self, whole: Tensor) -> Tensor:
        """This process's rows of a tensor over all experts, such as an optimiser's state; ``ValueError`` if not."""
        if whole.size(0) != self.full_size:
            raise ValueError(f"{self.name}: {whole.size(0)} experts in the checkpoint, {self.full_size} in the model")
        return whole[self.first : self.first + self.parameter.size(0)]

    def provide(self, whole: Tensor) -> None:
        """Give the next ``state_dict()`` all experts' values."""
        if whole.shape != (self.full_size, *self.parameter.shape[1:]):
            raise ValueError(f"{self.name}: shape {tuple(whole.shape)} is not that of {self.full_size} experts")
        _shards(self.module).provided[self.attribute] = whole

    def provide_part(self) -> None:
        """Let the next ``state_dict()`` have this process's experts only, where it will be thrown away."""
        _shards(self.module).provided[self.attribute] = self.parameter.detach()


def sharded_experts(model: nn.Module) -> list[ShardedParameter]:
    """All sharded parameters of ``model``, in the order of ``named_parameters``; none in one process."""
    return [
        ShardedParameter(
            f"{prefix}.{attribute}" if prefix else attribute,
            module,
            attribute,
            parameter,
            shards.groups,
            full_size=shards.groups.size * parameter.size(0),
            first=shards.groups.rank * parameter.size(0),
        )
        for prefix, module in model.named_modules()
        if (shards := getattr(module, _ATTRIBUTE, None)) is not None
        for attribute, parameter in module.named_parameters(recurse=False)
    ]


def shard_experts(module: nn.Module, groups: RankGroups) -> None:
    """Declare that dim 0 of each of the module's own parameters is this process's share of all experts.

    The mark ``expert`` tells fairseq not to average these parameters over the data-parallel processes.
    """
    setattr(module, _ATTRIBUTE, ExpertShards(groups))
    for parameter in module.parameters(recurse=False):
        parameter.expert = True  # type: ignore[attr-defined]
    module.register_state_dict_post_hook(_put_whole)
    module.register_load_state_dict_pre_hook(_take_part)


def _put_whole(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    provided = _shards(module).provided
    for attribute, _ in module.named_parameters(recurse=False):
        if attribute not in provided:
            raise RuntimeError(
                f"state_dict(): {prefix}{attribute} is spread over {_shards(module).groups.size} processes and has not "
                "been gathered: all processes must gather it just before"
            )
        state[prefix + attribute] = provided.pop(attribute)


def _take_part(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    errors: list[str] = others[-1]
    for sharded in sharded_experts(module):
        whole = state.get(prefix + sharded.attribute)
        if whole is None:
            continue
        try:
            state[prefix + sharded.attribute] = sharded.part(whole)
        except ValueError as error:
            errors.append(f"{prefix}{error}")


def _shards(module: nn.Module) -> ExpertShards:
    return getattr(module, _ATTRIBUTE)
