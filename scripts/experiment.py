#!/usr/bin/env python
"""The CPU-scale study: the same search, budget and data order for every model, several seeds, the test set once.

1. Search: every model with every learning rate, one seed, ``--search-updates`` updates; the lowest
   validation loss wins.
2. Study: every model with its learning rate, all seeds, ``--updates`` updates; then validation and test perplexity of
   the last checkpoint through fairseq-eval-lm, or, of text in several languages and of images and text, through
   ``mhmoe evaluate``.

The data tell what is learnt: language modelling, or of images and text masked modelling as in BEiT-3.

Finished runs are kept, so a stopped study goes on where it was. Runs lie in OUT/search/MODEL/lr-X and
OUT/runs/MODEL/seed-N; OUT/summary.json collects the figures, ``mhmoe report --aggregate`` makes table and plot.

Examples: scripts/experiment.py --data DATA --out outputs/study --models dense xmoe mhmoe-flops-h4 --seeds 1 2 3
          scripts/experiment.py --data data/multilingual --out outputs/languages --lrs 8e-3 --validations 2
          scripts/experiment.py --data data/image-text --out outputs/images --models dense xmoe mhmoe-params-h4 \\
              --lrs 1e-3 2e-3 4e-3 --search-updates 150 --updates 400
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from mhmoe_fairseq.analysis.reports.run_logs import read_training_log

MODELS = {
    "dense": ["--arch", "dense_{family}_{size}"],
    "xmoe": ["--arch", "xmoe_{family}_{size}"],
    "smoe": ["--arch", "smoe_{family}_{size}"],
    **{
        f"mhmoe-{budget}-h{heads}": [
            "--arch", "mhmoe_{family}_{size}", "--mhmoe-heads-number", str(heads), "--mhmoe-budget", budget
        ]
        for budget in ("params", "flops")
        for heads in (2, 4, 8)
    },
}  # fmt: skip
_SAY = threading.Lock()


def say(text: str) -> None:
    """One line, whole, whatever else runs."""
    with _SAY:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def family(data: Path) -> str:
    """Of the architectures: beit3 where the data are images and text, else lm."""
    return "beit3" if read_manifest(data).get("kind") == "image-text" else "lm"


def has_several_figures(data: Path) -> bool:
    """Whether evaluation has a figure for each language or modality."""
    return family(data) == "beit3" or "languages" in read_manifest(data)


def read_manifest(data: Path) -> dict[str, Any]:
    """What ``mhmoe prepare`` tells of the data."""
    return json.loads((data / "manifest.json").read_text(encoding="utf-8"))


def samples(args: argparse.Namespace) -> list[str]:
    """What training and evaluation share: the same samples for every model."""
    if family(args.data) == "beit3":
        task = "--task mhmoe_masked_multimodal --img-size 64 --patch-size 16 --max-text-length 32".split()
    else:
        task = ["--task", "mhmoe_language_modeling"]
        if has_several_figures(args.data):
            task = ["--task", "mhmoe_multilingual_language_modeling", "--multilang-sampling-alpha", f"{args.alpha:g}"]
        task += ["--tokens-per-sample", str(args.tokens_per_sample), "--sample-break-mode", "none"]
    user_dir = Path(__file__).resolve().parent.parent / "mhmoe_fairseq"
    return ["--user-dir", str(user_dir), *task, "--cpu"]


def objective(data: Path, updates: int) -> list[str]:
    """Criterion, decay of the learning rate and of weights: those of the recipes."""
    if family(data) == "beit3":
        return "--criterion mhmoe_masked_multimodal --lr-scheduler cosine --weight-decay 0.05".split()
    decay = ["--lr-scheduler", "polynomial_decay", "--total-num-update", str(updates)]
    return ["--criterion", "moe_cross_entropy", "--weight-decay", "0.01", *decay]


def train_command(args: argparse.Namespace, model: str, lr: float, seed: int, updates: int, run: Path) -> list[str]:
    """The fairseq-train command of one run."""
    interval = max(1, updates // args.validations)
    return [
        "fairseq-train", str(args.data), *samples(args),
        *(word.format(family=family(args.data), size=args.size) for word in MODELS[model]),
        *objective(args.data, updates), "--moe-gate-loss-wt", "0.01",
        "--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--adam-eps", "1e-6",
        "--clip-norm", "1.0", "--lr", f"{lr:g}", "--warmup-updates", str(updates // 10), "--max-update", str(updates),
        "--batch-size", str(args.batch_size), "--required-batch-size-multiple", "1", "--dropout", "0.1",
        "--seed", str(seed), "--num-workers", "0", "--no-epoch-checkpoints", "--keep-interval-updates", "1",
        "--validate-interval-updates", str(interval), "--save-interval-updates", str(updates),
        "--log-format", "json", "--log-interval", str(max(1, updates // 20)),
        "--save-dir", str(run), "--log-file", str(run / "train.log"),
    ]  # fmt: skip


def call(command: list[str], output: Path, threads: int) -> None:
    """Run one command; its output is kept, a failure ends the study."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    partial = output.with_name(output.name + ".tmp")
    with open(partial, "w") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=env)
    if done.returncode:
        raise SystemExit(f"experiment: error: {command[0]} failed, see {partial}")
    partial.replace(output)


def train(args: argparse.Namespace, model: str, lr: float, seed: int, updates: int, run: Path) -> None:
    """One training, unless it is finished."""
    command = train_command(args, model, lr, seed, updates, run)
    record = run / "command.json"
    if (run / "finished").exists():
        if sorted(json.loads(record.read_text())) != sorted(command):
            raise SystemExit(f"experiment: error: {run} was trained with other settings; take another --out")
        return
    run.mkdir(parents=True, exist_ok=True)
    for stale in run.glob("checkpoint*.pt"):
        stale.unlink()
    (run / "train.log").unlink(missing_ok=True)
    record.write_text(json.dumps(command, indent=1))
    (run / "manifest.json").write_bytes((args.data / "manifest.json").read_bytes())
    call(command, run / "output.txt", args.threads)
    (run / "finished").touch()
    losses = read_training_log(run / "train.log").curve("valid_loss")[1]
    say(f"{run.relative_to(args.out)}: {min(losses):.3f} bits (validation)")


def evaluate(args: argparse.Namespace, run: Path) -> None:
    """Validation and test perplexity of the last checkpoint."""
    checkpoint = str(run / "checkpoint_last.pt")
    for split in ("valid", "test"):
        log = run / f"eval-{split}.log"
        if log.exists():
            continue
        if has_several_figures(args.data):
            command = ["mhmoe", "evaluate", checkpoint, "--data", str(args.data), "--split", split]
            command += ["--json", str(run / f"eval-{split}.json")]
        else:
            command = ["fairseq-eval-lm", str(args.data), *samples(args), "--path", checkpoint]
            command += ["--gen-subset", split, "--batch-size", "32"]
        call(command, log, args.threads)


def perplexity(run: Path, split: str) -> float:
    """Of all of the split."""
    figures = run / f"eval-{split}.json"
    if figures.exists():
        return json.loads(figures.read_text(encoding="utf-8"))["total"]["perplexity"]
    log = (run / f"eval-{split}.log").read_text(encoding="utf-8")
    return float(re.search(r"Perplexity: ([\d.]+)", log)[1])


def search(args: argparse.Namespace, pool: concurrent.futures.Executor) -> dict[str, float]:
    """The best learning rate of every model on the validation set."""
    jobs, losses = {}, {}
    for model in args.models:
        for lr in args.lrs:
            run = args.out / "search" / model / f"lr-{lr:g}"
            jobs[model, lr] = (run, pool.submit(train, args, model, lr, args.seeds[0], args.search_updates, run))
    for key, (run, job) in jobs.items():
        job.result()
        losses[key] = read_training_log(run / "train.log").valid[-1]["valid_loss"]
        for checkpoint in run.glob("checkpoint*.pt"):  # only the loss is needed
            checkpoint.unlink()
    best = {model: min(args.lrs, key=lambda lr: losses[model, lr]) for model in args.models}
    table = {model: {f"{lr:g}": losses[model, lr] for lr in args.lrs} for model in args.models}
    (args.out / "search.json").write_text(json.dumps({"valid_loss_bits": table, "best_lr": best}, indent=1))
    return best


def study(args: argparse.Namespace, pool: concurrent.futures.Executor, best: dict[str, float]) -> None:
    """All seeds, then the evaluation and the summary."""

    def one(model: str, seed: int) -> Path:
        run = args.out / "runs" / model / f"seed-{seed}"
        train(args, model, best[model], seed, args.updates, run)
        evaluate(args, run)
        return run

    jobs = {(model, seed): pool.submit(one, model, seed) for seed in args.seeds for model in args.models}
    summary = {}
    for model in args.models:
        results = [jobs[model, seed].result() for seed in args.seeds]
        row: dict[str, object] = {"lr": best[model]}
        for split in ("valid", "test"):
            perplexities = [perplexity(run, split) for run in results]
            spread = statistics.stdev(perplexities) if len(perplexities) > 1 else None
            row[split] = {"ppl": perplexities, "mean": statistics.mean(perplexities), "stdev": spread}
        summary[model] = row
        say(f"{model}: lr {best[model]:g}, validation {row['valid']}, test {row['test']}")
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by mhmoe prepare")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and summary")
    default_models = ["dense", "xmoe", "mhmoe-params-h4", "mhmoe-flops-h4"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=default_models, help="models to compare")
    parser.add_argument("--size", choices=("tiny", "small", "base"), default="tiny", help="architecture size")
    parser.add_argument("--updates", type=int, default=300, help="updates of every run of the study")
    parser.add_argument("--search-updates", type=int, default=100, help="updates of every run of the search")
    parser.add_argument("--lrs", type=float, nargs="+", default=[4e-3, 8e-3, 1.6e-2], help="learning rates to search")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="the first is the search's")
    parser.add_argument("--validations", type=int, default=4, help="how often a run is validated while it trains")
    parser.add_argument("--alpha", type=float, default=0.5, help="for several languages: --multilang-sampling-alpha")
    parser.add_argument("--batch-size", type=int, default=16, help="blocks, or images, texts and pairs, per update")
    parser.add_argument("--tokens-per-sample", type=int, default=128, help="of language models")
    parser.add_argument("--threads", type=int, default=1, help="threads of every run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    return parser.parse_args()


def main() -> int:
    """Search, then study."""
    args = parse_arguments()
    if not (args.data / "manifest.json").exists():
        raise SystemExit(f"experiment: error: --data ({args.data}) holds no manifest.json: run mhmoe prepare first")
    args.out.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        best = search(args, pool) if len(args.lrs) > 1 else dict.fromkeys(args.models, args.lrs[0])
        study(args, pool, best)
    return 0


if __name__ == "__main__":
    sys.exit(main())
