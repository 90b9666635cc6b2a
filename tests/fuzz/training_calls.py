"""A valid ``fairseq-train`` of one update for every task of ours, and the flags that it adds to fairseq's."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from console import USER_DIR
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import MODEL_DATACLASS_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from fairseq_cli import train
from fine_tuning_data import TASKS, fine_tuning_words
from images_and_words import training_words as pretraining_words
from labelled import training_words as classification_words
from options import Option, options_of

from mhmoe_fairseq.commands.main import refuse_in_one_line

_ENDS = ("--disable-validation", "--no-save", "--max-update", "1")
_LANGUAGE_MODEL = (
    "--user-dir", str(USER_DIR), "--arch", "mhmoe_lm_tiny", "--decoder-layers", "2", "--decoder-embed-dim", "32",
    "--tokens-per-sample", "128", "--batch-size", "2", "--criterion", "moe_cross_entropy", "--optimizer", "mhmoe_adam",
    "--lr", "0.002", "--cpu", "--num-workers", "0", "--save-dir", "saved",
)  # fmt: skip


def fairseq_train(words: Sequence[str]) -> int:
    """The command as the interpreter runs it; its exit status."""
    sys.argv = ["fairseq-train", *words]
    refuse_in_one_line()  # the plugin's import does it in a process of its own
    try:
        train.cli_main()
    except Exception:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def training_calls(root: Path) -> dict[str, list[str]]:
    """The words of a training by task, on the fixtures of ``invocations``."""
    save = Path("saved")
    images = root / "images"
    captioning = ("--task", "mhmoe_captioning", "--criterion", "mhmoe_captioning", "--batch-size", 6)
    calls = {
        "mhmoe_language_modeling": [root / "english", "--task", "mhmoe_language_modeling", *_LANGUAGE_MODEL],
        "mhmoe_multilingual_language_modeling": [
            root / "languages", "--task", "mhmoe_multilingual_language_modeling", *_LANGUAGE_MODEL,
        ],
        "mhmoe_sentence_classification": classification_words(root / "labelled" / "data", save, updates=1),
        "mhmoe_masked_multimodal": pretraining_words(images, save, updates=1),
        "mhmoe_captioning": pretraining_words(root / "shapes", save, *captioning, updates=1),
        **{task: fine_tuning_words(task, images, save, updates=1) for task in TASKS},
    }  # fmt: skip
    return {task: [str(word) for word in (*words, *_ENDS)] for task, words in calls.items()}


def training_options(task: str, words: Sequence[str]) -> list[Option]:
    """The flags of ours that a training takes: of its task, criterion, optimizer and, in pre-training, model."""
    named = {
        flag: words[len(words) - 1 - list(reversed(words)).index(flag) + 1] for flag in ("--criterion", "--optimizer")
    }
    kinds = [TASK_DATACLASS_REGISTRY[task], REGISTRIES["criterion"]["dataclass_registry"][named["--criterion"]]]
    if task in ("mhmoe_language_modeling", "mhmoe_masked_multimodal"):
        kinds += [
            MODEL_DATACLASS_REGISTRY["mhmoe_lm" if task == "mhmoe_language_modeling" else "mhmoe_beit3"],
            REGISTRIES["optimizer"]["dataclass_registry"][named["--optimizer"]],
        ]
    found: dict[str, Option] = {}
    for kind in kinds:
        parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
        gen_parser_from_dataclass(parser, kind())
        own = {
            name for base in kind.__mro__ if base.__module__.startswith("mhmoe_fairseq")
            for name in base.__dict__.get("__annotations__", {})
        }  # fmt: skip
        names = {f"--{name.replace('_', '-')}" for name in own}
        found.update({option.name: option for option in options_of(parser) if option.name in names})
    return list(found.values())
