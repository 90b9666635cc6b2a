"""``mhmoe import-official``: checkpoints of the official MH-MoE repository become ours.

The source of the format is github.com/yushuiwx/MH-MoE; see ``_official_files`` (reading), ``_official_settings``
(settings to flags) and ``_official_weights`` (names and orders of weights).
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf
from torch import Tensor

from ...common.arguments import existing_file, existing_folder, output_folder
from ...common.errors import UserError
from ...common.files import atomic_path, refuse_path_separator
from ...data.tensor_files import save_tensors
from ...models.architectures import architecture_options
from ...models.bases import fingerprint
from ...models.flags import moe_config
from ...models.language_model import build_language_model
from ...models.options import LanguageModelOptions
from .files import State, read_official
from .settings import check_settings, model_flags
from .weights import convert_decoder, moe_layers

_EXPERT_WEIGHT = ".experts.0.fc1.weight"
_FINGERPRINT = "decoder.vocabulary_fingerprint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``mhmoe import-official``."""
    parser.add_argument(
        "checkpoint", metavar="CKPT", type=existing_file,
        help="a whole checkpoint, or one of NAME-shared.pt, NAME-rank-0.pt, ...: all of them are then read",
    )  # fmt: skip
    parser.add_argument(
        "--out", required=True, metavar="DIR", type=output_folder, help="folder for model.pt or moe_layers.pt"
    )
    parser.add_argument(
        "--data", metavar="DIR", type=existing_folder,
        help="folder with the model's dict.txt (and sentencepiece.model), copied beside model.pt",
    )  # fmt: skip
    parser.add_argument(
        "--routing", choices=("capacity", "dropless"), default="capacity",
        help="capacity, what the model was trained with, or dropless, where results do not depend on the batch",
    )  # fmt: skip
    parser.add_argument(
        "--layers-only", action="store_true",
        help="write only the MoE layers, for MHMoELayer in plain PyTorch: moe_layers.pt, {layer: {config, state}}",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Reads, converts, checks and writes."""
    path = args.out / ("moe_layers.pt" if args.layers_only else "model.pt")
    refuse_path_separator(args.out, "--out")
    if path.exists() and path.samefile(args.checkpoint):
        raise UserError(f"--out {args.out}: {path.name} in it is the checkpoint to import, and would be replaced")
    official, settings = read_official(args.checkpoint)
    check_settings(settings, official)
    if args.layers_only:
        layers = convert_layers(official, settings, args.routing)
        save_tensors({index: {"config": config, "state": state} for index, (config, state) in layers.items()}, path)
        say(f"{path}: {len(layers)} MoE layers, {_count(*(state for _, state in layers.values())):,} parameters")
        return 0
    dictionary = None if args.data is None else load_dictionary(args.data, official)
    checkpoint = convert_checkpoint(official, settings, args.routing, dictionary)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("dict.txt", "sentencepiece.model"):
        if args.data is not None and (args.data / name).is_file():
            with atomic_path(args.out / name) as copied:
                shutil.copyfile(args.data / name, copied)
    save_tensors(checkpoint, path)
    model = checkpoint["cfg"]["model"]
    say(f"{path}: {_count(checkpoint['model']):,} parameters, {model['decoder_layers']} layers, {describe(model)}")
    say(f"to train on: fairseq-train ... --finetune-from-model {path} {command_line(model)}")
    return 0


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


def blank_dictionary(size: int) -> Dictionary:
    """A dictionary of ``size`` meaningless words."""
    dictionary = Dictionary()
    for number in range(size - len(dictionary)):
        dictionary.add_symbol(f"word{number}")
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
            words.append("--" + field.name.replace("_", "-") + ("" if value is True else f" {value}"))
    return " ".join(words)


def say(line: str) -> None:
    """One line for the user."""
    sys.stdout.write(line + "\n")


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
