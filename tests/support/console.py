"""Run fairseq's console commands as a user does, in a process of their own.

Importing torch, fairseq and TorchScale takes longer than the tests' trainings. So a command is forked from a server
that has imported them, but not the plugin: the child calls the console script's entry point with the user's words.
``real=True`` starts the installed script itself.
"""

import importlib
import importlib.util
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

USER_DIR = Path(importlib.util.find_spec("mhmoe_fairseq").origin).parent
ENTRY_POINTS = {
    "fairseq-train": "fairseq_cli.train",
    "fairseq-eval-lm": "fairseq_cli.eval_lm",
    "fairseq-hydra-train": "fairseq_cli.hydra_train",
    "fairseq-interactive": "fairseq_cli.interactive",
    "fairseq-preprocess": "fairseq_cli.preprocess",
    "fairseq-validate": "fairseq_cli.validate",
}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torchscale.architecture.decoder", *ENTRY_POINTS.values()])


def run_console(command: str, *args: object, cwd: Path, stdin: str = "", check: bool = True, real: bool = False) -> str:
    """Standard output and error of ``command``; it must succeed unless ``check`` is off."""
    words = [command, *map(str, args)]
    with tempfile.TemporaryFile("w+") as given, tempfile.NamedTemporaryFile("r") as written:
        given.write(stdin)
        given.seek(0)
        status = (_run_script if real else _run_forked)(words, cwd, given, Path(written.name))
        output = Path(written.name).read_text()
    if check and status:
        raise AssertionError(f"{' '.join(words)}\n{output[-4000:]}")
    return output


def _run_script(words: list[str], cwd: Path, stdin, output: Path) -> int:
    with open(output, "w") as file:
        script = Path(sys.executable).parent / words[0]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [script, *words[1:]], cwd=cwd, env=environment, stdin=stdin, stdout=file, stderr=file, timeout=600
        ).returncode


def _run_forked(words: list[str], cwd: Path, stdin, output: Path) -> int:
    process = SERVER.Process(target=_entry_point, args=(words, str(cwd), stdin.read(), str(output)))
    process.start()
    process.join(600)
    assert process.exitcode is not None, f"{words[0]} did not end within 10 minutes"
    return process.exitcode


def _entry_point(words: list[str], cwd: str, stdin: str, output: str) -> None:
    import torch

    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    read, write = os.pipe()
    os.write(write, stdin.encode())
    os.close(write)
    os.dup2(read, 0)
    sys.stdin = open(0, closefd=False)
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.argv = words
    importlib.import_module(ENTRY_POINTS[words[0]]).cli_main()


def train(data: Path, save_dir: Path, arch: str, *flags: object, max_update: int = 40, **how: bool) -> str:
    """A short training of a two-layer model on a CPU, with dropout; the log."""
    return run_console(
        "fairseq-train", data, "--user-dir", USER_DIR, "--task", "mhmoe_language_modeling", "--arch", arch,
        "--decoder-layers", 2, "--tokens-per-sample", 32, "--batch-size", 4, "--criterion", "moe_cross_entropy",
        "--optimizer", "adam", "--lr", 0.002, "--lr-scheduler", "inverse_sqrt", "--warmup-updates", 10,
        "--clip-norm", 1, "--dropout", 0.1, "--max-update", max_update, "--save-dir", save_dir,
        "--cpu", "--num-workers", 0, "--log-format", "simple", "--log-interval", 10, "--no-epoch-checkpoints", *flags,
        cwd=save_dir.parent, **how,
    )  # fmt: skip


def evaluate(data: Path, checkpoint: Path, *flags: object, **how: bool) -> str:
    """``fairseq-eval-lm`` on the test split; the log."""
    return run_console(
        "fairseq-eval-lm", data, "--user-dir", USER_DIR, "--task", "mhmoe_language_modeling", "--path", checkpoint,
        "--tokens-per-sample", 32, "--gen-subset", "test", "--cpu", "--num-workers", 0, *flags,
        cwd=checkpoint.parent, **how,
    )  # fmt: skip


class Evaluated(NamedTuple):
    """What ``fairseq-eval-lm`` printed; the loss in bits per token."""

    tokens: int
    loss: float
    perplexity: float


def evaluated(log: str) -> Evaluated:
    """The numbers in the output of ``fairseq-eval-lm``."""
    tokens = re.search(r"Evaluated ([\d,]+) tokens", log)[1].replace(",", "")
    loss, perplexity = re.search(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)", log).groups()
    return Evaluated(int(tokens), float(loss), float(perplexity))


def logged(log: str, part: str) -> dict[str, float]:
    """The figures of the last line that ``part`` (train, valid) logged."""
    line = [line for line in log.splitlines() if re.search(rf"[|:] ?{part} ?[|:] ?epoch", line)][-1]
    return {key: float(value) for key, value in re.findall(r"\| (\w+) ([-\d.]+)", line)}


def write_corpus(folder: Path, words: int = 60) -> Path:
    """Text with a simple grammar, documents apart by empty lines, binarised by fairseq; the data folder."""
    generator = random.Random(0)
    for split, lines in (("train", 600), ("valid", 61), ("test", 67)):
        with open(folder / f"{split}.txt", "w") as file:
            for number in range(lines):
                word = generator.randrange(words)
                sentence = [word]
                for _ in range(generator.randint(3, 18)):
                    sentence.append((sentence[-1] * 3 + generator.choice([1, 2])) % words)
                file.write(" ".join(f"w{word}" for word in sentence) + ("\n\n" if number % 10 == 9 else "\n"))
    prefixes = [part for split in ("train", "valid", "test") for part in (f"--{split}pref", folder / f"{split}.txt")]
    run_console("fairseq-preprocess", "--only-source", *prefixes, "--destdir", folder / "data", cwd=folder)
    return folder / "data"


def evaluation_record(folder: Path, *words: object) -> Any:
    """The record that ``mhmoe evaluate`` writes; ``folder`` keeps it."""
    from mhmoe_fairseq.commands.main import main
    from mhmoe_fairseq.evaluation.records import read_record

    assert main(["evaluate", *map(str, words), "--record", str(folder / "record.json")]) == 0
    return read_record(folder / "record.json")
