"""Evaluate a checkpoint on a split: what is measured follows from the task that it was trained with."""

import dataclasses
import inspect
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.files import read_trained
from ..checkpoints.open import Opened
from ..common.errors import UserError
from ..common.files import sha256_of
from ..common.ranges import flag
from ..data.identity import read_manifest
from ..models.counts import count_built
from ..models.flags import context_of
from ..models.options import BEiT3Options, LanguageModelOptions
from .captions import evaluate_captions
from .expert_loads import LoadCounter
from .images import evaluate_images
from .perplexity import evaluate_masked, evaluate_text
from .records import Record, describe_origin
from .sentences import evaluate_sentences

# By the task's name. Their keyword arguments are the options of ``mhmoe evaluate`` that have a meaning for it.
EVALUATIONS: dict[str, Callable[..., Record]] = {
    "mhmoe_language_modeling": evaluate_text,
    "mhmoe_multilingual_language_modeling": evaluate_text,
    "mhmoe_masked_multimodal": evaluate_masked,
    "mhmoe_sentence_classification": evaluate_sentences,
    "mhmoe_vqa": evaluate_images,
    "mhmoe_nlvr2": evaluate_images,
    "mhmoe_image_classification": evaluate_images,
    "mhmoe_retrieval": evaluate_images,
    "mhmoe_captioning": evaluate_captions,
}
OVERRIDES = ("langs", "visual_tokenizer")  # options that change a setting of the task, where it has that setting


def split_options(settings: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options given apart: those that change the task's settings, and those of the evaluation.

    Args:
        settings: the configuration stored in the checkpoint.
        options: by name; None is not given.

    Raises:
        UserError: naming an option without a meaning for such a checkpoint, or a task that is not ours.
    """
    given = {name: value for name, value in options.items() if value is not None}
    overrides = {name: given.pop(name) for name in OVERRIDES if name in given and name in settings["task"]}
    task = settings["task"]["_name"]
    parameters = inspect.signature(_evaluation_of(task)).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for name in (name for name in given if name not in known):
        others = ", ".join(map(flag, known))
        raise UserError(f"{flag(name)}: has no meaning for a checkpoint of task {task}, whose options are {others}")
    return overrides, given


def evaluate(opened: Opened, split: str = "test", **options: Any) -> Record:
    """Evaluate a model in one pass over a split.

    Args:
        options: keyword arguments of the task's function in ``EVALUATIONS``.

    Returns:
        metrics, parts and expert loads, with what was measured, on what and with what. There are no metrics where the
        split has no labels.

    Raises:
        UserError, FileNotFoundError: as the task's function.
    """
    counter = LoadCounter(opened.layers)
    record = _evaluation_of(opened.task_name)(opened, split, counter, **options)
    data = {**evaluated_data(opened, record.split), **record.data}
    return with_origin(dataclasses.replace(record, experts=counter.loads, data=data), opened)


def evaluated_data(opened: Opened, split: str) -> dict[str, Any]:
    """Returns which data a record of a split is about."""
    identity = opened.identity
    kind = "image-text" if identity.has_images else "multilingual" if identity.languages else "text"
    return {
        "path": str(opened.data),
        "digest": identity.digest,
        "source": identity.source,
        "kind": read_manifest(opened.data).get("kind", kind),
        "languages": list(identity.languages),
        "split": split,
    }


def with_origin(record: Record, opened: Opened) -> Record:
    """The record with what was measured and what it was measured with: model, checkpoint, provenance."""
    checkpoint = describe_checkpoint(opened.file)
    provenance = describe_origin(str(opened.device), opened.precision)
    return dataclasses.replace(record, model=_describe_model(opened), checkpoint=checkpoint, provenance=provenance)


def _evaluation_of(task: str) -> Callable[..., Record]:
    if task not in EVALUATIONS:
        raise UserError(f"the checkpoint was trained with task {task}; known are {', '.join(EVALUATIONS)}")
    return EVALUATIONS[task]


def describe_checkpoint(file: Path) -> dict[str, Any]:
    """Return path, SHA-256, and how many updates it was trained for, None if it does not say."""
    history = read_trained(file).get("optimizer_history") or [{}]
    return {"path": str(file), "sha256": sha256_of(file), "updates": history[-1].get("num_updates")}


def _describe_model(opened: Opened) -> dict[str, Any]:
    """Architecture, the whole stored configuration, and what the model has and spends."""
    options = opened.settings["model"]
    kind = BEiT3Options if "encoder_layers" in options else LanguageModelOptions
    counts = count_built(opened.model, context_of(kind.from_namespace(Namespace(**options))))
    numbers = {name: value for name, value in vars(counts).items() if name not in ("moe", "non_expert")}
    if counts.moe is not None:
        numbers |= {"experts": counts.moe.total_experts, "top_k": counts.moe.top_k, "heads": counts.moe.num_heads}
        numbers["expert_width"] = counts.moe.expert_ffn_dim
    numbers = {"parameters": counts.total, **numbers}
    return {"arch": options.get("_name"), "settings": opened.settings, "counts": numbers}
