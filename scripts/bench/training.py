"""Whole language models in training: each contender in a process (or ranks) of its own that makes an update when asked.

The process builds what ``fairseq-train`` builds of the same flags, and steps fairseq's own ``Trainer``.
"""

import argparse
import itertools
import logging
import multiprocessing
import os
import socket
import time
import warnings
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from fairseq import distributed_utils, options, tasks, utils
from fairseq.data import Dictionary, indexed_dataset, iterators
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.trainer import Trainer

import mhmoe_fairseq
from mhmoe_fairseq.common.ranges import flag
from mhmoe_fairseq.models.architectures import SIZES, architecture_options
from mhmoe_fairseq.models.counts import ModelCounts, blank_dictionary, build_on_meta, context_of, count_built

from .console import add_numbers
from .memory import measure, status
from .timing import operator_times, seconds

SEED = 1
UPDATES = 8  # different batches; then the first comes again
FAMILIES = {
    "dense": "dense",
    "xmoe": "X-MoE",
    "mhmoe-params": "MH-MoE, budget params",
    "mhmoe-flops": "MH-MoE, budget flops",
    "stock": "fairseq's transformer_lm",
}
PRECISIONS, OPTIMIZERS = ("fp32", "bf16"), ("mhmoe_adam", "adam")


@dataclass(frozen=True)
class Contender:
    """What is trained and how: written ``FAMILY[:PRECISION][:OPTIMIZER][:RANKS]``."""

    family: str
    precision: str = "fp32"
    optimizer: str = "mhmoe_adam"
    ranks: int = 1

    @classmethod
    def parse(cls, text: str) -> "Contender":
        """Returns the contender of a text; ``ValueError`` for an unknown part."""
        family, *parts = text.split(":")
        if family not in FAMILIES:
            raise ValueError(f"{family} in {text} must be one of {', '.join(FAMILIES)}")
        fields: dict[str, Any] = {"optimizer": "adam"} if family == "stock" else {}
        for part in parts:
            name = "precision" if part in PRECISIONS else "optimizer" if part in OPTIMIZERS else "ranks"
            if name == "ranks" and not (part.isdigit() and int(part) > 0):
                known = ", ".join((*PRECISIONS, *OPTIMIZERS))
                raise ValueError(f"{part} in {text} must be one of {known}, or a number of ranks")
            fields[name] = int(part) if name == "ranks" else part
        if family == "stock" and fields.get("precision") == "bf16":
            raise ValueError(f"{text}: fairseq's own bf16 does not train on a CPU")
        return cls(family, **fields)

    def __str__(self) -> str:
        parts = [self.family, self.precision, *([self.optimizer] if self.optimizer == "adam" else [])]
        return ":".join([*parts, *([str(self.ranks)] if self.ranks > 1 else [])])


def add_model_arguments(parser: argparse.ArgumentParser, size: str) -> None:
    """The flags of a model's sizes."""
    parser.add_argument("--size", choices=list(SIZES), default=size, help="architecture (default: %(default)s)")
    add_numbers(parser, {
        "experts": (8, "X-MoE's experts"), "heads": (4, "MH-MoE heads"), "top-k": (2, "experts per sub-token"),
        "tokens-per-sample": (512, "most tokens of a sample"), "vocab": (8000, "synthetic words"),
    })  # fmt: skip


def model_options(family: str, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """Returns architecture and flags of a model of ours, by the names of their fields."""
    arch, _, budget = family.partition("-")
    flags = {"arch": f"{arch}_lm_{args.size}", "mhmoe_precision": precision}
    if arch != "dense":
        flags |= {"moe_expert_count": args.experts, "moe_top_k": args.top_k}
    if arch == "mhmoe":
        flags |= {"mhmoe_heads_number": args.heads, "mhmoe_budget": budget}
    return flags


def stock_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns stock fairseq's dense model, as wide between its maps as gives a token X-MoE's FLOPs."""
    dense, xmoe = (count(name, args, blank_dictionary(100)) for name in ("dense", "xmoe"))
    size = SIZES[args.size]
    more = (xmoe.flops_per_token - dense.flops_per_token) / (4 * size["layers"] * size["embed_dim"])
    return {
        "arch": "transformer_lm", "decoder_layers": size["layers"], "decoder_embed_dim": size["embed_dim"],
        "decoder_attention_heads": size["attention_heads"], "activation_fn": "gelu",
        "decoder_ffn_embed_dim": 16 * round((size["ffn_embed_dim"] + more) / 16),
    }  # fmt: skip


def count(family: str, args: argparse.Namespace, dictionary: Dictionary) -> ModelCounts:
    """Returns what ``fairseq-train`` would build of a family of ours."""
    options = architecture_options(**model_options(family, "fp32", args), tokens_per_sample=args.tokens_per_sample)
    return count_built(build_on_meta(options, dictionary), context_of(options))


def flags_of(contender: Contender, args: argparse.Namespace) -> list[str]:
    """Returns the flags of model, task, criterion and optimiser, and of the batch, which the ranks share."""
    if contender.family == "stock":
        chosen, task, more = stock_options(args), "language_modeling", ["--share-decoder-input-output-embed"]
        more += ["--decoder-normalize-before", "--criterion", "cross_entropy"]
    else:
        chosen, task = model_options(contender.family, contender.precision, args), "mhmoe_language_modeling"
        more = ["--criterion", "moe_cross_entropy"]
    together = ["--ddp-backend", "legacy_ddp", "--distributed-backend", "gloo"] if contender.ranks > 1 else []
    return [
        *(word for field, value in chosen.items() for word in (flag(field), str(value))),
        *("--task", task, *more, "--dropout", "0", "--tokens-per-sample", str(args.tokens_per_sample)),
        *("--sample-break-mode", "none", "--optimizer", contender.optimizer, "--adam-betas", "(0.9, 0.98)"),
        *("--lr", "5e-4", "--clip-norm", "0", "--batch-size", str(args.sentences // contender.ranks)),
        *("--required-batch-size-multiple", "1", "--cpu", *together),
    ]


class Training:
    """A contender in training, in processes of its own that wait until they are asked.

    Args:
        data: folder of a binarised training split.
        args: the flags of ``model.py``.
        threads: shared out among the contender's ranks.

    Raises:
        RuntimeError: here and from every method, if a process fails: what it said, in one line.
    """

    def __init__(self, contender: Contender, data: str, args: argparse.Namespace, threads: int) -> None:
        self.contender, self.clock = contender, args.clock
        words = [
            data, "--user-dir", str(Path(mhmoe_fairseq.__file__).parent), *flags_of(contender, args),
            "--seed", str(SEED), "--no-save", "--disable-validation", "--num-workers", "0", "--curriculum", "1",
            *([] if contender.ranks > 1 else ["--distributed-world-size", "1"]),
        ]  # fmt: skip
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fairseq.trainer", "torchscale.architecture.decoder"])
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(contender.ranks):
            ours, theirs = context.Pipe()
            environment = {"RANK": rank, "WORLD_SIZE": contender.ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
            process = context.Process(
                target=serve, args=(theirs, words, environment, threads // contender.ranks, args.clock), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self.first_loss = self._ask("update")[0][1]["loss"]

    def _ask(self, request: str) -> list[Any]:
        for pipe in self.pipes:
            pipe.send(request)
        try:
            replies = [pipe.recv() for pipe in self.pipes]
        except EOFError as error:
            raise RuntimeError(f"{self.contender}: a process of it has ended, perhaps for want of memory") from error
        for reply in replies:
            if isinstance(reply, str):
                raise RuntimeError(f"{self.contender}: {reply}")
        return replies

    def seconds(self) -> float:
        """Makes an update and returns its time: the slowest rank's, or the CPU time of all."""
        replies = self._ask("update")
        self.log = replies[0][1]
        times = [reply[0] for reply in replies]
        return sum(times) if self.clock is time.process_time else max(times)

    def peak(self) -> dict[str, float | None]:
        """Returns the first rank's peak memory of an update in MiB: ``tensors``, ``resident``, ``process``."""
        return self._ask("peak")[0]

    def operators(self) -> list[Any]:
        """Returns where the first rank's time goes in an update."""
        return self._ask("operators")[0]

    def close(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            process.terminate()
            process.join()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def serve(pipe: Connection, words: list[str], environment: dict[str, Any], threads: int, clock: Any) -> None:
    """What a contender's process does: builds its training, then answers requests; a text is an error."""
    torch.set_num_threads(threads)
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    try:
        if environment["WORLD_SIZE"] > 1:
            os.environ.update({name: str(value) for name, value in environment.items()})
        parser = options.get_training_parser()
        config = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, words))
        distributed_utils.call_main(config, partial(answer, pipe=pipe, clock=clock))
    except (Exception, SystemExit) as error:
        pipe.send(f"{type(error).__name__}: {error}")


def answer(config: Any, pipe: Connection, clock: Any) -> None:
    """Builds as ``fairseq_cli.train.main`` does, and answers every request of the pipe."""
    utils.import_user_module(config.common)
    utils.set_torch_seed(config.common.seed)
    task = tasks.setup_task(config.task)
    before = status("VmRSS")
    trainer = Trainer(config, task, task.build_model(config.model), task.build_criterion(config.criterion))
    epoch = trainer.get_train_iterator(epoch=1)
    trainer.begin_epoch(1)
    batches = itertools.cycle(list(iterators.GroupedIterator(epoch.next_epoch_itr(shuffle=False), 1)))

    def update() -> tuple[float, dict[str, float]]:
        batch = next(batches)
        with metrics.aggregate(new_root=True) as log:
            time = seconds(lambda: trainer.train_step(batch), clock)
        return time, dict(log.get_smoothed_values())

    def peak() -> dict[str, float | None]:
        states = [value for state in trainer.optimizer.optimizer.state.values() for value in state.values()]
        exist = [*trainer.model.parameters(), *trainer.model.buffers(), *filter(torch.is_tensor, states)]
        found = measure(update, trainer.zero_grad, exist)
        return {**found, "process": None if before is None else (status("VmHWM") - before) / 2**20}

    requests = {"update": update, "peak": peak, "operators": lambda: operator_times(update, repeats=2)}
    while True:
        pipe.send(requests[pipe.recv()]())


def write_zipf_data(folder: Path, args: argparse.Namespace) -> str:
    """A binarised training split of made-up words, drawn by Zipf's law (probability 1 / (rank + 2.7)) as in a text."""
    words = "".join(f"w{rank} {args.vocab - rank}\n" for rank in range(args.vocab))
    (folder / "dict.txt").write_text(words, encoding="utf-8")
    generator = torch.Generator().manual_seed(SEED)
    weights = 1 / (torch.arange(args.vocab, dtype=torch.float64) + 2.7)
    total = UPDATES * args.sentences * args.tokens_per_sample
    drawn = torch.multinomial(weights, total, replacement=True, generator=generator)
    builder = indexed_dataset.make_builder(str(folder / "train.bin"), impl="mmap", vocab_size=args.vocab + 4)
    for sentence in (drawn + 4).int().split(args.tokens_per_sample):  # after fairseq's special symbols
        builder.add_item(sentence)
    builder.finalize(str(folder / "train.idx"))
    return str(folder)
