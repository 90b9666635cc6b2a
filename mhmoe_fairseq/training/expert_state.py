"""All experts in one checkpoint: collected on rank 0 before a save, shared out again when loading.

fairseq has one moment at which all ranks meet before a save: ``Trainer.consolidate_optimizer`` calls
``consolidate_state_dict`` of the inner torch optimizer, if it has one. What comes after, rank 0 does alone.

fairseq gives optimizers bare parameters, and notes tell them more. ``param_group`` is the only attribute besides
``expert`` that both fairseq versions hand on to the fp32 copies that ``FP16Optimizer`` steps on. Its own reader is the
composite optimizer, which is refused wherever notes are taken.
"""

import datetime
import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..common.errors import UserError
from ..parallel import ShardedParameter, sharded_experts
from .checks import TrainingFlags, problems

# How long rank 0 waits for the others: one that has died must not hold up the rest for the half hour that process
# groups wait by default.
GATHER_TIMEOUT = datetime.timedelta(seconds=120)


class ParameterNotes(NamedTuple):
    """What the parameter is a part of, if experts are shared out over ranks, and the factor of its learning rate."""

    shard: ShardedParameter | None = None
    lr_scale: float = 1.0


def notes_of(parameter: nn.Parameter) -> ParameterNotes:
    """Return a parameter's notes, empty ones if it has none."""
    notes = getattr(parameter, "param_group", None)
    return notes if isinstance(notes, ParameterNotes) else ParameterNotes()


def take_note(parameter: nn.Parameter, **changes: Any) -> None:
    """Change some of a parameter's notes."""
    parameter.param_group = notes_of(parameter)._replace(**changes)  # type: ignore[attr-defined]


def prepare_sharded_model(model: nn.Module, flags: TrainingFlags) -> None:
    """Note what an optimizer must know of a new model's experts on several ranks; unsafe flags are refused."""
    for shard in sharded_experts(model):
        for problem in problems(flags):
            raise UserError(
                f"{problem}. (Experts are spread over {shard.groups.size} ranks. Where every rank holds them all, with "
                "--mhmoe-expert-parallel-size 1, this is not needed.)"
            )
        take_note(shard.parameter, shard=shard)


class ExpertState:
    """Gives a torch optimizer's ``state_dict`` and ``load_state_dict`` the state of all experts.

    The model's expert weights travel with it: they are collected at the same moment, from the model itself, and wait
    for the model's ``state_dict``.

    Args:
        optimizer: the inner torch optimizer; its state per parameter is numbers and tensors of the parameter's shape.
        shards: its expert parameters, at least one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, shards: dict[nn.Parameter, ShardedParameter]) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._optimizer = optimizer
        self._shards = {index: (p, shards[p]) for index, p in enumerate(parameters) if p in shards}
        self._whole: dict[int, dict[str, Tensor]] = {}
        self._handled_at_start = sys.exc_info()[1]
        groups = next(iter(shards.values())).groups
        self._num_ranks = groups.size
        # Every bank makes one, though only the first's is used: torch names a group that its members make alone by the
        # number of groups that they have, which must be one number on all ranks.
        ranks = dist.get_process_group_ranks(groups.experts)
        cpu_group = dist.new_group(ranks, GATHER_TIMEOUT, "gloo", use_local_synchronization=True)
        assert isinstance(cpu_group, dist.ProcessGroup), "this process is a member"
        self._cpu_group = cpu_group
        optimizer.consolidate_state_dict = self.gather  # type: ignore[attr-defined]
        optimizer.register_state_dict_post_hook(self._put_whole)
        optimizer.register_load_state_dict_pre_hook(self._take_part)

    def gather(self) -> None:
        """Bring all experts' weights and state to rank 0's memory, one tensor at a time; every rank must call it.

        Raises:
            Exception: the one that is being handled, if there is one: fairseq saves ``crash.pt`` after an exception
                in a training step, on the rank that had it alone. The others are not waiting there. They are after a
                FloatingPointError, which all ranks raise together when the gradient's norm is not finite.
        """
        error = sys.exc_info()[1]
        if error is not None and error is not self._handled_at_start and not isinstance(error, FloatingPointError):
            raise error
        self._whole = {}
        if error is not self._handled_at_start and dist.get_rank() > 0:
            # Before ``crash.pt`` fairseq 0.12.2 builds the state on every rank, and throws it away on all but rank 0.
            for index, (_, shard) in self._shards.items():
                shard.provide_part()
                self._whole[index] = {}
        if dist.get_rank() >= self._num_ranks:  # rank 0 is in the first bank, which has all experts
            return
        for index, (parameter, shard) in self._shards.items():
            weight = self._on_rank_0(shard.parameter.detach())
            if weight is not None:
                shard.provide(weight)
            state = self._optimizer.state.get(parameter, {})
            tensors = {key: value for key, value in state.items() if getattr(value, "shape", None) == parameter.shape}
            whole = {key: self._on_rank_0(value) for key, value in tensors.items()}
            self._whole[index] = {key: value for key, value in whole.items() if value is not None}

    def _on_rank_0(self, part: Tensor) -> Tensor | None:
        """``(E / P, ...) -> (E, ...)`` in host memory on rank 0, None elsewhere."""
        part = part.cpu().contiguous()
        whole = None if dist.get_rank() > 0 else part.new_empty(part.size(0) * self._num_ranks, *part.shape[1:])
        pieces = None if whole is None else list(whole.chunk(self._num_ranks))
        dist.gather(part, pieces, dst=0, group=self._cpu_group)
        return whole

    def _put_whole(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        state = state_dict["state"]
        for index, (_, shard) in self._shards.items():
            if index not in state:  # before the first update
                continue
            if index not in self._whole:
                raise RuntimeError(
                    f"state_dict(): the optimizer's state of {shard.name} is spread over {self._num_ranks} processes "
                    "and has not been gathered: all processes must call consolidate_state_dict() just before"
                )
            # A new dictionary: the old one is the optimizer's own.
            state[index] = {**state[index], **self._whole.pop(index)}

    def _take_part(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        # In place: MemoryEfficientFP16Optimizer reads the dictionary once more after the load. And copies, so that
        # the tensors over all experts can go.
        state = state_dict["state"]
        for index in self._shards.keys() & state.keys():
            shard = self._shards[index][1]
            state[index] = {
                key: shard.part(value).clone() if torch.is_tensor(value) and value.dim() > 0 else value
                for key, value in state[index].items()
            }
