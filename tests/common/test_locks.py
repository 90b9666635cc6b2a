"""One run at a time writes to a folder, and a dead one keeps nobody out."""

import errno
import fcntl
import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from console import SERVER, train, write_corpus

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.common.locks import LOCK, exclusive_lock, hold_folder
from mhmoe_fairseq.training.checks import hold_save_dir


def hold_and_fork(folder: str, told) -> None:
    """A process that holds a folder, twice, and has a child, as one that loads data."""
    for _ in range(2):
        hold_folder(Path(folder), "--save-dir")
    child = os.fork()
    if child:
        told.send(child)
    time.sleep(60)


def is_free(folder: Path) -> bool:
    with open(folder / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_the_lock_keeps_others_out_and_is_free_afterwards(tmp_path):
    with exclusive_lock(tmp_path / "new" / LOCK, "--dest"):
        assert not is_free(tmp_path / "new")
        with pytest.raises(UserError, match=f"--dest .*new: another run is writing there .process {os.getpid()} on "):
            with exclusive_lock(tmp_path / "new" / LOCK, "--dest"):
                pass
    assert is_free(tmp_path / "new")


def test_a_killed_holder_keeps_nobody_out_though_its_children_live(tmp_path):
    telling, told = SERVER.Pipe()
    holder = SERVER.Process(target=hold_and_fork, args=(str(tmp_path), telling))
    holder.start()
    child = told.recv()
    try:
        assert not is_free(tmp_path)
        holder.kill()
        holder.join()
        os.kill(child, 0)  # is alive
        hold_folder(tmp_path, "--save-dir")
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    finally:
        os.kill(child, 9)
    assert not is_free(tmp_path)


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING), exclusive_lock(tmp_path / LOCK, "--dest"):
        assert "no lock to be had here (No locks available)" in caplog.text


def test_a_second_training_is_refused_before_it_changes_anything(tmp_path):
    data = write_corpus(tmp_path)
    save_dir = tmp_path / "run"
    save_dir.mkdir()
    (save_dir / "checkpoint_last.pt").write_text("of the first")
    hold_folder(save_dir, "--save-dir")
    log = train(data, save_dir, "mhmoe_lm_tiny", max_update=2, check=False)
    assert f"--save-dir {save_dir}: another run is writing there (process {os.getpid()} on " in log
    assert sorted(path.name for path in save_dir.iterdir()) == [LOCK, "checkpoint_last.pt"]
    assert (save_dir / "checkpoint_last.pt").read_text() == "of the first"


def test_what_does_not_save_needs_no_lock(tmp_path):
    hold_save_dir(SimpleNamespace(save_dir=str(tmp_path), no_save=True))
    hold_save_dir(SimpleNamespace(save_dir=str(tmp_path / "none"), no_save=False))
    assert not list(tmp_path.iterdir())
    hold_save_dir(SimpleNamespace(save_dir=str(tmp_path), no_save=False))
    assert not is_free(tmp_path)
