"""What the benchmarks share at the command line and in their reports: flags, the machine, the report's head."""

import argparse
import datetime
import functools
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from mhmoe_fairseq.common.arguments import HelpFormatter, whole
from mhmoe_fairseq.common.files import atomic_path
from mhmoe_fairseq.common.provenance import machine, proc, versions
from mhmoe_fairseq.common.tables import markdown_table

from .timing import MIN_PAIRS, Operator

Target = tuple[str, bool]  # a promise with what was measured, and whether it was kept
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "numpy", "torchscale", "fairseq", "fairseq-fixed", "transformers")
LOAD = os.getloadavg()  # before a benchmark adds to it


def make_parser(description: str, epilog: str) -> argparse.ArgumentParser:
    """Returns a parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=HelpFormatter)
    add_numbers(parser, {"pairs": (MIN_PAIRS, f"interleaved pairs per comparison; fewer than {MIN_PAIRS} mean little")})
    threads = "PyTorch threads, the targets' number; several: everything with each"
    parser.add_argument("--threads", type=whole(), nargs="+", default=[2], metavar="N", help=threads)
    cpu = "CPU time of all threads, for use beside other work; best with --threads 1 (default: wall clock)"
    parser.add_argument("--cpu-time", dest="clock", action="store_const", const=time.process_time, help=cpu)
    parser.set_defaults(clock=time.perf_counter)
    where = "where the report goes (default: docs/benchmarks/<date>-<cpu>[-kind].md)"
    parser.add_argument("--output", type=Path, metavar="FILE.md", help=where)
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    return parser


def add_numbers(parser: argparse.ArgumentParser, numbers: dict[str, tuple[int, str]]) -> None:
    """Adds flags of whole numbers from 1: name -> (default, help)."""
    for name, (default, what) in numbers.items():
        parser.add_argument(f"--{name}", type=whole(), default=default, metavar="N", help=what)


def run_benchmark(
    run: Callable[..., tuple[Path, list[Target]]], parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> int:
    """Says which targets ``run`` met; returns the exit status, 2 with one line for an error that a user can mend."""
    args = parser.parse_args(argv)
    torch.set_num_threads(max(args.threads))
    try:
        path, targets = run(args)
    except (ValueError, OSError, RuntimeError) as error:
        tqdm.write(f"{Path(sys.modules[run.__module__].__file__).stem}: error: {error}")
        return 2
    for promise, met in targets:
        tqdm.write(f"{'met   ' if met else 'MISSED'} {promise}")
    tqdm.write(f"report: {path}")
    return int(args.check and not all(met for _, met in targets))


def report_path(output: Path | None, kind: str = "") -> Path:
    """Returns the report's path: as asked, or dated and named after the processor; ``ValueError`` unless it is .md."""
    if output is None:
        name = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", " ", (proc("cpuinfo", "model name") or platform.machine()).lower())
        slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
        return ROOT / "docs" / "benchmarks" / f"{datetime.date.today().isoformat()}-{slug}{kind}.md"
    if output.suffix != ".md":
        raise ValueError(f"--output ({output}) must end in .md: the plot goes beside it as .png")
    return output


def write_report(
    path: Path, title: str, args: argparse.Namespace, targets: Iterable[Target], sections: Mapping[str, str]
) -> None:
    """Replaces the report at ``path``: title, command, machine and targets, then the sections that are not empty."""
    name = str(Path(sys.argv[0]).resolve()).removeprefix(f"{ROOT}/")
    verdicts = "\n".join(f"- {'met' if met else '**missed**'}: {promise}" for promise, met in targets)
    times = "CPU time of all threads of a process" if args.clock is time.process_time else "wall clock"
    parts = [
        f"# {title}, {datetime.date.today().isoformat()}",
        f"Command: `{shlex.join(['python', name, *sys.argv[1:]])}`",
        markdown_table(("what", "value"), [*_machine(), ("Threads", f"{args.threads}"), ("Times", times)]),
        f"## Targets\n\n{verdicts or 'None of the settings that the targets speak of was measured.'}",
        *(f"## {heading}\n\n{text}" for heading, text in sections.items() if text),
    ]
    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def operator_sections(profiles: Mapping[object, Iterable[Operator]]) -> dict[str, str]:
    """Returns a section for each profile: where the time of a step goes."""
    found = {}
    for label, operators in profiles.items():
        rows = [(f"`{name}`", f"{milliseconds:.1f}", f"{share:.1%}") for name, milliseconds, share in operators]
        found[f"Where the time goes: {label}"] = markdown_table(("operator", "ms per step", "share"), rows)
    return found


@functools.cache
def _machine() -> list[tuple[str, str]]:
    """Returns hardware, versions and load as rows (what, value), read once."""
    installed = versions(PACKAGES)
    return [
        *machine().items(),
        ("Versions", ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed)),
        ("Float32 products", f"MKL: {torch.backends.mkl.is_available()}, {torch.get_float32_matmul_precision()}"),
        ("Load average at the start", ", ".join(f"{value:.2f}" for value in LOAD)),
    ]
