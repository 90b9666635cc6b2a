"""Whole language models, each with its data, criterion and Adam, built from the flags a user would type."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.optim import build_optimizer
from torch import Tensor

import mhmoe_fairseq  # noqa: F401  (registers models, tasks and criterions)
from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer

SEED = 1
REFERENCE = "xmoe"
NAMES = {
    "dense": "dense",
    "xmoe": "X-MoE",
    "mhmoe-params": "MH-MoE, budget params",
    "mhmoe-flops": "MH-MoE, budget flops",
}


@dataclass(frozen=True)
class TrainingSetting:
    """What all four models share.

    Args:
        size: suffix of the architectures: ``"tiny"``, ``"small"`` or ``"base"`` (12 x 768).
        num_experts: experts of X-MoE, and of the reference that MH-MoE's budget is taken from.
        num_heads: MH-MoE heads.
        top_k: experts per token and per sub-token.
        sentences: samples per update.
        tokens_per_sample: tokens of a sample.
        vocab_size: symbols of the synthetic dictionary, fairseq's four special ones not counted.
        precision: ``--mhmoe-precision``.
        data: a prepared folder; None for synthetic tokens.
    """

    size: str = "base"
    num_experts: int = 8
    num_heads: int = 4
    top_k: int = 2
    sentences: int = 4
    tokens_per_sample: int = 512
    vocab_size: int = 8000
    precision: str = "fp32"
    data: str | None = None

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> TrainingSetting:
        """From a benchmark's command line; one without ``--data`` has synthetic tokens."""
        return cls(
            size=args.size,
            num_experts=args.experts,
            num_heads=args.heads,
            top_k=args.top_k,
            sentences=args.sentences,
            tokens_per_sample=args.tokens_per_sample,
            vocab_size=args.vocab,
            precision=args.precision,
            data=getattr(args, "data", None),
        )

    @property
    def tokens(self) -> int:
        """Tokens per update."""
        return self.sentences * self.tokens_per_sample

    def flags(self, name: str) -> list[str]:
        """The flags of one model, without data folder.

        Raises:
            ValueError: the name is unknown.
        """
        if name not in NAMES:
            raise ValueError(f"model ({name}) must be one of {', '.join(NAMES)}")
        family = name.split("-")[0]
        flags = ["--arch", f"{family}_lm_{self.size}", "--mhmoe-precision", self.precision]
        if family != "dense":
            flags += ["--moe-expert-count", str(self.num_experts), "--moe-top-k", str(self.top_k)]
        if family == "mhmoe":
            flags += ["--mhmoe-heads-number", str(self.num_heads), "--mhmoe-budget", name.split("-")[1]]
        return flags

    def common_flags(self) -> list[str]:
        """Task, criterion and optimiser: the same for every model."""
        return [
            *("--task", "mhmoe_language_modeling", "--criterion", "moe_cross_entropy"),
            *("--tokens-per-sample", str(self.tokens_per_sample), "--sample-break-mode", "none"),
            *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--lr", "5e-4", "--clip-norm", "0"),
            *("--batch-size", str(self.sentences), "--required-batch-size-multiple", "1", "--cpu"),
        ]


class Training:
    """A model in training; a call is one update: forward, backward, Adam step."""

    def __init__(self, name: str, setting: TrainingSetting) -> None:
        torch.manual_seed(SEED)
        with tempfile.TemporaryDirectory() as folder:
            data = setting.data or dictionary_folder(Path(folder), setting.vocab_size)
            argv = [str(data), *setting.common_flags(), *setting.flags(name)]
            args = options.parse_args_and_arch(options.get_training_parser(), input_args=argv)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # fairseq composes with hydra's older calls
                config = convert_namespace_to_omegaconf(args)
            task = tasks.setup_task(config.task)
        self.model = task.build_model(config.model).train()
        self.criterion = task.build_criterion(config.criterion).train()
        self.optimizer = build_optimizer(config.optimizer, list(self.model.parameters()))
        self.batches = _real_batches(task, setting) if setting.data else synthetic_batches(task.dictionary, setting)

    def __call__(self) -> None:
        batch = next(self.batches)
        self.clear()
        loss, sample_size, _ = self.criterion(self.model, batch)
        self.optimizer.backward(loss)
        self.optimizer.multiply_grads(1 / sample_size)
        self.optimizer.step()

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()

    def tensors(self) -> list[Tensor]:
        """What stays from update to update: weights, buffers and, after the first one, Adam's state."""
        state = [value for values in self.optimizer.optimizer.state.values() for value in values.values()]
        kept = [value for value in state if isinstance(value, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *kept]

    def num_params(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def moe(self) -> MHMoEConfig | None:
        """The configuration of the MoE layers; None in a dense model."""
        layers = self._moe_layers()
        return layers[0].config if layers else None

    def num_moe_layers(self) -> int:
        return len(self._moe_layers())

    def _moe_layers(self) -> list[MHMoELayer]:
        return [module for module in self.model.modules() if isinstance(module, MHMoELayer)]


def dictionary_folder(folder: Path, vocab_size: int) -> Path:
    """A data folder with nothing but a dictionary of made-up words."""
    lines = [f"w{rank} {vocab_size - rank}\n" for rank in range(vocab_size)]
    (folder / "dict.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def synthetic_batches(dictionary: Any, setting: TrainingSetting) -> Iterator[dict]:
    """Tokens drawn by Zipf's law (probability 1 / (rank + 2.7)), as frequent and as rare as words in a text."""
    generator = torch.Generator().manual_seed(SEED)
    first = dictionary.nspecial
    weights = 1 / (torch.arange(len(dictionary) - first, dtype=torch.float64) + 2.7)
    shape = (setting.sentences, setting.tokens_per_sample + 1)
    while True:
        drawn = torch.multinomial(weights, shape[0] * shape[1], replacement=True, generator=generator)
        text = (drawn + first).view(shape)
        lengths = torch.full((setting.sentences,), setting.tokens_per_sample)
        yield {
            "net_input": {"src_tokens": text[:, :-1].contiguous(), "src_lengths": lengths},
            "target": text[:, 1:].contiguous(),
            "ntokens": setting.tokens,
            "nsentences": setting.sentences,
        }


def _real_batches(task: Any, setting: TrainingSetting) -> Iterator[dict]:
    """Full batches of the folder's training split, from the start again when they end.

    Raises:
        ValueError: the split has not one full batch.
    """
    task.load_dataset("train")
    batches = task.get_batch_iterator(
        task.dataset("train"), max_sentences=setting.sentences, required_batch_size_multiple=1, seed=SEED
    )
    full = [batch for batch in batches.next_epoch_itr(shuffle=True) if batch["ntokens"] == setting.tokens]
    if not full:
        raise ValueError(f"--data ({setting.data}) has not one batch of {setting.tokens} tokens in its training split")
    return cycle(full)
