"""``mhmoe doctor``: what is installed, what this machine can do and what is absent, for reports of bugs.

It names no path, user or host, and goes on where torch or fairseq cannot be imported: that is what it then says.
"""

import argparse
import functools
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Callable
from typing import Any

from .. import __version__
from ..common.console import quiet, say
from ..common.provenance import commit, machine, timestamp, versions

Facts = dict[str, str]
PACKAGES = (
    "torch", "torchvision", "fairseq", "fairseq-fixed", "torchscale", "omegaconf", "hydra-core", "fairscale", "timm",
    "numpy", "sentencepiece", "sacrebleu", "safetensors", "pillow",
)  # fmt: skip
# Extras of setup.py: the package that each brings, and what it is for.
EXTRAS = {
    "tiktoken": ("tiktoken", "dictionaries of tiktoken's ranks"),
    "lm-eval": ("lm-eval", "mhmoe zero-shot"),
    "plots": ("matplotlib", "plots of report, reproduce and analyze"),
    "tensorboard": ("tensorboardX", "fairseq's --tensorboard-logdir"),
    "captions": ("pycocoevalcap", "METEOR and SPICE of captions"),
    "bench": ("transformers", "its models as rivals in make bench"),
    "completion": ("shtab", "mhmoe --print-completion"),
    "hf": ("tokenizers", "mhmoe checkpoint export"),
    "hf-tests": ("accelerate", "tests of exported models in transformers and lm-eval"),
    "dev": ("pytest", "tests, linters, API reference"),
}
_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MHMOE_CPU_KERNELS")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flag of ``mhmoe doctor``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Print all sections, each a title with facts by name."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other packages', as they are imported, with their paths
        sections = examine()
    if args.json:
        say(json.dumps(sections, indent=1, ensure_ascii=False))
        return 0
    for title, facts in sections.items():
        width = max(map(len, facts))
        say("\n".join([title, *(f"  {name.ljust(width)}  {fact}" for name, fact in facts.items()), ""]))
    return 0


def examine() -> dict[str, Facts]:
    """Returns facts by name, by section; what cannot be found out says why not."""
    imports = {name: _attempt(functools.partial(_imported, name)) for name in ("torch", "fairseq", "torchscale")}
    imports["our models"] = _attempt(lambda: _imported("mhmoe_fairseq.models"))
    installed = versions(PACKAGES)
    ours = f"{__version__}, " + (f"commit {found}" if (found := commit()) else "not from a checkout")
    return {
        "Versions": {"mhmoe_fairseq": ours, **installed, "date": timestamp()},
        "Imports": imports,
        "Machine": {**machine(), **{name: os.environ[name] for name in _SETTINGS if name in os.environ}},
        "PyTorch": _facts(_pytorch),
        "GPUs": _facts(_gpus),
        "Compilers": _compilers(),
        "Optional packages": {name: _extra(name, *row) for name, row in EXTRAS.items()},
    }


def _attempt(call: Callable[[], str]) -> str:
    """What a call returns, or the first line of its error, with file names in place of paths."""
    try:
        return call()
    except Exception as error:  # whatever a broken installation raises: it is what we report
        lines = str(error).strip().splitlines() or [""]
        return f"FAILED: {type(error).__name__}: " + re.sub(r"(?<![\w.])[~\w.-]*(?:/[^\s/:'\")]*)*/", "", lines[0])


def _facts(call: Callable[[], Facts]) -> Facts:
    found: Facts = {}
    problem = _attempt(lambda: found.update(call()) or "")
    return found if not problem else {"unknown": problem}


def _imported(name: str) -> str:
    return f"imported {getattr(importlib.import_module(name), '__version__', '')}".strip()


def _pytorch() -> Facts:
    import torch

    from ..moe.cpu import kernels

    absent = kernels.absence()
    return {
        "precision auto": _attempt(lambda: _precision("cpu")),
        "CPU kernels": f"none ({absent}): experts and losses are slower on a CPU" if absent else "compiled and loaded",
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "oneDNN, MKL, OpenMP": ", ".join(
            "yes" if part.is_available() else "no"
            for part in (torch.backends.mkldnn, torch.backends.mkl, torch.backends.openmp)
        ),
    }


def _precision(device_type: str) -> str:
    """What ``--mhmoe-precision auto`` stands for on a device, and why."""
    from ..models.precision import AUTO, fast_bf16, resolve

    return f"{resolve(AUTO, device_type)} ({fast_bf16(device_type) or 'nothing here multiplies bf16 itself'})"


def _gpus() -> Facts:
    import torch

    facts = {"CUDA of torch": torch.version.cuda or "none, a build for CPUs"}
    if not torch.cuda.is_available():
        return {**facts, "GPUs": "none"}
    facts["NCCL"] = _attempt(lambda: ".".join(map(str, torch.cuda.nccl.version())))
    facts["cuDNN"] = str(torch.backends.cudnn.version())
    facts["precision auto"] = _attempt(lambda: _precision("cuda"))
    for index in range(torch.cuda.device_count()):
        gpu: Any = torch.cuda.get_device_properties(index)
        facts[f"GPU {index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}"
    return facts


def _compilers() -> Facts:
    chosen = (shlex.split(os.environ.get("CXX") or "c++") or ["c++"])[0]
    return {os.path.basename(word): _tool(word) for word in (chosen, "nvcc", "ninja", "git")}


def _tool(word: str) -> str:
    """The line of ``word --version`` that has the version."""
    if shutil.which(word) is None:
        return "absent"

    def ask() -> str:
        done = subprocess.run([word, "--version"], capture_output=True, text=True, timeout=20, check=True)
        lines = done.stdout.strip().splitlines() or ["no version"]
        return next((line for line in lines if "release" in line), lines[0])

    return _attempt(ask)


def _extra(name: str, package: str, purpose: str) -> str:
    found = versions([package]).get(package)
    return found or f"absent ({purpose}): pip install 'mhmoe-fairseq[{name}]'"
