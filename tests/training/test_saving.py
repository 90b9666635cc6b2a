"""Checkpoint files are the old one or the new one, whenever the process dies."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from mhmoe_fairseq.training import save_atomically

STOCK_COPY = shutil.copyfile


def die_halfway(source, destination):
    """``shutil.copyfile``, killed after half of the bytes."""
    content = Path(source).read_bytes()
    with open(destination, "wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def die_in_torch_save(obj, file):
    with open(file, "wb") if isinstance(file, str) else file as opened:
        opened.write(b"PK half of an archive")
        opened.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def killed(function, *args) -> bool:
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join(60)
    return process.exitcode == -signal.SIGKILL


def copy_and_die(copy, source, destination):
    shutil.copyfile = die_halfway
    copy(source, destination, overwrite=True)


def save_and_die(path):
    torch.save = die_in_torch_save
    checkpoint_utils.torch_persistent_save({"number": 2}, path)


@pytest.fixture
def files(tmp_path):
    """A new checkpoint, and an old one that it is to replace."""
    new, old = tmp_path / "checkpoint_1_10.pt", tmp_path / "checkpoint_last.pt"
    torch.save({"number": 2, "weights": torch.ones(1000)}, new)
    torch.save({"number": 1, "weights": torch.zeros(1000)}, old)
    return str(new), str(old)


def number(path) -> int:
    return torch.load(path, weights_only=True)["number"]


def test_a_killed_copy_leaves_the_old_file(files):
    new, old = files
    assert killed(copy_and_die, PathManager.copy, new, old)
    assert number(old) == 1
    assert PathManager.copy(new, old, overwrite=True)
    assert number(old) == number(new) == 2
    assert len(os.listdir(Path(new).parent)) == 2  # what the killed copy left behind is gone


def test_fairseqs_own_copy_would_have_lost_it(files):
    new, old = files
    assert killed(copy_and_die, PathManager.copy.__wrapped__, new, old)
    with pytest.raises(RuntimeError, match="zip archive|central directory"):
        number(old)


def test_a_killed_save_leaves_the_old_file(files):
    _, old = files
    assert killed(save_and_die, old)
    assert number(old) == 1
    checkpoint_utils.torch_persistent_save({"number": 3}, old)
    assert number(old) == 3


def test_a_failed_save_leaves_the_old_file_and_nothing_else(files):
    _, old = files
    with pytest.raises(Exception, match="pickle|local"):
        checkpoint_utils.torch_persistent_save({"number": lambda: 4}, old)
    assert number(old) == 1
    assert len(os.listdir(Path(old).parent)) == 2


def test_the_bytes_reach_the_disk_before_the_name_changes(files, monkeypatch):
    """A machine that loses power keeps the old file or the new one."""
    new, old = files
    done = []
    for name in ("fsync", "replace"):
        stock = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, stock=stock: (done.append(name), stock(*args)))
    PathManager.copy(new, old, overwrite=True)
    checkpoint_utils.torch_persistent_save({"number": 3}, old)
    assert done == ["fsync", "replace"] * 2


def test_installing_twice_changes_nothing():
    installed = PathManager.copy, checkpoint_utils.torch_persistent_save
    save_atomically()
    assert (PathManager.copy, checkpoint_utils.torch_persistent_save) == installed
