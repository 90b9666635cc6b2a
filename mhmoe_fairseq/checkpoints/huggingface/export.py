"""``mhmoe checkpoint export``: a trained model as a folder for ``transformers``, and a language model back."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from fairseq.data import Dictionary
from torch import Tensor

from ...common.errors import UserError
from ...common.files import atomic_folder, atomic_path, read_json, refuse_path_separator, write_json
from ...data.vocabularies import NUM_SPECIALS, dictionary_files, find_vocabulary
from ...models.architectures import stored_options
from ...models.bases import fingerprint
from ...models.flags import decoder_settings, encoder_settings
from ...models.language_model import find_checkpoint, find_data
from ...torchscale_ext.settings import DecoderSettings
from ..files import read_trained, write_checkpoint
from ..official.importing import FINGERPRINT, expected_tensors, stored_checkpoint
from ..open import read_settings
from ..summary import different_shapes, parameters_of, weights_of
from .beit3 import describe_encoder, describe_images, export_encoder_weights, head_of, label_names
from .card import write_card
from .mapping import describe_model, export_weights, import_weights
from .tokenizer import build_tokenizer, require_packages

FORMATS = ("hf", "fairseq")
REMOTE = Path(__file__).parent / "remote"
_CONFIG, _INDEX, _WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
# Of config.json what a training there may choose anew: no weight means another thing by it.
_OF_TRAINING = (
    "dropout", "attention_dropout", "activation_dropout",
    "mhmoe_balance", "mhmoe_balance_scope", "mhmoe_balance_weight",
)  # fmt: skip
_AUTO = {"AutoConfig": "configuration_mhmoe.MHMoEConfig", "AutoModel": "modeling_mhmoe.MHMoEModel"}


class _Contents(NamedTuple):
    """What a kind of model puts into its folder.

    Attributes:
        ends: the symbols that begin and end every text; empty for none.
        files: further JSON files by name.
        code: files of ``remote/``.
        left_out: parts of the checkpoint that are not exported.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    ends: tuple[str, str]
    files: dict[str, dict[str, Any]]
    code: str
    left_out: list[str]


def export_model(
    checkpoint: Path, out: Path, *, data: Path | None = None, shard_bytes: int = 5 * 10**9,
    measured: Sequence[Sequence[str]] = (),
) -> list[str]:  # fmt: skip
    """Write a folder that transformers' ``from_pretrained(out, trust_remote_code=True)`` opens.

    Args:
        checkpoint: of a language model or BEiT-3; a file, or the folder that holds one.
        out: a folder that is not there or empty; on an error it stays so.
        data: the folder with dict.txt and the vocabulary (default: the checkpoint's own, or its training data).
        shard_bytes: most bytes of weights in one file.
        measured: rows of the model card: metric, value, unit, data, digest.

    Returns:
        what was written.

    Raises:
        UserError: naming what is wrong or cannot be exported, before anything is written.
    """
    require_packages()
    _require_empty(out)
    file = find_checkpoint(checkpoint, None)
    trained, stored = read_trained(file), read_settings(file)
    options, task = stored_options(stored["model"]), _plain(stored["task"], "data")
    if str(options.mhmoe_quantize or "none") != "none":
        raise UserError(
            f"{file}: --mhmoe-quantize ({options.mhmoe_quantize}): 1.58-bit models are not exported, since the code "
            "there multiplies by weights as they are; mhmoe checkpoint pack makes a small file of one"
        )
    folder, dictionary = _open_dictionary(file, data)
    weights = weights_of(trained, file)
    is_encoder = "encoder_layers" in stored["model"]
    _check_dictionary(weights, dictionary, folder, is_encoder)
    contents = (_beit3 if is_encoder else _language_model)(options, dictionary, weights, {**trained, "cfg": stored})
    own = {"model": _plain(vars(options)), "task": task}
    symbols = {"bos_token_id": contents.ends[0], "eos_token_id": "</s>", "pad_token_id": "<pad>"}
    ids = {name: dictionary.index(symbol) for name, symbol in symbols.items()}
    config = {"dtype": "float32", **ids, **contents.config, "fairseq": own}
    tokenizer = build_tokenizer(dictionary, folder, *contents.ends)
    count = sum(value.numel() for _, value in parameters_of(contents.weights))
    with atomic_folder(out) as target:
        for name, content in {_CONFIG: config, **contents.files}.items():
            write_json(target / name, content)
        if not is_encoder:
            write_json(target / "generation_config.json", ids)
        tokenizer.save(str(target / "tokenizer.json"))
        length, side = config["max_position_embeddings"], "right" if is_encoder else "left"
        write_json(target / "tokenizer_config.json", _tokenizer_config(contents.ends[0], length, side))
        files = _write_weights(contents.weights, target, shard_bytes)
        for source in (*REMOTE.glob(contents.code), *dictionary_files(folder)):
            shutil.copyfile(source, target / source.name)
        write_card(target / "README.md", config, folder, count, measured)
    loader = list(config["auto_map"])[-1]
    return [
        f"{out}: {count:,} parameters in {files} file{'s'[: files > 1]}, tokenizer of {len(dictionary):,} symbols",
        *([f"left out: {', '.join(contents.left_out)}"] if contents.left_out else []),
        f"to open: {loader}.from_pretrained({str(out)!r}, trust_remote_code=True)",
    ]


def _language_model(
    options: Any, dictionary: Dictionary, weights: Mapping[str, Tensor], trained: Mapping[str, Any]
) -> _Contents:
    settings = decoder_settings(options, len(dictionary))
    config = {
        "model_type": "mhmoe_lm", "architectures": ["MHMoEForCausalLM"],
        "auto_map": {**_AUTO, "AutoModelForCausalLM": "modeling_mhmoe.MHMoEForCausalLM"},
        **describe_model(options, settings, _balance_weight(trained["cfg"].get("criterion") or {}, settings)),
    }  # fmt: skip
    start = "<s>" if trained["cfg"]["task"].get("add_bos_token") else "</s>"
    heads = sorted({".".join(name.split(".")[:2]) for name in weights if name.startswith("classification_heads.")})
    return _Contents(config, export_weights(weights, settings), (start, ""), {}, "*_mhmoe.py", heads)


def _balance_weight(criterion: Mapping[str, Any], settings: DecoderSettings) -> float:
    """Of the mean over the layers with experts, which the code there takes; a training may have added them up."""
    is_sum = str(criterion.get("moe_gate_loss_combine_method")) == "sum" and settings.moe is not None
    layers = settings.decoder_layers // settings.moe_freq if is_sum else 1
    return criterion.get("moe_gate_loss_wt", 0.01) * layers


def _beit3(
    options: Any, dictionary: Dictionary, weights: Mapping[str, Tensor], trained: Mapping[str, Any]
) -> _Contents:
    settings, head = encoder_settings(options, len(dictionary)), head_of(weights)
    exported, left_out = export_encoder_weights(weights, settings, head)
    classes = (trained.get("task_state") or {}).get("classes")
    config = describe_encoder(options, settings, head, label_names(exported, classes))
    files = {"preprocessor_config.json": describe_images(settings.img_size, trained["cfg"]["task"])}
    return _Contents(config, exported, ("<s>", "</s>"), files, "*.py", left_out)


def import_folder(source: Path, out: Path) -> list[str]:
    """Write model.pt, dict.txt and the vocabulary of an exported folder, which may have been trained further.

    Raises:
        UserError: naming the file and what is wrong, before anything is written.
    """
    _require_empty(out)
    refuse_path_separator(out, "output")
    config = _read_config(source / _CONFIG)
    try:
        options = stored_options(config["fairseq"]["model"])
        task = {**config["fairseq"]["task"], "data": ""}
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{source / _CONFIG}: no fairseq settings in it: mhmoe checkpoint export did not write it"
        ) from error
    if not (source / "dict.txt").is_file():
        raise UserError(f"{source}: no dict.txt in it: copy it from the folder that mhmoe checkpoint export wrote")
    dictionary = Dictionary.load(str(source / "dict.txt"))
    find_vocabulary(source, dictionary.symbols[NUM_SPECIALS:])
    settings = decoder_settings(options, len(dictionary))
    for name, value in describe_model(options, settings, 0.0).items():
        if name in config and config[name] != value and name not in _OF_TRAINING:
            rule = f"the fairseq settings in it say {value!r}"
            raise UserError(f"{source / _CONFIG}: {name} ({config[name]!r}) contradicts its own settings: {rule}")
    expected = expected_tensors(options, dictionary)
    state = import_weights(_read_weights(source), expected, settings)
    wrong = [f"{name} is {one}, not {other}" for name, one, other in different_shapes(state, expected)]
    if wrong:
        raise UserError(f"{source}: the weights do not fit {_CONFIG}: {'; '.join(wrong[:3])}")
    state[FINGERPRINT] = torch.tensor(fingerprint(dictionary))
    with atomic_folder(out) as target:
        criterion = {"moe_gate_loss_wt": config.get("mhmoe_balance_weight", 0.01)}
        write_checkpoint(stored_checkpoint(state, options, task, criterion), target / "model.pt", overwrite=False)
        for file in dictionary_files(source):
            shutil.copyfile(file, target / file.name)
    return [f"{out / 'model.pt'}: opens as the model that was exported; mhmoe evaluate needs its data, --data"]


# ---------------------------------------------------------------------- settings


def _plain(stored: Mapping[str, Any], *without: str) -> dict[str, Any]:
    """What is given of stored settings, as JSON has it, but for paths and what fairseq copies from other sections."""
    return {
        str(name): value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in stored.items()
        if not (name in without or value is None or isinstance(value, (dict, list, tuple)) or os.sep in str(value))
    }


def _open_dictionary(file: Path, data: Path | None) -> tuple[Path, Dictionary]:
    try:
        folder = find_data(file, None if data is None else str(data))
    except FileNotFoundError as error:
        raise UserError(f"{str(error).partition(':')[0]}: name the folder of the model's dictionary, --data") from error
    return folder, Dictionary.load(str(folder / "dict.txt"))


def _check_dictionary(weights: Mapping[str, Tensor], dictionary: Dictionary, folder: Path, is_encoder: bool) -> None:
    embedding, mark = "decoder.embed_tokens", FINGERPRINT
    if is_encoder:
        embedding, mark = "beit3.text_embed", "vocabulary_fingerprint"
    rows, stored = len(weights[f"{embedding}.weight"]), weights.get(mark)
    if rows != len(dictionary) or (stored is not None and stored.tolist() != fingerprint(dictionary)):
        raise UserError(
            f"{folder / 'dict.txt'} ({len(dictionary):,} words) is not the checkpoint's dictionary ({rows:,} words)"
        )


def _tokenizer_config(start: str, max_length: int, side: str) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": start, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
        "model_max_length": max_length, "padding_side": side, "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path.parent}: no {path.name} in it: it is no folder of mhmoe checkpoint export")
    config = read_json(path)
    if isinstance(config, dict) and config.get("model_type") == "mhmoe_beit3":
        raise UserError(f"{path.parent} is BEiT-3: only language models come back; keep its checkpoint")
    if not isinstance(config, dict) or config.get("model_type") != "mhmoe_lm":
        raise UserError(f"{path}: model_type must be mhmoe_lm")
    return config


# ---------------------------------------------------------------------- files


def _require_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder: name one that is, or that does not exist")


def _write_weights(weights: Mapping[str, Tensor], folder: Path, shard_bytes: int) -> int:
    """Write the files of weights and, of several, their index; returns how many."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, value in weights.items():
        if shards[-1] and sum(one.nbytes for one in shards[-1].values()) + value.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = value
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [_WEIGHTS]
    for name, shard in zip(names, shards):
        with atomic_path(folder / name) as temporary:
            safetensors.torch.save_file(shard, temporary, {"format": "pt"})
    if len(shards) > 1:
        total = sum(value.nbytes for value in weights.values())
        files = {weight: name for name, shard in zip(names, shards) for weight in shard}
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    return len(shards)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    names = [_WEIGHTS]
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX)
        found = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(found, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in found.values()
        ):
            raise UserError(f"{folder / _INDEX}: no index of safetensors files")
        names = sorted(set(found.values()))
    weights: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name} in it")
        try:
            weights |= safetensors.torch.load_file(folder / name)
        except safetensors.SafetensorError as error:
            raise UserError(f"{folder / name}: no readable weights ({error})") from error
    return weights
