"""The compiled kernels of ``kernels.cpp``, which are optional; ``make setup`` builds them, and so does :func:`build`.

The file stands beside its source and is named after what it was made of (source, PyTorch, processor), so that a
change of any of these finds none and falls back on ATen's operations. It is no module, and so not named like one.
"""

import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("kernels.cpp")
_OFF = "MHMOE_CPU_KERNELS"  # environment: 0 to do without them


def library() -> Path:
    """Where the kernels for this PyTorch and this processor are, or would be."""
    made_of = [_SOURCE.read_text(encoding="utf-8"), torch.__version__, platform.machine(), _instructions(), *_flags()]
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()
    return _SOURCE.with_name(f"kernels-{digest[:16]}.compiled")


@functools.cache
def load() -> bool:
    """Whether the kernels are there, loaded with the first call; not where ``MHMOE_CPU_KERNELS=0``."""
    if os.environ.get(_OFF) == "0":
        return False
    try:
        torch.ops.load_library(str(library()))
    except OSError:  # not built, or the source was left behind
        return False
    return True


def absence() -> str | None:
    """Says why :func:`load` finds no kernels and what mends it; None where it does."""
    if load():
        return None
    if os.environ.get(_OFF) == "0":
        return f"{_OFF}=0"
    if not _SOURCE.is_file():
        return f"{_SOURCE.name} was left behind: install the package whole"
    if library().exists():
        return "PyTorch cannot load the file: remove it and run make setup"
    if any(_SOURCE.parent.glob("kernels-*.compiled")):
        return "built for another PyTorch, processor or source: run make setup"
    return "not built: run make setup where there is a C++ compiler"


def build() -> Path:
    """Compiles the kernels for this processor, unless they are there; half a minute.

    Raises:
        RuntimeError: with the compiler's first error, or that there is no compiler.
    """
    target = library()
    if target.exists():
        return target
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".kernels-") as folder:
        made = Path(folder, target.name)
        words = [
            *shlex.split(os.environ.get("CXX") or "c++"), "-O3", "-std=c++20", "-shared", "-fPIC", *_flags(),
            "-I", str(root / "include"), str(_SOURCE), "-o", str(made), "-L", str(root / "lib"), "-ltorch_cpu", "-lc10",
        ]  # fmt: skip
        try:
            subprocess.run(words, check=True, capture_output=True, text=True)
        except OSError as error:
            raise RuntimeError(f"{words[0]}: {error.strerror}") from error
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if "error" in line] or ["no message"]
            raise RuntimeError(f"{words[0]}: {lines[0]}") from error
        made.replace(target)
    return target


def _instructions() -> str:
    """What this processor understands beyond the least; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@functools.cache
def _flags() -> list[str]:
    """The compiler's flags for this processor and PyTorch's threads."""
    flags = ["-march=native"]
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ("AVX2", "AVX512"):  # which of its vectors at::vec takes
        flags += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    return [*flags, "-fopenmp", "-DAT_PARALLEL_OPENMP=1"]
