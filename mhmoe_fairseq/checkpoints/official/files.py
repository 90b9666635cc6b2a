"""Reading checkpoints of the official MH-MoE repository, without running code that they may hold.

Its training is a fork of fairseq that writes what all ranks share and every rank's own experts apart:
``NAME-shared.pt`` and ``NAME-rank-0.pt``, ``NAME-rank-1.pt``, ... In a rank's file the experts are numbered from 0.
Facts from github.com/yushuiwx/MH-MoE (``component/feedforward_network.py``, ``component/xmoe/global_groups.py``) and
from the MoE branch of github.com/facebookresearch/fairseq (``moe_checkpoint_utils.py``); the code here is our own.
"""

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...common.errors import UserError
from ...compat import checkpoint_globals
from ...data.tensor_files import load_tensors, without_wrapper

State = dict[str, Tensor]
_SHARD = re.compile(r"(?P<stem>.*)-(?:shared|rank-\d+)\.pt")
_RANK = re.compile(r".*-rank-(\d+)\.pt")
_EXPERT = re.compile(r"(.*\bexperts\.)(\d+)(\..*)")


def read_official(path: Path) -> tuple[State, dict[str, Any]]:
    """All weights, experts numbered through, and the settings of the model.

    Args:
        path: a whole checkpoint, or any of the files that a training on several ranks wrote.

    Raises:
        FileNotFoundError: if it is not there.
        UserError: naming the file that is unreadable, incomplete or holds objects other than plain data.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    match = _SHARD.fullmatch(path.name)
    if match is None:
        checkpoint = _read(path)
        return _weights(path, checkpoint), _settings(path, checkpoint)
    shards = sorted(path.parent.glob(f"{match['stem']}-rank-*.pt"), key=_rank)
    if not shards:
        raise FileNotFoundError(f"no {match['stem']}-rank-*.pt beside {path}: the experts' weights are in them")
    if [_rank(shard) for shard in shards] != list(range(len(shards))):
        raise UserError(
            f"{path.parent}: of {match['stem']}-rank-*.pt only {[_rank(shard) for shard in shards]} are there"
        )
    shared_path = path.with_name(f"{match['stem']}-shared.pt")
    first = _read(shards[0])
    settings = _settings(shards[0], first)
    states = [_weights(shards[0], first), *(_weights(shard, _read(shard)) for shard in shards[1:])]
    shared = _weights(shared_path, _read(shared_path)) if shared_path.is_file() else states[0]
    return merge_ranks(shared, states, int(settings.get("moe_expert_count") or 0)), settings


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint file; only plain data, ``Namespace`` and omegaconf's containers are unpickled.

    Raises:
        UserError: naming the file and, where another class stands in it, that class.
    """
    checkpoint = load_tensors(path, classes=[argparse.Namespace, *checkpoint_globals()])
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint's dictionary")
    return checkpoint


def merge_ranks(shared: Mapping[str, Tensor], ranks: list[State], num_experts: int) -> State:
    """One state of what is shared and the experts of all ranks, numbered as in one process.

    With fewer ranks than experts, rank r has the r-th run of consecutive experts; with more, one each, repeated:
    rank r has expert ``r % num_experts``.

    Raises:
        UserError: if the ranks' experts are not ``num_experts`` in all.
    """
    merged = {name: value for name, value in shared.items() if _EXPERT.fullmatch(name) is None}
    per_rank = [_num_experts(state) for state in ranks]
    if len(ranks) > num_experts and per_rank == [1] * len(ranks) and len(ranks) % max(num_experts, 1) == 0:
        ranks = ranks[:num_experts]
    elif len(set(per_rank)) != 1 or sum(per_rank) != num_experts:
        raise UserError(f"the {len(ranks)} rank files have {per_rank} experts; moe_expert_count is {num_experts}")
    for rank, state in enumerate(ranks):
        for name, value in state.items():
            match = _EXPERT.fullmatch(name)
            if match is not None:
                merged[f"{match[1]}{rank * per_rank[0] + int(match[2])}{match[3]}"] = value
    return merged


def _num_experts(names: Iterable[str]) -> int:
    return len({match[2] for match in map(_EXPERT.fullmatch, names) if match is not None})


def _rank(path: Path) -> int:
    match = _RANK.fullmatch(path.name)
    return -1 if match is None else int(match[1])


def _weights(path: Path, checkpoint: dict[str, Any]) -> State:
    state = checkpoint.get("model")
    if not isinstance(state, Mapping) or not state or not all(torch.is_tensor(value) for value in state.values()):
        raise UserError(f"{path}: no 'model' with weights in it")
    return dict(without_wrapper(state))


def _settings(path: Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
    stored = checkpoint.get("cfg") or checkpoint.get("args")
    if isinstance(stored, Mapping):
        stored = stored.get("model")
    if isinstance(stored, argparse.Namespace):
        stored = vars(stored)
    if not isinstance(stored, Mapping) or "decoder_embed_dim" not in stored:
        raise UserError(f"{path}: no settings of a language model in its 'cfg' or 'args'")
    return {str(name): value for name, value in stored.items()}
