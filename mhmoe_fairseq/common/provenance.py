"""When, with what and on which machine something was made, for manifests, records and reports."""

import contextlib
import datetime
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

WIDE_UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16")


def timestamp() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of Python and of those ``packages`` that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str | None:
    """The commit of a checkout, ``-dirty`` behind it where files differ; None of an installed package."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def proc(file: str, field: str) -> str:
    """Returns a field of a file of Linux's /proc, an empty text elsewhere."""
    path = Path("/proc", file)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def machine() -> dict[str, str]:
    """Returns processor, wide units, cores, memory and system in words; no name of this one machine among them."""
    flags, memory = (proc("cpuinfo", "flags") or proc("cpuinfo", "Features")).split(), proc("meminfo", "MemTotal")
    cores = os.cpu_count()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return {
        "Processor": proc("cpuinfo", "model name") or platform.processor() or platform.machine(),
        "Wide units": ", ".join(unit for unit in WIDE_UNITS if unit in flags) or "unknown",
        "Cores": f"{cores}" + (f", {usable} of them usable" if usable != cores else ""),
        "Memory": f"{int(memory.split()[0]) / 2**20:.0f} GiB" if memory else "unknown",
        "System": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
