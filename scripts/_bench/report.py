"""The dated Markdown report of a layer benchmark, and the plot beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from .contenders import NAMES
from .records import Results, targets
from .setting import Setting

METHOD = """\
- Time: forward and backward of one layer, gradients starting from None, no optimiser. Two contenders take turns in
  one process; each duel has {pairs} pairs after one warm-up, every other pair in the opposite order. A ratio is the
  median over the pairs of (ours / rival); the milliseconds are medians.
- GEMM bound: the layer's matrix products alone (both projections, the experts, forward and both backward products) as
  `torch.mm` into preallocated outputs, every expert with an equal share of the rows.
- Plain loop: select rows, linear, GELU, linear, weight, `index_add` for each expert; autograd does the rest.
- TorchScale: its own `MOELayer` with `Top2Gate` (X-MoE router, capacity, policy "all") on the same sub-tokens, in a
  gloo group of one process. It drops what exceeds its capacity; ours drops nothing. Its memory grows with T squared: no
  run beyond T=4096.
- Hugging Face: `MixtralSparseMoeBlock` on the same sub-tokens. Its experts are SwiGLU (three matrices, no biases) with
  an inner width of 2F/3, hence equal FLOPs; its router is linear and it computes no balance loss. The rows "SwiGLU"
  give our layer that very function: same weights, same output.
- Every contender has both D x D projections. All but the bound and Hugging Face's block compute a balance loss and
  propagate its gradient.
- Memory: one contender in a fresh process, counted from the state just before its first full-size step (weights and
  input exist, gradients do not). "Tensors" is the largest sum of live tensor storages, followed operator by operator:
  exact and repeatable. "Resident" is the growth of the process's peak resident set, C library and maths library
  included. A memory target is met only if both measures meet it.
"""


def write_report(
    path: Path,
    results: Results,
    *,
    machine: Sequence[tuple[str, str]],
    command: str,
    date: str,
    pairs: int,
    complete: bool,
) -> None:
    """Write the report to ``path``, replacing an earlier one in a single step."""
    title = f"# MH-MoE layer benchmark, {date}"
    parts = [
        title if complete else f"{title} (incomplete: the run is going on or was interrupted)",
        f"Command: `{command}`",
        table(("what", "value"), machine),
        "## Targets",
        _targets(results),
        "## How it was measured",
        METHOD.format(pairs=pairs),
        _errors(results),
        "## Time",
        *_times(results),
        "## Peak memory (MiB)",
        _memory(results),
        "## Where our time goes",
        *_breakdowns(results),
    ]
    if results.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in results.notes)]
    if complete and path.with_suffix(".png").exists():
        parts.append(f"![Time and memory]({path.with_suffix('.png').name})")
    write_atomically(path, "\n\n".join(part.strip() for part in parts) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` in a single step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _targets(results: Results) -> str:
    rows = [(t.promise, t.measured, "met" if t.met else "**missed**") for t in targets(results)]
    return table(("target", "measured", "verdict"), rows) if rows else "None of the target settings was measured."


def _errors(results: Results) -> str:
    if not results.errors:
        return "Nothing was verified in this run."
    lines = [f"- {what}: {error:.1e}" for what, error in results.errors.items()]
    return "Checked before timing, largest relative error over output and gradients (limit 1e-5):\n\n" + "\n".join(
        lines
    )


def _settings(results: Results) -> list[Setting]:
    found = dict.fromkeys(record.setting for record in results.times)
    return sorted(found, key=lambda s: (s.dtype != "fp32", s.num_experts, s.tokens))


def _times(results: Results) -> list[str]:
    parts = []
    for setting in _settings(results):
        rows = []
        for record in results.times:
            if record.setting != setting:
                continue
            pairs, (low, high) = record.pairs, record.pairs.spread
            speed = setting.flops() / pairs.first_median / 1e9
            rows.append(
                (
                    NAMES[record.first],
                    NAMES[record.second],
                    f"{pairs.first_median * 1e3:.1f}",
                    f"{pairs.second_median * 1e3:.1f}",
                    f"**{pairs.ratio:.2f}** ({low:.2f} to {high:.2f})",
                    f"{1 / pairs.ratio:.2f}x",
                    f"{speed:.0f}",
                )
            )
        head = ("ours", "rival", "ours ms", "rival ms", "ours / rival (pairs)", "speed-up", "ours GFLOP/s")
        parts += [f"### {setting.label()} ({setting.flops() / 1e9:.0f} GFLOP)", table(head, rows)]
    return parts or ["Nothing was timed."]


def _memory(results: Results) -> str:
    if not results.memory:
        return "Nothing was measured."
    rows = []
    for record in sorted(
        results.memory, key=lambda r: (r.setting.dtype != "fp32", r.setting.num_experts, r.setting.tokens)
    ):
        loop = results.peak(record.setting, "loop")
        rows.append(
            (
                record.setting.label(),
                NAMES[record.name],
                f"{record.tensors:.1f}",
                "-" if record.resident is None else f"{record.resident:.1f}",
                "-" if loop is None else f"{record.tensors / loop.tensors:.2f}",
                f"{record.tensors * 1024 / record.setting.tokens:.0f}",
            )
        )
    return table(("setting", "contender", "tensors", "resident", "tensors / plain loop's", "KiB per token"), rows)


def _breakdowns(results: Results) -> list[str]:
    parts = []
    for label, operators in results.breakdowns.items():
        rows = [(f"`{name}`", f"{milliseconds:.1f}", f"{share:.1%}") for name, milliseconds, share in operators]
        parts += [f"### {label}", table(("operator", "ms per step", "share"), rows)]
    return parts or ["Nothing was profiled."]
