"""Whole language models in training: what a user would type, run, and read from the log."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary, indexed_dataset

import mhmoe_fairseq
from mhmoe_fairseq.common.ranges import flag
from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.counts import ModelCounts, build_on_meta, context_of, count_built

from .console import add_numbers

SEED = 1
WARMUP = 1  # updates of every run that no time is taken of
NAMES = {
    "dense": "dense",
    "xmoe": "X-MoE",
    "mhmoe-params": "MH-MoE, budget params",
    "mhmoe-flops": "MH-MoE, budget flops",
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a model and of its update."""
    sizes = ["tiny", "small", "base"]
    parser.add_argument("--size", choices=sizes, default="base", help="architecture (default: base)")
    add_numbers(parser, {
        "experts": (8, "X-MoE's experts"), "heads": (4, "MH-MoE heads"), "top-k": (2, "experts per sub-token"),
        "sentences": (4, "samples per update"), "tokens-per-sample": (512, "tokens of a sample"),
        "vocab": (8000, "synthetic words"), "updates": (3, f"timed updates of every run, after {WARMUP}"),
    })  # fmt: skip
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="as --mhmoe-precision")


def model_flags(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Returns architecture and flags of a model, by the names of its fields."""
    family, _, budget = name.partition("-")
    flags = {"arch": f"{family}_lm_{args.size}", "mhmoe_precision": args.precision}
    if family != "dense":
        flags |= {"moe_expert_count": args.experts, "moe_top_k": args.top_k}
    if family == "mhmoe":
        flags |= {"mhmoe_heads_number": args.heads, "mhmoe_budget": budget}
    return flags


def flags_of(name: str, args: argparse.Namespace, ranks: int = 1) -> list[str]:
    """Returns the flags of model, task, criterion and optimiser, and of the batch, which the ranks share."""
    together = ["--ddp-backend", "legacy_ddp", "--distributed-backend", "gloo"] if ranks > 1 else []
    return [
        *(word for field, value in model_flags(name, args).items() for word in (flag(field), str(value))),
        *("--task", "mhmoe_language_modeling", "--criterion", "moe_cross_entropy", "--dropout", "0"),
        *("--tokens-per-sample", str(args.tokens_per_sample), "--sample-break-mode", "none"),
        *("--optimizer", "mhmoe_adam", "--adam-betas", "(0.9, 0.98)", "--lr", "5e-4", "--clip-norm", "0"),
        *("--batch-size", str(args.sentences // ranks), "--required-batch-size-multiple", "1", "--cpu", *together),
    ]


def count(data: str, name: str, args: argparse.Namespace) -> ModelCounts:
    """Returns what ``fairseq-train`` would build."""
    options = architecture_options(**model_flags(name, args))
    return count_built(build_on_meta(options, Dictionary.load(str(Path(data) / "dict.txt"))), context_of(options))


@dataclass(frozen=True)
class Training:
    """A run of ``fairseq-train``: seconds of an update (median), first loss in bits, peak memory, the last log line."""

    seconds: float
    first_loss: float
    resident_mib: float
    log: dict[str, str]


def train(data: str, name: str, args: argparse.Namespace, *, ranks: int = 1) -> Training:
    """Train for some updates in processes of their own, ``args.threads`` threads shared out among them.

    Raises:
        RuntimeError: fairseq failed; the message ends with its last line of output.
    """
    launcher = [sys.executable, "-m", "fairseq_cli.train"]
    if ranks > 1:
        launcher = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
            "-m", "fairseq_cli.train",
        ]  # fmt: skip
    words = [
        data, "--user-dir", str(Path(mhmoe_fairseq.__file__).parent),
        *flags_of(name, args, ranks), "--seed", str(SEED),
        "--max-update", str(WARMUP + args.updates), "--log-format", "json", "--log-interval", "1",
        "--no-save", "--disable-validation", "--num-workers", "0",
        "--curriculum", "1",  # batches in their order, so that an update has the same samples on any number of ranks
        *([] if ranks > 1 else ["--distributed-world-size", "1"]),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads // ranks), "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        [*launcher, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    lines = process.stdout.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        reason = next((line for line in reversed(lines) if "Error" in line), (lines or ["no output"])[-1])
        raise RuntimeError(f"{name} on {ranks} process(es) failed: {reason}")
    inner = [line.partition("| INFO | train_inner | ")[2] for line in lines]
    logs = [json.loads(line) for line in inner if line.startswith("{")]
    tokens = args.sentences * args.tokens_per_sample
    seconds = [tokens / float(log["wps"]) for log in logs[WARMUP:] if float(log["wps"])]
    return Training(statistics.median(seconds), float(logs[0]["loss"]), usage.ru_maxrss / 1024, logs[-1])


def write_zipf_data(folder: Path, args: argparse.Namespace) -> str:
    """A binarised training split of made-up words, drawn by Zipf's law (probability 1 / (rank + 2.7)) as in a text."""
    words = "".join(f"w{rank} {args.vocab - rank}\n" for rank in range(args.vocab))
    (folder / "dict.txt").write_text(words, encoding="utf-8")
    generator = torch.Generator().manual_seed(SEED)
    weights = 1 / (torch.arange(args.vocab, dtype=torch.float64) + 2.7)
    count = (WARMUP + args.updates + 1) * args.sentences * args.tokens_per_sample
    drawn = torch.multinomial(weights, count, replacement=True, generator=generator)
    builder = indexed_dataset.make_builder(str(folder / "train.bin"), impl="mmap", vocab_size=args.vocab + 4)
    for sentence in (drawn + 4).int().split(args.tokens_per_sample):  # after fairseq's special symbols
        builder.add_item(sentence)
    builder.finalize(str(folder / "train.idx"))
    return str(folder)
