"""What all tests share: one thread for each process, and the folder of the checkout."""

import os
from pathlib import Path

import pytest
import torch

# Tiny tensors: threads only cost time, and one thread makes the order of sums the same everywhere.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that tests start


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds setup.py."""
    return Path(__file__).resolve().parent.parent
