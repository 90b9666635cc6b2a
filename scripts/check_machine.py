"""Says what this machine lacks before anything is installed: check_machine.py VENV

Standard library only, run by the interpreter that the environment will be made from.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile

SUPPORTED = ((3, 10), (3, 11), (3, 12), (3, 13))
# The environment with a CUDA build of torch takes 6.2 GB, its downloaded wheels 2.6 GB.
VENV_GIB = 7.0
DOWNLOAD_GIB = 3.0


def python_problems() -> list[str]:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    problems = []
    if sys.version_info[:2] not in SUPPORTED:
        problems.append(f"Python {version} is not supported: use 3.10 to 3.13 (make setup PYTHON=python3.11)")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        problems.append(f"Python's venv module is incomplete: install it (Debian, Ubuntu: python{version}-venv)")
    return problems


def compiler_problems() -> list[str]:
    """fairseq is compiled on the spot, except where its wheel fits (3.12 on Linux x86-64)."""
    if sys.version_info[:2] == (3, 12) and sys.platform == "linux" and platform.machine() == "x86_64":
        return []
    problems = []
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not shutil.which(compiler) or subprocess.run([compiler, "--version"], capture_output=True).returncode:
        problems.append(f"no C++ compiler ({compiler}), which fairseq needs: install g++ or clang, or set CXX")
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if not os.path.exists(header):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        problems.append(f"{header} is missing: install Python's headers (Debian, Ubuntu: python{version}-dev)")
    return problems


def existing_parent(path: str) -> str:
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def disk_problems(venv: str) -> list[str]:
    """Room for the environment and for pip's downloads, added up where they share a disk."""
    needed: dict[int, tuple[str, float]] = {}
    for folder, gib in ((existing_parent(venv), VENV_GIB), (tempfile.gettempdir(), DOWNLOAD_GIB)):
        device = os.stat(folder).st_dev
        first, so_far = needed.get(device, (folder, 0.0))
        needed[device] = (first, so_far + gib)
    problems = []
    for folder, gib in needed.values():
        free = shutil.disk_usage(folder).free / 2**30
        if free < gib:
            problems.append(f"{folder} has {free:.1f} GiB free, {gib:.0f} GiB are needed (TMPDIR moves the downloads)")
    return problems


def main() -> int:
    problems = python_problems() + compiler_problems()
    if not os.path.exists(os.path.join(sys.argv[1], "bin", "fairseq-train")):
        problems += disk_problems(sys.argv[1])
    for problem in problems:
        print(f"setup: error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
