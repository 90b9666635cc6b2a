"""Checkpoints of the official MH-MoE repository become ours; nothing in their files is run.

Its training is a fork of fairseq that writes what all ranks share and every rank's own experts apart:
``NAME-shared.pt`` and ``NAME-rank-0.pt``, ``NAME-rank-1.pt``, ... In a rank's file the experts are numbered from 0.
Facts from github.com/yushuiwx/MH-MoE (``component/feedforward_network.py``, ``component/xmoe/global_groups.py``) and
from the MoE branch of github.com/facebookresearch/fairseq (``moe_checkpoint_utils.py``); the code here is our own.
"""

import argparse
import dataclasses
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf
from torch import Tensor

from ...common.errors import UserError
from ...common.files import atomic_path, refuse_path_separator
from ...common.ranges import flag
from ...compat import checkpoint_globals
from ...data.tensor_files import load_tensors, save_tensors
from ...data.vocabularies import dictionary_files
from ...models.bases import fingerprint
from ...models.counts import blank_dictionary, build_on_meta
from ...models.flags import moe_config
from ...models.options import LanguageModelOptions
from ...moe import MHMoELayer
from ..summary import different_shapes, parameters_of, unique_weights, weights_of
from .mapping import check_settings, convert_weights, model_options, moe_layers

_SHARD = re.compile(r"(?P<stem>.*)-(?:shared|rank-(?P<rank>\d+))\.pt")
_EXPERT = re.compile(r"(.*\bexperts\.)(\d+)(\..*)")
FINGERPRINT = "decoder.vocabulary_fingerprint"
_NO_PROGRESS = {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {"best": None}, "num_updates": 0}


def import_official(
    checkpoint: Path, out: Path, *, routing: str, data: Path | None = None, layers_only: bool = False,
    overwrite: bool = False,
) -> list[str]:  # fmt: skip
    """Read, convert, check and write ``model.pt``, or only its MoE layers into ``moe_layers.pt``.

    Args:
        checkpoint: a whole one, or one of its files of a training on several ranks.
        routing: ``capacity`` or ``dropless``.
        data: folder with the model's ``dict.txt``, which is copied beside the model.
        layers_only: write ``{layer: {config, state}}``, fields of ``MHMoEConfig`` and the state of ``MHMoELayer``.
        overwrite: replace files that are in ``out``.

    Returns:
        what was written, and how to train on.

    Raises:
        UserError: naming the file and what is wrong, before anything is written.
    """
    refuse_path_separator(out, "--out")
    if layers_only and data is not None:
        raise UserError(f"--data {data} has no meaning with --layers-only: layers have no dictionary")
    path = out / ("moe_layers.pt" if layers_only else "model.pt")
    if path.exists() and path.samefile(checkpoint):
        raise UserError(f"--out {out}: {path.name} in it is the checkpoint to import, and would be replaced")
    copies = {} if data is None else _copies(data, out)
    for target in (path, *copies):
        if target.exists() and not overwrite:
            raise UserError(f"{target} exists: give --overwrite to replace it")
    official, settings = read_official(checkpoint)
    check_settings(settings, official)
    options = model_options(official, settings, routing)
    if layers_only:
        states, config = moe_layers(official), moe_config(options)
        if not states or config is None:
            raise UserError("there is no MoE layer in the checkpoint")
        with torch.device("meta"):
            expected = MHMoELayer(config).state_dict()
        for index, state in states.items():
            _require_shapes(state, expected, f"layer {index}: ")
        fields = dataclasses.asdict(config)
        save_tensors({index: {"config": fields, "state": state} for index, state in states.items()}, path)
        return [f"{path}: {len(states)} MoE layers, {sum(map(_count, states.values())):,} parameters"]
    converted = convert_checkpoint(official, options, None if data is None else _load_dictionary(data, official))
    save_tensors(converted, path)  # what is large first, so that a full disk leaves an earlier model its dictionary
    for target, source in copies.items():
        with atomic_path(target) as copied:
            shutil.copyfile(source, copied)
    model = converted["cfg"]["model"]
    return [
        f"{path}: {_count(converted['model']):,} parameters, {model['decoder_layers']} layers, {_describe(model)}",
        f"to train on: fairseq-train ... --finetune-from-model {path} {_command_line(model)}",
    ]


def _copies(data: Path, out: Path) -> dict[Path, Path]:
    """Where to copy the dictionary's files; none that is there already, byte by byte."""
    return {
        out / source.name: source
        for source in dictionary_files(data)
        if not (out / source.name).is_file() or (out / source.name).read_bytes() != source.read_bytes()
    }


# ---------------------------------------------------------------------- reading


def read_official(path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """All weights, experts numbered through, and the stored settings of the model.

    Args:
        path: a whole checkpoint, or any of the files that a training on several ranks wrote.

    Raises:
        FileNotFoundError: if it or the files of the ranks are not there.
        UserError: naming the file that is unreadable, incomplete or holds objects other than plain data.
    """
    match = _SHARD.fullmatch(path.name)
    if match is None:
        checkpoint = _read(path)
        return weights_of(checkpoint, path), _settings(checkpoint, path)
    stem = match["stem"]
    found = [(shard, path.with_name(shard[0])) for shard in map(_SHARD.fullmatch, os.listdir(path.parent)) if shard]
    shards = {int(shard["rank"]): file for shard, file in found if shard["stem"] == stem and shard["rank"]}
    if not shards:
        raise FileNotFoundError(f"no {stem}-rank-*.pt beside {path}: the experts' weights are in them")
    if sorted(shards) != list(range(len(shards))):
        raise UserError(f"{path.parent}: of {stem}-rank-*.pt only {sorted(shards)} are there")
    first = _read(shards.pop(0))
    settings = _settings(first, path)
    states = [weights_of(first, path), *(weights_of(_read(file), file) for _, file in sorted(shards.items()))]
    shared = path.with_name(f"{stem}-shared.pt")
    dense = weights_of(_read(shared), shared) if shared.is_file() else states[0]
    return merge_ranks(dense, states, int(settings.get("moe_expert_count") or 0)), settings


def _read(path: Path) -> Any:
    """What a file holds; only plain data, ``Namespace`` and omegaconf's containers are unpickled."""
    return load_tensors(path, classes=[argparse.Namespace, *checkpoint_globals()])


def _settings(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    stored = checkpoint.get("cfg") or checkpoint.get("args")
    if isinstance(stored, Mapping):
        stored = stored.get("model")
    if isinstance(stored, argparse.Namespace):
        stored = vars(stored)
    if not isinstance(stored, Mapping) or "decoder_embed_dim" not in stored:
        raise UserError(f"{path}: no settings of a language model in its 'cfg' or 'args'")
    return {str(name): value for name, value in stored.items()}


def merge_ranks(
    shared: Mapping[str, Tensor], ranks: Sequence[Mapping[str, Tensor]], num_experts: int
) -> dict[str, Tensor]:
    """One state of what is shared and the experts of all ranks, numbered as in one process.

    With fewer ranks than experts, rank r has the r-th run of consecutive experts; with more, one each, repeated:
    rank r has expert ``r % num_experts``.

    Raises:
        UserError: if the ranks' experts are not ``num_experts`` in all.
    """
    merged = {name: value for name, value in shared.items() if _EXPERT.fullmatch(name) is None}
    experts = [[(match, state[match[0]]) for match in map(_EXPERT.fullmatch, state) if match] for state in ranks]
    per_rank = [len({match[2] for match, _ in found}) for found in experts]
    if len(ranks) > num_experts and per_rank == [1] * len(ranks) and len(ranks) % max(num_experts, 1) == 0:
        experts = experts[:num_experts]
    elif len(set(per_rank)) != 1 or sum(per_rank) != num_experts:
        raise UserError(f"the {len(ranks)} rank files have {per_rank} experts; moe_expert_count is {num_experts}")
    for rank, found in enumerate(experts):
        for match, value in found:
            merged[f"{match[1]}{rank * per_rank[0] + int(match[2])}{match[3]}"] = value
    return merged


# ---------------------------------------------------------------------- converting


def convert_checkpoint(official: Mapping[str, Tensor], options: Any, dictionary: Dictionary | None) -> dict[str, Any]:
    """A checkpoint that fairseq and ``from_pretrained`` load.

    Args:
        official: weights, experts numbered through.
        options: of our model.
        dictionary: of the model; without it any dictionary of the right size will be accepted later.

    Raises:
        UserError: naming weights without a counterpart, or missing, or of another shape than the settings say.
    """
    rotary_heads = options.decoder_attention_heads if options.rotary_embed else None
    state = convert_weights(official, rotary_heads=rotary_heads)
    if not options.no_share_decoder_input_output_embed:  # one tensor, stored once
        state["decoder.output_projection.weight"] = state["decoder.embed_tokens.weight"]
    expected = expected_tensors(options, dictionary or blank_dictionary(len(state["decoder.embed_tokens.weight"])))
    _require_shapes(state, expected)
    if dictionary is not None:
        state[FINGERPRINT] = torch.tensor(fingerprint(dictionary))
    return stored_checkpoint(state, options, {"_name": "mhmoe_language_modeling", "data": ""})


def _require_shapes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str = "") -> None:
    wrong = [f"{name} is {a} in it, {b} in our model" for name, a, b in different_shapes(state, expected)]
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise UserError(f"{where}the weights do not fit the stored settings: {'; '.join(wrong[:6])}{more}")


def expected_tensors(options: Any, dictionary: Dictionary) -> dict[str, Tensor]:
    """What the state of a language model has, without values, but for the dictionary's fingerprint."""
    state = build_on_meta(options, dictionary).state_dict()
    return {name: value for name, value in state.items() if name != FINGERPRINT}


def stored_checkpoint(
    state: Mapping[str, Tensor], options: Any, task: Mapping[str, Any], criterion: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The checkpoint of a model that begins a training, with our criterion.

    Args:
        task: its settings, to which the model's lengths are added.
        criterion: its settings (default: its own).
    """
    task_state = {"language_token": True} if task.get("mhmoe_language_token") else {}
    progress = {"optimizer_history": [_NO_PROGRESS], "task_state": task_state, "extra_state": {"epoch": 0}}
    config = _stored_config(options, task, {"_name": "moe_cross_entropy", **(criterion or {})})
    return {"args": None, "cfg": config, "model": dict(state), **progress}


def _stored_config(options: Any, task: Mapping[str, Any], criterion: Mapping[str, Any]) -> dict[str, Any]:
    """fairseq's configuration as plain data."""
    config: Any = OmegaConf.to_container(OmegaConf.structured(FairseqConfig()), enum_to_str=True)
    plain = (bool, int, float, type(None))
    model = {name: value if isinstance(value, plain) else str(value) for name, value in vars(options).items()}
    lengths = {name: model[name] for name in ("tokens_per_sample", "max_target_positions")}
    return {**config, "model": model, "task": {**task, **lengths}, "criterion": dict(criterion)}


def _load_dictionary(data: Path, official: Mapping[str, Tensor]) -> Dictionary:
    """The dictionary in ``data``, which must have the embedding's size."""
    path = data / "dict.txt"
    if not path.is_file():
        raise FileNotFoundError(f"--data {data}: no dict.txt in it")
    dictionary = Dictionary.load(str(path))
    rows = len(official["decoder.embed_tokens.weight"])
    if len(dictionary) != rows:
        raise UserError(
            f"{path} has {len(dictionary):,} words with the four special ones, the embedding {rows:,}: the official "
            "task adds symbols of its own (its end of line, and fillers up to its batch size multiple)"
        )
    return dictionary


def _describe(model: Mapping[str, Any]) -> str:
    """The MoE layers in words."""
    if not model["moe_freq"]:
        return "dense"
    return (
        f"every {model['moe_freq']}. one with {model['moe_expert_count']} experts of {model['moe_ffn_dim']}, "
        f"top-{model['moe_top_k']}, {model['mhmoe_heads_number']} heads, {model['mhmoe_routing']} routing"
    )


def _command_line(model: Mapping[str, Any]) -> str:
    """The stored model settings as flags of ``fairseq-train``."""
    named = [entry.name for entry in dataclasses.fields(LanguageModelOptions) if entry.metadata.get("help")]
    given = {name: model[name] for name in named if model[name] is not None and model[name] is not False}
    words = [flag(name) + ("" if value is True else f" {value}") for name, value in given.items()]
    return " ".join([f"--arch {model['_name']}", *words])


def _count(state: Mapping[str, Tensor]) -> int:
    return sum(value.numel() for _, value in parameters_of(dict(unique_weights(state))))
