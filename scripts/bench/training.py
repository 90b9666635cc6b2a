"""Whole language models: each contender in a process (or ranks) of its own that makes a step when asked.

The process builds what ``fairseq-train`` builds of the same flags, and steps fairseq's own ``Trainer``.
"""

import argparse
import contextlib
import itertools
import logging
import multiprocessing
import os
import socket
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fairseq import distributed_utils, options, tasks, utils
from fairseq.data import Dictionary, indexed_dataset, iterators
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.sequence_scorer import SequenceScorer
from fairseq.trainer import Trainer

import mhmoe_fairseq
from mhmoe_fairseq.common.ranges import flag
from mhmoe_fairseq.common.timing import Clock, no_garbage_collection
from mhmoe_fairseq.evaluation.speed import continue_greedily
from mhmoe_fairseq.models.architectures import SIZES, architecture_options
from mhmoe_fairseq.models.counts import ModelCounts, blank_dictionary, build_on_meta, count_built
from mhmoe_fairseq.models.flags import context_of

from .memory import Peak, measure
from .timing import Operator, operator_times, seconds

SEED = 1
UPDATES = 8  # different batches; then the first comes again
PREFIX, STEPS = 32, 32  # tokens before the first one-token step, and timed steps
# What the parts of a contender's name tell.
FIELDS = {
    **dict.fromkeys(("dense", "xmoe", "mhmoe-params", "mhmoe-flops", "stock"), "family"),
    **dict.fromkeys(("fp32", "bf16"), "precision"), **dict.fromkeys(("mhmoe_adam", "adam"), "optimizer"),
    **dict.fromkeys(map(str, range(1, 9)), "ranks"),
}  # fmt: skip
ALWAYS = "--dropout 0 --sample-break-mode none --lr 5e-4 --clip-norm 0 --cpu --required-batch-size-multiple 1"
OURS = "--task mhmoe_language_modeling --criterion moe_cross_entropy"
STOCK = (
    "--task language_modeling --criterion cross_entropy --share-decoder-input-output-embed --decoder-normalize-before"
)
RANKS = "--ddp-backend legacy_ddp --distributed-backend gloo"


class Contender(NamedTuple):
    """What is trained and how: written ``FAMILY[:PRECISION][:OPTIMIZER][:RANKS]``."""

    family: str
    precision: str = "fp32"
    optimizer: str = "mhmoe_adam"
    ranks: int = 1

    @classmethod
    def parse(cls, text: str) -> "Contender":
        """Returns the contender of a text; ``ValueError`` for an unknown part."""
        default = {"optimizer": "adam"} if text.startswith("stock") else {}
        fields: dict[Any, Any] = {**default, **{FIELDS.get(part): part for part in text.split(":")}}
        if None in fields or "family" not in fields:
            raise ValueError(f"{fields.get(None, 'family')} in {text} must be one of {', '.join(FIELDS)}")
        found = cls(**{**fields, "ranks": int(fields.get("ranks", 1))})
        if found.family == "stock" and found != ("stock", "fp32", "adam", 1):
            raise ValueError(f"{text}: stock fairseq trains here in fp32, with adam, in one process")
        return found

    def __str__(self) -> str:
        more = ["adam"] * (self.optimizer == "adam") + [str(self.ranks)] * (self.ranks > 1)
        return ":".join([self.family, self.precision, *more])


def model_options(family: str, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """Returns architecture and flags of a model, by the names of their fields."""
    if family == "stock":  # as wide between its maps as gives a token X-MoE's FLOPs
        dense, xmoe = (count(name, args, blank_dictionary(100)).flops_per_token for name in ("dense", "xmoe"))
        size = SIZES[args.size]
        width = size["ffn_embed_dim"] + (xmoe - dense) / (4 * size["layers"] * size["embed_dim"])
        sizes = {f"decoder_{name}": size[name] for name in ("layers", "embed_dim", "attention_heads")}
        sizes["decoder_ffn_embed_dim"] = 16 * round(width / 16)
        return {"arch": "transformer_lm", **sizes, "activation_fn": "gelu"}
    arch, _, budget = family.partition("-")
    flags = {"arch": f"{arch}_lm_{args.size}", "mhmoe_precision": precision}
    if arch != "dense":
        flags |= {"moe_expert_count": args.experts, "moe_top_k": args.top_k}
    if arch == "mhmoe":
        flags |= {"mhmoe_heads_number": args.heads, "mhmoe_budget": budget}
    return flags


def count(family: str, args: argparse.Namespace, dictionary: Dictionary) -> ModelCounts:
    """Returns what ``fairseq-train`` would build of a family of ours."""
    options = architecture_options(**model_options(family, "fp32", args), tokens_per_sample=args.tokens_per_sample)
    return count_built(build_on_meta(options, dictionary), context_of(options))


def flags_of(contender: Contender, args: argparse.Namespace) -> list[str]:
    """Returns the flags of model, task, criterion and optimiser, and of the batch, which the ranks share."""
    chosen = {
        **model_options(contender.family, contender.precision, args), "optimizer": contender.optimizer,
        "tokens_per_sample": args.tokens_per_sample, "batch_size": args.sentences // contender.ranks,
    }  # fmt: skip
    words = [word for field, value in chosen.items() for word in (flag(field), str(value))]
    more = [ALWAYS, STOCK if contender.family == "stock" else OURS, RANKS if contender.ranks > 1 else ""]
    return [*words, *" ".join(more).split(), "--adam-betas", "(0.9, 0.98)"]


class Training:
    """A contender in processes of its own, which wait until they are asked and share ``threads`` out.

    Raises:
        RuntimeError: here and from every method, if a process fails: what it said, in one line.
    """

    def __init__(self, contender: Contender, data: str, args: argparse.Namespace, threads: int) -> None:
        self.contender, self.clock, ranks = contender, args.clock, contender.ranks
        words = [data, "--user-dir", str(Path(mhmoe_fairseq.__file__).parent), *flags_of(contender, args)]
        words += f"--seed {SEED} --no-save --disable-validation --num-workers 0 --curriculum 1".split()
        words += [] if ranks > 1 else ["--distributed-world-size", "1"]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fairseq.trainer", "torchscale.architecture.decoder"])
        with socket.socket() as found:
            found.bind(("localhost", 0))
            torchrun = {"MASTER_ADDR": "localhost", "MASTER_PORT": found.getsockname()[1], "WORLD_SIZE": ranks}
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            given = theirs, words, {**torchrun, "RANK": rank}, threads // ranks, args.clock
            self.processes.append(context.Process(target=serve, args=given, daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(ours)
        self.seconds()
        self.first_loss = self.log["loss"]

    def ask(self, *request: object) -> list[Any]:
        """Returns what each rank answers."""
        for pipe in self.pipes:
            pipe.send(request)
        try:
            replies = [pipe.recv() for pipe in self.pipes]
        except EOFError as error:
            raise RuntimeError(f"{self.contender}: a process of it has ended, perhaps for want of memory") from error
        if errors := [reply for reply in replies if isinstance(reply, str)]:
            raise RuntimeError(f"{self.contender}: {errors[0]}")
        return replies

    def seconds(self, what: str = "update", rows: int = 0) -> float:
        """Makes a step and returns its time: the slowest rank's, or the CPU time of all."""
        replies = self.ask(what, rows)
        self.log = replies[0][1]
        times = [reply[0] for reply in replies]
        return sum(times) if self.clock is time.process_time else max(times)

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()


def serve(pipe: Connection, words: list[str], torchrun: dict[str, Any], threads: int, clock: Clock) -> None:
    """What a contender's process does: builds as ``fairseq_cli.train``, then answers requests; a text is an error."""
    torch.set_num_threads(threads)
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    try:
        if torchrun["WORLD_SIZE"] > 1:
            os.environ.update({name: str(value) for name, value in torchrun.items()})
        parser = options.get_training_parser()
        config = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, words))
        distributed_utils.call_main(config, lambda config: Steps(config, clock).answer(pipe))
    except (Exception, SystemExit) as error:
        pipe.send(f"{type(error).__name__}: {error}")


class Steps:
    """A training, and what can be asked of it; times are in seconds."""

    def __init__(self, config: Any, clock: Clock) -> None:
        utils.import_user_module(config.common)
        utils.set_torch_seed(config.common.seed)
        self.clock, task = clock, tasks.setup_task(config.task)
        self.trainer = Trainer(config, task, task.build_model(config.model), task.build_criterion(config.criterion))
        epoch = self.trainer.get_train_iterator(epoch=1)
        self.trainer.begin_epoch(1)
        self.batches = itertools.cycle(list(iterators.GroupedIterator(epoch.next_epoch_itr(shuffle=False), 1)))
        self.dictionary, self.length = task.source_dictionary, config.task.tokens_per_sample

    def answer(self, pipe: Connection) -> None:
        """Sends what each request that comes, a method's name and arguments, returns."""
        while True:
            what, *given = pipe.recv()
            pipe.send(getattr(self, what)(*given))

    def update(self, _: int = 0) -> tuple[float, dict[str, float]]:
        """Trains on the next batch and returns the time and what fairseq logs."""
        batch = next(self.batches)
        with metrics.aggregate(new_root=True) as log:
            taken = seconds(lambda: self.trainer.train_step(batch), self.clock)
        return taken, dict(log.get_smoothed_values())

    def tokens(self, rows: int, length: int) -> torch.Tensor:
        self.trainer.model.eval()
        self.trainer.model.make_generation_fast_()  # as every command that opens a model for use
        generator = torch.Generator().manual_seed(SEED)
        return torch.randint(self.dictionary.nspecial, len(self.dictionary), (rows, length), generator=generator)

    def decode(self, rows: int) -> tuple[float, dict[str, float]]:
        """Takes one-token steps with cached keys and values after an untimed prefix; returns the time of one."""
        decoder, prefix = self.trainer.model.decoder, self.tokens(rows, PREFIX)
        if not hasattr(decoder, "autocast"):  # stock fairseq's
            decoder.autocast = lambda device_type: contextlib.nullcontext()
        with no_garbage_collection():
            timing = continue_greedily(decoder, prefix, STEPS + 1, self.dictionary.pad(), self.clock)[1]
        return timing.steps / STEPS, {}

    @torch.no_grad()
    def score(self, rows: int) -> tuple[float, dict[str, float]]:
        """Scores every token of a batch as ``fairseq-eval-lm`` does."""
        tokens = self.tokens(rows, self.length)
        sample = {"net_input": {"src_tokens": tokens}, "target": tokens.roll(-1, 1)}
        return seconds(lambda: SequenceScorer(self.dictionary).generate([self.trainer.model], sample), self.clock), {}

    def peak(self) -> Peak:
        """Returns an update's peak memory in MiB."""
        states = [value for state in self.trainer.optimizer.optimizer.state.values() for value in state.values()]
        exist = [*self.trainer.model.parameters(), *self.trainer.model.buffers(), *filter(torch.is_tensor, states)]
        return measure(self.update, self.trainer.zero_grad, exist)

    def operators(self) -> list[Operator]:
        return operator_times(self.update, repeats=2)


def write_zipf_data(folder: Path, args: argparse.Namespace) -> str:
    """A binarised training split of made-up words, drawn by Zipf's law (probability 1 / (rank + 2.7)) as in a text."""
    (folder / "dict.txt").write_text("".join(f"w{rank} {args.vocab - rank}\n" for rank in range(args.vocab)))
    generator = torch.Generator().manual_seed(SEED)
    weights = 1 / (torch.arange(args.vocab, dtype=torch.float64) + 2.7)
    drawn = torch.multinomial(weights, UPDATES * args.sentences * args.tokens_per_sample, True, generator=generator)
    builder = indexed_dataset.make_builder(str(folder / "train.bin"), impl="mmap", vocab_size=args.vocab + 4)
    for sentence in (drawn + 4).int().split(args.tokens_per_sample):  # after fairseq's special symbols
        builder.add_item(sentence)
    builder.finalize(str(folder / "train.idx"))
    return str(folder)
