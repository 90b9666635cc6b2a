"""The README.md of an exported folder: the model, its data, what was measured, and how to measure again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...common.files import atomic_open
from ...common.tables import markdown_table
from ...data.identity import MANIFEST, identify_manifest, read_manifest

_CARD = """\
---
library_name: transformers
pipeline_tag: {pipeline}
tags: [mixture-of-experts, mhmoe, fairseq]
---
# {name}

{kind}, trained with fairseq and mhmoe_fairseq: {parameters:,} parameters in {layers} layers of width {width}, at most
{positions:,} tokens.

```python
{use}
```

The model's code is the Python files in this folder; they need transformers 5.10 or later{pillow} and nothing else.

## Data
{data}

## Measured
{measured}

{remarks}"""
_TEXT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
output = model.generate(**tokenizer("A text", return_tensors="pt"), max_new_tokens=20)"""
_OF_TEXT = """\
## Evaluating
Every text begins with `{start}`, which the tokenizer adds; a line ends with `</s>`.
- Tasks of choices: `lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True --tasks ...`
- Perplexity (rolling log-likelihood): add `add_bos_token=False`, or lm-eval puts a second `{start}` in front of a text.

## What differs
- Generation stops at `</s>`, the end of a line.
- Symbols of the vocabulary that are spelled out in a text (`</s>`, `<s>`, `<pad>`, `<unk>`) are read as such.
- The norm inside experts, if the model has one, is part of their output maps: logits agree to rounding.
- `output_router_logits=True` gives `aux_loss`, the mean balance loss of the MoE layers, and adds it to the loss with
  weight {balance}; training elsewhere has no z-loss.
- With `--format fairseq`, `mhmoe checkpoint export` makes a checkpoint of fairseq of this folder again.
{language}"""
_LANGUAGE = "- Every text began with its language's symbol in training: `__de__A text`, without special tokens.\n"
_OF_IMAGES = """\
## What differs
- Symbols of the vocabulary that are spelled out in a text (`</s>`, `<s>`, `<pad>`, `<unk>`) are read as such.
- The norm inside experts, if the model has one, is part of their output maps: logits agree to rounding.
- Training elsewhere has neither balance loss, z-loss nor stochastic depth.
"""
_USES = {
    "AutoModel": """\
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
images = AutoImageProcessor.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
features = model(**images(IMAGE), **tokenizer("A text", return_tensors="pt")).last_hidden_state""",
    "AutoModelForImageClassification": """\
from transformers import pipeline
classify = pipeline("image-classification", FOLDER, trust_remote_code=True)
classify(IMAGE)  # a file, or an image of Pillow's""",
    "AutoModelForVisualQuestionAnswering": """\
from transformers import pipeline
answer = pipeline("visual-question-answering", FOLDER, trust_remote_code=True)
answer(IMAGE, "What colour is it?")""",
}
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation", "AutoModel": "feature-extraction",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForVisualQuestionAnswering": "visual-question-answering",
}  # fmt: skip


def write_card(
    path: Path,
    config: Mapping[str, Any],
    data: Path,
    parameters: int,
    measured: Sequence[Sequence[str]],
) -> None:
    """Write the card.

    Args:
        config: what config.json holds.
        data: the folder of the dictionary, whose manifest tells source, licence and digest.
        measured: rows of metric, value, unit, data, digest.
    """
    loader, task = list(config["auto_map"])[-1], config["fairseq"]["task"]
    is_text = loader == "AutoModelForCausalLM"
    language = _LANGUAGE if task.get("mhmoe_language_token") else ""
    start = "<s>" if task.get("add_bos_token") else "</s>"
    text = _CARD.format(
        pipeline=_PIPELINES[loader], name=config["fairseq"]["model"]["_name"], kind=_kind(config, is_text),
        parameters=parameters, layers=config["num_hidden_layers"], width=config["hidden_size"],
        positions=config["max_position_embeddings"], use=_TEXT if is_text else _USES[loader],
        pillow="" if is_text else ", Pillow", data=_describe_data(data),
        measured=markdown_table(["metric", "value", "unit", "split", "data"], measured) if measured else "Nothing yet.",
        remarks=_OF_TEXT.format(balance=config["mhmoe_balance_weight"], start=start, language=language)
        if is_text
        else _OF_IMAGES,
    )  # fmt: skip
    with atomic_open(path) as stream:
        stream.write(text.encode())


def _kind(config: Mapping[str, Any], is_text: bool) -> str:
    heads, what = config.get("mhmoe_heads", 1), "language model" if is_text else "BEiT-3 encoder of images and texts"
    number = f"{config.get('mhmoe_top_k')}{' on average' if config.get('mhmoe_gate_score') == 'relu' else ''}"
    experts = f"{config.get('mhmoe_experts')} experts, {number} for each "
    experts += f"of a token's {heads} sub-tokens" if heads > 1 else "token"
    return f"A {what} with {experts}" if config["mhmoe_freq"] else f"A dense {what}"


def _describe_data(folder: Path) -> str:
    manifest = read_manifest(folder)
    if "source" not in manifest or "files" not in manifest:
        return "Unknown: there is no manifest of `mhmoe prepare` beside the dictionary."
    identity = identify_manifest(folder / MANIFEST)
    licence = manifest["source"].get("licence", "unknown")
    return f"{identity.source}; licence: {licence}; SHA-256 of dictionary and splits: `{identity.digest}`."
