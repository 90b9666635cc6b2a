"""What the benchmarks share at the command line and in their reports: flags, progress, the machine, tables."""

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from mhmoe_fairseq.common.files import atomic_path

from .timing import MIN_PAIRS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "numpy", "torchscale", "fairseq", "fairseq-fixed", "transformers")
WIDE_UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def make_parser(description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    pairs = f"interleaved pairs per comparison; fewer than {MIN_PAIRS} mean little"
    add_numbers(parser, {"pairs": (MIN_PAIRS, pairs), "threads": (2, "PyTorch threads: the targets' number")})
    where = "where the report goes (default: docs/benchmarks/<date>-<cpu>[-kind].md)"
    parser.add_argument("--output", type=Path, metavar="FILE.md", help=where)
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    return parser


def add_numbers(parser: argparse.ArgumentParser, numbers: dict[str, tuple[int, str]]) -> None:
    """Flags of whole numbers from 1: name -> (default, help)."""
    for name, (default, what) in numbers.items():
        parser.add_argument(
            f"--{name}", type=positive, default=default, metavar="N", help=f"{what} (default: %(default)s)"
        )


def say(text: str) -> None:
    """One line for the user, above the progress bar if there is one."""
    tqdm.write(text)


class Progress:
    """A progress bar whose label is what runs now; close it at the end."""

    def __init__(self, total: int) -> None:
        self.bar = tqdm(total=total, unit="step", dynamic_ncols=True, smoothing=0.1)

    def __call__(self, label: str, units: int = 0) -> None:
        self.bar.set_description_str(label, refresh=True)
        self.bar.update(units)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def report_path(output: Path | None, kind: str = "") -> Path:
    """The report's path: as asked, or dated and named after the processor.

    Raises:
        ValueError: the asked name does not end in ``.md``.
    """
    if output is None:
        name = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", " ", cpu_name().lower())
        slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
        return ROOT / "docs" / "benchmarks" / f"{datetime.date.today().isoformat()}-{slug}{kind}.md"
    if output.suffix != ".md":
        raise ValueError(f"--output ({output}) must end in .md: the plot goes beside it as .png")
    return output


def write_report(path: Path, title: str, threads: int, parts: Iterable[str]) -> None:
    """Replace the report at ``path``: title, command and machine, then the parts."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    head = [
        f"# {title}, {datetime.date.today().isoformat()}",
        f"Command: `{shlex.join(['python', str(name), *sys.argv[1:]])}`",
        table(("what", "value"), describe_machine(threads)),
    ]
    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join(part.strip() for part in (*head, *parts)) + "\n", encoding="utf-8")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def cpu_name() -> str:
    """The processor's name as the operating system gives it."""
    return _proc("cpuinfo", "model name") or platform.processor() or platform.machine()


def describe_machine(threads: int) -> list[tuple[str, str]]:
    """What a reader needs to judge the numbers, as rows (what, value): hardware, versions, threads, load."""
    flags, memory = _proc("cpuinfo", "flags").split(), _proc("meminfo", "MemTotal")
    installed = {dist.metadata["Name"].lower(): dist.version for dist in importlib.metadata.distributions()}
    return [
        ("Processor", cpu_name()),
        ("Wide units", ", ".join(unit for unit in WIDE_UNITS if unit in flags) or "unknown"),
        ("Cores seen", str(os.cpu_count())),
        ("Threads used", str(threads)),
        ("Memory", f"{int(memory.split()[0]) / 2**20:.0f} GiB" if memory else "unknown"),
        ("System", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        ("Versions", ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed)),
        ("BLAS", "MKL" if torch.backends.mkl.is_available() else "not MKL"),
        ("Float32 products", f"precision {torch.get_float32_matmul_precision()}"),
        ("Load average at the start", ", ".join(f"{value:.2f}" for value in os.getloadavg())),
    ]


def _proc(file: str, field: str) -> str:
    """A field of a file of Linux's /proc; empty elsewhere."""
    path = Path("/proc", file)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")
