"""Checkpoints of the official MH-MoE repository become ours.

The source of the format is github.com/yushuiwx/MH-MoE; see ``files`` (reading), ``settings`` (settings to flags) and
``weights`` (names and orders of weights).
"""

import dataclasses
import shutil
from collections.abc import Mapping
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
from ...data.tensor_files import save_tensors
from ...models.architectures import architecture_options
from ...models.bases import fingerprint
from ...models.counts import blank_dictionary
from ...models.flags import moe_config
from ...models.language_model import build_language_model
from ...models.options import LanguageModelOptions
from .files import State, read_official
from .settings import check_settings, model_flags
from .weights import convert_decoder, moe_layers

_EXPERT_WEIGHT = ".experts.0.fc1.weight"
_FINGERPRINT = "decoder.vocabulary_fingerprint"


def import_official(
    checkpoint: Path, out: Path, *, routing: str, data: Path | None = None, layers_only: bool = False,
    overwrite: bool = False,
) -> list[str]:  # fmt: skip
    """Read, convert, check and write ``model.pt``, or only its MoE layers into ``moe_layers.pt``.

    Args:
        checkpoint: a whole one, or one of its files of a training on several ranks.
        out: the folder to write to.
        routing: ``capacity`` or ``dropless``.
        data: folder with the model's ``dict.txt``, which is copied beside the model.
        layers_only: write ``{layer: {config, state}}`` for ``MHMoELayer`` in plain PyTorch.
        overwrite: replace files that are in ``out``.

    Returns:
        what was written, and how to train on.

    Raises:
        UserError: naming the file and what is wrong, before anything is written.
    """
    refuse_path_separator(out, "--out")
    path = out / ("moe_layers.pt" if layers_only else "model.pt")
    if path.exists() and path.samefile(checkpoint):
        raise UserError(f"--out {out}: {path.name} in it is the checkpoint to import, and would be replaced")
    copies = {} if data is None or layers_only else _copies(data, out)
    for target in (path, *copies):
        if target.exists() and not overwrite:
            raise UserError(f"{target} exists: give --overwrite to replace it")
    official, settings = read_official(checkpoint)
    check_settings(settings, official)
    if layers_only:
        layers = convert_layers(official, settings, routing)
        save_tensors({index: {"config": config, "state": state} for index, (config, state) in layers.items()}, path)
        return [f"{path}: {len(layers)} MoE layers, {_count(*(state for _, state in layers.values())):,} parameters"]
    dictionary = None if data is None else load_dictionary(data, official)
    converted = convert_checkpoint(official, settings, routing, dictionary)
    out.mkdir(parents=True, exist_ok=True)
    for target, source in copies.items():
        with atomic_path(target) as copied:
            shutil.copyfile(source, copied)
    save_tensors(converted, path)
    model = converted["cfg"]["model"]
    return [
        f"{path}: {_count(converted['model']):,} parameters, {model['decoder_layers']} layers, {describe(model)}",
        f"to train on: fairseq-train ... --finetune-from-model {path} {command_line(model)}",
    ]


def _copies(data: Path, out: Path) -> dict[Path, Path]:
    """Where to copy the dictionary's files; none that is there already, byte by byte."""
    files = {out / name: data / name for name in ("dict.txt", "sentencepiece.model") if (data / name).is_file()}
    return {
        target: source
        for target, source in files.items()
        if not target.is_file() or target.read_bytes() != source.read_bytes()
    }


def convert_layers(
    official: State, settings: Mapping[str, Any], routing: str
) -> dict[int, tuple[dict[str, Any], dict[str, Tensor]]]:
    """The fields of ``MHMoEConfig`` and the state of ``MHMoELayer``, by index of the decoder layer.

    Raises:
        UserError: if there is no MoE layer, or one that cannot be mapped.
    """
    states = moe_layers(official)
    config = moe_config(_options(official, settings, routing))
    if not states or config is None:
        raise UserError("there is no MoE layer in the checkpoint")
    return {index: (dataclasses.asdict(config), state) for index, state in states.items()}


def convert_checkpoint(
    official: State, settings: Mapping[str, Any], routing: str, dictionary: Dictionary | None
) -> dict[str, Any]:
    """A checkpoint that fairseq and ``from_pretrained`` load.

    Args:
        official: weights, experts numbered through.
        settings: stored model settings, checked.
        routing: ``capacity`` or ``dropless``.
        dictionary: of the model; without it any dictionary of the right size will be accepted later.

    Raises:
        UserError: naming weights without a counterpart, or missing, or of another shape than the settings say.
    """
    options = _options(official, settings, routing)
    state = convert_decoder(official, rotary_heads=options.decoder_attention_heads if options.rotary_embed else None)
    if not options.no_share_decoder_input_output_embed:  # one tensor, stored once
        state["decoder.output_projection.weight"] = state["decoder.embed_tokens.weight"]
    with torch.device("meta"):
        model = build_language_model(options, dictionary or blank_dictionary(len(state["decoder.embed_tokens.weight"])))
    check_fit(state, {name: value for name, value in model.state_dict().items() if name != _FINGERPRINT})
    if dictionary is not None:
        state[_FINGERPRINT] = torch.tensor(fingerprint(dictionary))
    return {
        "args": None,
        "cfg": stored_config(options),
        "model": state,
        "optimizer_history": [
            {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {"best": None}, "num_updates": 0}
        ],
        "task_state": {},
        "extra_state": {"epoch": 0},
    }


def check_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ``UserError`` unless names and shapes agree: then the settings are those of the weights."""
    wrong = [f"{name} is missing" for name in expected.keys() - state.keys()]
    wrong += [f"{name} is not expected" for name in state.keys() - expected.keys()]
    wrong += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise UserError(f"the weights do not fit the stored settings: {'; '.join(sorted(wrong)[:6])}{more}")


def stored_config(options: Any) -> dict[str, Any]:
    """fairseq's configuration as plain data, with our model, task and criterion in it."""
    config: Any = OmegaConf.to_container(OmegaConf.structured(FairseqConfig()), enum_to_str=True)
    model = {name: _plain(value) for name, value in vars(options).items()}
    config["model"] = model
    config["task"] = {
        "_name": "mhmoe_language_modeling",
        "data": "",
        "tokens_per_sample": model["tokens_per_sample"],
        "max_target_positions": model["max_target_positions"],
    }
    config["criterion"] = {"_name": "moe_cross_entropy"}
    return config


def load_dictionary(data: Path, official: State) -> Dictionary:
    """The dictionary in ``data``.

    Raises:
        UserError: if it has another size than the embedding.
    """
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


def describe(model: Mapping[str, Any]) -> str:
    """The MoE layers in words."""
    if not model["moe_freq"]:
        return "dense"
    return (
        f"every {model['moe_freq']}. one with {model['moe_expert_count']} experts of {model['moe_ffn_dim']}, "
        f"top-{model['moe_top_k']}, {model['mhmoe_heads_number']} heads, {model['mhmoe_routing']} routing"
    )


def command_line(model: Mapping[str, Any]) -> str:
    """The stored model settings as flags of ``fairseq-train``."""
    words = [f"--arch {model['_name']}"]
    for field in dataclasses.fields(LanguageModelOptions):
        value = model[field.name]
        if value is not None and value is not False and field.metadata.get("help"):
            words.append(flag(field.name) + ("" if value is True else f" {value}"))
    return " ".join(words)


def _options(official: State, settings: Mapping[str, Any], routing: str) -> Any:
    widths = {len(value) for name, value in official.items() if name.endswith(_EXPERT_WEIGHT)}
    if len(widths) > 1:
        raise UserError(f"experts of different widths, {sorted(widths)}, cannot be imported")
    width = widths.pop() if widths else None
    arch, flags = model_flags(settings, official, expert_ffn_dim=width, routing=routing)
    options = architecture_options(arch, **flags)
    options._name = arch
    return options


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _count(*states: Mapping[str, Tensor]) -> int:
    """Parameters, those that two names share counted once."""
    weights = {
        value.data_ptr(): value.numel() for state in states for value in state.values() if value.is_floating_point()
    }
    return sum(weights.values())
