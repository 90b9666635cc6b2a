"""Peak memory of one call, measured in a process that does nothing else.

Two measures, both counted from the state just before the call (weights, optimiser state and inputs
exist already, gradients do not), after a small warm-up call and with free memory given back:

- ``tensors``: the largest sum of live allocations that PyTorch's own allocator reported, from the profiler's
  record of every allocation and release. Exact, the same in every run, scratch inside operators included.
- ``resident``: the growth of the process's peak resident set, as the kernel counted it. Includes what
  the C library keeps, and the maths library's buffers; differs a little from run to run.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

MIB = 2**20


def peak_of_allocations(events: Sequence[dict]) -> int:
    """Largest running sum, in bytes, over the ``[memory]`` events of a profiler trace."""
    records = sorted((e["ts"], e["args"]["Ev Idx"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    live = peak = 0
    for _, _, size in records:
        live += size
        peak = max(peak, live)
    return peak


def tensor_peak(call: Callable[[], object]) -> int:
    """Peak bytes of tensor memory that ``call`` needs beyond what exists already."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = os.path.join(folder, "trace.json")
        profile.export_chrome_trace(trace)
        events = json.loads(Path(trace).read_text(encoding="utf-8"))["traceEvents"]
    return peak_of_allocations(events)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no field {field}")


def give_back_free_memory() -> None:
    """Collect garbage and, with glibc, return free pages to the kernel."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        pass  # another C library: free pages stay, and count for every contender alike


def resident_peak(call: Callable[[], object]) -> int | None:
    """Growth of the peak resident set during ``call`` in bytes; None where Linux's /proc is missing."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    give_back_free_memory()
    before = _status("VmRSS")
    reset.write_text("5", encoding="ascii")  # the kernel's code for "forget the peak so far"
    call()
    return _status("VmHWM") - before


def measure(call: Callable[[], object], clear: Callable[[], None]) -> dict[str, float | None]:
    """Both measures in MiB; ``clear`` drops what a call leaves behind (gradients)."""
    clear()
    resident = resident_peak(call)
    clear()
    give_back_free_memory()
    tensors = tensor_peak(call)
    return {"tensors": tensors / MIB, "resident": None if resident is None else resident / MIB}


def in_fresh_process(script: str, arguments: Sequence[str]) -> dict[str, float | None]:
    """Run ``script`` anew with ``arguments`` and read the JSON object in its last line.

    Raises:
        RuntimeError: the process failed; the message ends with its last line of output.
    """
    command = [sys.executable, script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = result.stdout.strip().splitlines()
    if result.returncode != 0 or not lines:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"{' '.join(command)} ended with status {result.returncode}: {last}")
    return json.loads(lines[-1])
