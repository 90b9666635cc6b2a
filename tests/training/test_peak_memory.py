"""A training's log tells how much memory it took."""

import subprocess
import sys

import torch

_GROWTH = """
import torch
from mhmoe_fairseq.training.peak_memory import peak_memory
before = peak_memory()
held = torch.ones(75_000_000)
then = peak_memory()
del held
print(before, then - before, peak_memory() - then)
"""


def test_it_grows_with_what_is_held_and_does_not_fall_again():
    held = torch.ones(500_000_000)  # of the process that starts it nothing counts
    done = subprocess.run([sys.executable, "-c", _GROWTH], capture_output=True, text=True, check=True)
    del held
    before, grown, after = map(float, done.stdout.split())
    assert 0.1 < before < 1.5 and 0.28 < grown < 0.4 and abs(after) < 0.01
