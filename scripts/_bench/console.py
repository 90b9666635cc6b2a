"""What both scripts share at the command line: threads, names of reports, progress, one-line messages."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from .machine import cpu_slug
from .timing import MIN_PAIRS

ROOT = Path(__file__).resolve().parents[2]


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pairs",
        type=positive,
        default=MIN_PAIRS,
        metavar="N",
        help=f"interleaved pairs per comparison; fewer than {MIN_PAIRS} mean little (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=2,
        metavar="N",
        help="PyTorch threads (default: %(default)s, the targets' number)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.md",
        help="where the report goes (default: docs/benchmarks/<date>-<cpu>[-kind].md)",
    )


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def set_threads(threads: int) -> None:
    """Use ``threads`` threads whatever OMP_NUM_THREADS says."""
    torch.set_num_threads(threads)


def today() -> str:
    return datetime.date.today().isoformat()


def report_path(output: Path | None, kind: str = "") -> Path:
    """The report's path: as asked, or dated and named after the processor.

    Raises:
        ValueError: the asked name does not end in ``.md``.
    """
    if output is None:
        return ROOT / "docs" / "benchmarks" / f"{today()}-{cpu_slug()}{kind}.md"
    if output.suffix != ".md":
        raise ValueError(f"--output ({output}) must end in .md: the plot goes beside it as .png")
    return output


def command_line() -> str:
    """The command that is running, as one would type it in the repository's root."""
    script = Path(sys.argv[0])
    name = script.resolve().relative_to(ROOT) if script.resolve().is_relative_to(ROOT) else script.name
    return shlex.join(["python", str(name), *sys.argv[1:]])


def say(text: str) -> None:
    """One line for the user, above the progress bar if there is one."""
    tqdm.write(text)


class Progress:
    """A progress bar whose label is what runs now."""

    def __init__(self, total: int) -> None:
        self.bar = tqdm(total=total, unit="step", dynamic_ncols=True, smoothing=0.1)

    def __call__(self, label: str, units: int) -> None:
        self.bar.set_description_str(label, refresh=True)
        self.bar.update(units)

    def close(self) -> None:
        self.bar.close()
