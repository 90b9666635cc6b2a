"""What a reader needs to judge the numbers: hardware, versions, threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

PACKAGES = ("torch", "numpy", "torchscale", "fairseq", "fairseq-fixed", "transformers")
WIDE_UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")


def cpu_name() -> str:
    """The processor's name as the operating system gives it."""
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_slug() -> str:
    """The processor's name for a file name: ``intel-xeon-processor``."""
    name = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", " ", cpu_name().lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def describe(threads: int) -> list[tuple[str, str]]:
    """Rows (what, value) for the head of a report."""
    rows = [
        ("Processor", cpu_name()),
        ("Wide units", ", ".join(_flags(WIDE_UNITS)) or "unknown"),
        ("Cores seen", str(os.cpu_count())),
        ("Threads used", str(threads)),
        ("Memory", _memory()),
        ("System", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in _versions())),
        ("BLAS", "MKL" if torch.backends.mkl.is_available() else "not MKL"),
        ("Float32 products", f"precision {torch.get_float32_matmul_precision()}"),
    ]
    load = _load()
    return [*rows, ("Load average at the start", load)] if load else rows


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _flags(wanted: tuple[str, ...]) -> list[str]:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("flags"):
            present = set(line.split(":", 1)[1].split())
            return [flag for flag in wanted if flag in present]
    return []


def _memory() -> str:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal"):
            return f"{int(line.split()[1]) / 2**20:.0f} GiB"
    return "unknown"


def _load() -> str:
    try:
        return ", ".join(f"{value:.2f}" for value in os.getloadavg())
    except OSError:
        return ""


def _versions() -> list[tuple[str, str]]:
    found = []
    for name in PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
