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
pipeline_tag: text-generation
tags: [mixture-of-experts, mhmoe, fairseq]
---
# {name}

{kind}, trained with fairseq and mhmoe_fairseq: {parameters:,} parameters in {layers} layers of width {width}, at most
{positions:,} tokens.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
output = model.generate(**tokenizer("A text", return_tensors="pt"), max_new_tokens=20)
```

The model's code is the two Python files in this folder; they need transformers 5.10 or later and nothing else.

## Data
{data}

## Measured
{measured}

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
    heads, task = config.get("mhmoe_heads", 1), config["fairseq"]["task"]
    experts = f"{config.get('mhmoe_experts')} experts, {config.get('mhmoe_top_k')} for each "
    experts += f"of a token's {heads} sub-tokens" if heads > 1 else "token"
    kind = f"A language model with {experts}," if config["mhmoe_freq"] else "A dense language model,"
    table = markdown_table(["metric", "value", "unit", "split", "data"], measured) if measured else "Nothing yet."
    start = "<s>" if task.get("add_bos_token") else "</s>"
    language = "- Every text began with its language's symbol in training: `__de__A text`, without special tokens.\n"
    text = _CARD.format(
        name=config["fairseq"]["model"]["_name"], kind=kind.removesuffix(","), parameters=parameters,
        layers=config["num_hidden_layers"], width=config["hidden_size"], positions=config["max_position_embeddings"],
        data=_describe_data(data), balance=config["mhmoe_balance_weight"], start=start, measured=table,
        language=language if task.get("mhmoe_language_token") else "",
    )  # fmt: skip
    with atomic_open(path) as stream:
        stream.write(text.encode())


def _describe_data(folder: Path) -> str:
    manifest = read_manifest(folder)
    if "source" not in manifest or "files" not in manifest:
        return "Unknown: there is no manifest of `mhmoe prepare` beside the dictionary."
    identity = identify_manifest(folder / MANIFEST)
    licence = manifest["source"].get("licence", "unknown")
    return f"{identity.source}; licence: {licence}; SHA-256 of dictionary and splits: `{identity.digest}`."
