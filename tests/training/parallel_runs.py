"""Trainings through ``fairseq-train`` on one or more ranks, and what they log and save."""

import json
import random
import re
from pathlib import Path
from typing import Any

import torch
from console import run_console
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from workers import TRAIN_FLAGS, Workers

import mhmoe_fairseq  # noqa: F401  (registers the task and the optimizer for configuration())

BATCHES = 96  # of an epoch: a multiple of all numbers of ranks, so that no rank runs out before the others
LINE_WORDS = 15  # and the end of the line make a sample
BATCH_LINES = 2
SIZES = (
    "--decoder-layers", "2", "--decoder-embed-dim", "32", "--decoder-attention-heads", "2",
    "--tokens-per-sample", str(LINE_WORDS + 1), "--batch-size", str(BATCH_LINES),
)  # fmt: skip
MODEL = (
    "--arch", "mhmoe_lm_tiny", *SIZES,
    "--moe-expert-count", "8", "--moe-ffn-dim", "16", "--mhmoe-heads-number", "2", "--moe-top-k", "2",
)  # fmt: skip
DENSE = ("--arch", "dense_lm_tiny", *SIZES, "--decoder-ffn-embed-dim", "32")
OPTIMIZATION = ("--optimizer", "mhmoe_adam", "--adam-betas", "(0.9,0.98)", "--lr", "0.003", "--clip-norm", "1.0")


def write_even_corpus(folder: Path, words: int = 40, batches: int = BATCHES) -> Path:
    """Binarised text with a simple grammar, whose training split is exactly ``batches`` batches; the data folder."""
    generator = random.Random(0)
    for split, lines in (("train", batches * BATCH_LINES), ("valid", 16), ("test", 16)):
        with open(folder / f"{split}.txt", "w") as file:
            for _ in range(lines):
                sentence = [generator.randrange(words)]
                while len(sentence) < LINE_WORDS:
                    sentence.append((sentence[-1] * 3 + generator.choice([1, 2])) % words)
                file.write(" ".join(f"w{word}" for word in sentence) + "\n")
    prefixes = [part for split in ("train", "valid", "test") for part in (f"--{split}pref", folder / f"{split}.txt")]
    run_console("fairseq-preprocess", "--only-source", *prefixes, "--destdir", folder / "data", cwd=folder)
    return folder / "data"


def configuration(*flags: str) -> Any:
    """fairseq's configuration of a training with ``mhmoe_adam`` under legacy_ddp, as the command line makes it."""
    words = ["data", "--task", "mhmoe_language_modeling", "--arch", "mhmoe_lm_tiny", "--batch-size", "1"]
    words += ["--optimizer", "mhmoe_adam", "--lr", "0.01", "--ddp-backend", "legacy_ddp", *flags]
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), words))


def train(ranks: int, data: Path, save_dir: Path, *flags: object, updates: int) -> list[dict[str, str]]:
    """Train to ``updates`` with a global batch of four micro-batches; what each update of this run logged."""
    return updates_in(train_logs(ranks, data, save_dir, *flags, updates=updates)[0])


def train_logs(
    ranks: int, data: Path, save_dir: Path, *flags: object, updates: int, model: tuple[str, ...] = MODEL
) -> list[str]:
    """The same, of any model; all that each rank wrote."""
    words = [data, *TRAIN_FLAGS, *model, *OPTIMIZATION, "--max-update", updates, "--save-dir", save_dir, *flags]
    if "--update-freq" not in flags:
        words += ["--update-freq", 4 // ranks]
    return Workers(ranks).fairseq("fairseq-train", *words, timeout=600)  # for machines with much to do


def updates_in(log: str) -> list[dict[str, str]]:
    """The figures of each update, as printed."""
    lines = re.findall(r"train_inner[ |:]+(\{.*\})", log)
    return [json.loads(line) for line in lines]


def figures(updates: list[dict[str, str]], *names: str) -> list[tuple[str, ...]]:
    return [tuple(update[name] for name in ("num_updates", *names)) for update in updates]


def saved(save_dir: Path, name: str = "checkpoint_last.pt") -> dict[str, Any]:
    return torch.load(save_dir / name, weights_only=True)
