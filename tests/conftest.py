"""What all tests share: one thread for each process, and the folder of the checkout."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import mhmoe_fairseq

pytest_plugins = ["evaluated_runs", "harness_tasks", "preparing", "small_corpora"]

mhmoe_fairseq.register()

# Tiny tensors: threads only cost time, and one thread makes the order of sums the same everywhere.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that tests start


@pytest.fixture(scope="module", autouse=True)
def no_process_group():
    """No file leaves a process group to the next: TorchScale's static layer starts one in its process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds setup.py."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory: pytest.TempPathFactory):
    """A tiny MH-MoE language model, really trained (see ``trained_model.TrainedModel``)."""
    from trained_model import train_tiny_model  # here, because it imports fairseq

    return train_tiny_model(tmp_path_factory.mktemp("trained-model"))


@pytest.fixture(scope="session")
def workers2():
    """Two ranks (see ``workers.Workers``)."""
    from workers import Workers

    return Workers(2)


@pytest.fixture(scope="session")
def workers4():
    """Four ranks."""
    from workers import Workers

    return Workers(4)
