"""scripts/bench/around.py: each way gives the same output and gradients, and what is measured is reported."""

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from bench import around, console
from bench.around import duels

SMALL = ["--tokens", "64", "--vocab", "50", "--widths", "16", "--positions", "16", "--pairs", "1", "--threads", "1"]


def arguments(*flags):
    return around.build_parser().parse_args([*SMALL, *flags])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ways_are_the_same_function(dtype):
    torch.manual_seed(0)
    for duel in duels(arguments(), dtype):
        duel.check()
        gradients = []
        for way in duel.ways:
            output = way.forward()
            gradients.append(torch.autograd.grad(output, [*way.inputs][:1], torch.ones_like(output))[0].float())
        error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.02), duel.what


def test_a_way_to_something_else_is_not_timed():
    duel = next(duels(arguments(), torch.float32))
    ours, other = duel.ways
    with pytest.raises(RuntimeError, match="output layer, 50 x 16: the outputs of ours and of plain differ by 50"):
        duel._replace(ways=(ours, other._replace(forward=lambda: 2 * other.forward()))).check()


def test_a_width_that_heads_do_not_divide_is_refused(capsys):
    flags = [*SMALL, "--heads", "3"]
    assert console.run_benchmark(around.run, around.build_parser(), flags) == 2
    assert "--widths (16) must be multiples of 2 x --heads (3)" in "".join(capsys.readouterr())


def test_a_report_has_every_duel_in_both_types(tmp_path):
    report = tmp_path / "report.md"
    flags = [*SMALL, "--widths", "16", "32", "--output", str(report)]
    assert console.run_benchmark(around.run, around.build_parser(), flags) == 0
    rows = [re.split(r" *\| *", line)[1:4] for line in report.read_text().splitlines() if re.search(r"pairs \d", line)]
    expected = [
        (what, dtype)
        for dtype in ("float32", "bfloat16")
        for width in (16, 32)
        for what in (
            f"output layer, 50 x {width}",
            f"attention, 16 positions of {width}, 4 heads",
            f"rotary, 16 positions of 4 x {width // 4}",
        )
    ]
    assert [tuple(row[:2]) for row in rows] == expected
