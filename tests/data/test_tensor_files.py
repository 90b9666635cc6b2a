"""Files of tensors: objects in them are refused by name and never run, a full disk is one line, the umask decides."""

import contextlib
import os
import resource
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from safetensors.torch import save_file

from mhmoe_fairseq.checkpoints import files as checkpoint_files
from mhmoe_fairseq.checkpoints.official.importing import read_official
from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.common.files import atomic_path
from mhmoe_fairseq.data.tensor_files import load_tensors, save_tensors, without_wrapper
from mhmoe_fairseq.data.visual_tokenizers import load_visual_tokenizer
from mhmoe_fairseq.models.language_model import find_data

READERS: dict[str, Callable[[Path], Any]] = {
    "trained model": checkpoint_files.read_trained,
    "mhmoe checkpoint": checkpoint_files.read_checkpoint,
    "official checkpoint": read_official,
    "visual tokenizer": load_visual_tokenizer,
    "data folder": lambda path: find_data(path, None),
    "fairseq": lambda path: checkpoint_utils.load_checkpoint_to_cpu(str(path)),
}


class Payload:
    """Unpickling it runs a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("reader", READERS)
def test_an_object_in_a_file_is_named_and_not_run_and_nobody_advises_to_run_it(tmp_path: Path, reader: str) -> None:
    path, made = tmp_path / "evil.pt", tmp_path / "made"
    torch.save({"model": {"w": torch.ones(1)}, "cfg": Payload(made), "kind": "vqvae"}, path)
    with pytest.raises(UserError) as caught:
        READERS[reader](path)
    message = str(caught.value)
    assert str(path) in message and f"an object of {os.mkdir.__module__}.mkdir" in message
    assert "weights_only" not in message and "\n" not in message
    assert caught.value.__cause__ is None and caught.value.__suppress_context__  # nor in a traceback
    assert not made.exists()


def test_the_names_of_a_wrapped_model_are_the_models_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"decoder.w": torch.ones(2), "module.odd": torch.zeros(1)}
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    assert list(without_wrapper(wrapped)) == list(weights)
    assert without_wrapper(weights) is weights  # only where all names have it
    torch.save({"model": wrapped, "cfg": {"model": {}}}, tmp_path / "a.pt")
    assert list(checkpoint_files.read_trained(tmp_path / "a.pt")["model"]) == list(weights)
    monkeypatch.setattr(checkpoint_utils, "_upgrade_state_dict", lambda state: state)  # of what old fairseqs saved
    assert list(checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "a.pt"))["model"]) == list(weights)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    checkpoint_files.write_checkpoint({"model": {"w": torch.ones(1)}}, path, overwrite=False)
    before = path.read_bytes()
    with full_disk(50_000), pytest.raises(UserError, match=f"{name}: cannot be written .file too large.: free some"):
        checkpoint_files.write_checkpoint({"model": {"w": torch.ones(100_000)}}, path, overwrite=True)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_ends_a_save_of_tensors_in_one_line(tmp_path: Path) -> None:
    with full_disk(50_000), pytest.raises(UserError, match="a.pt: cannot be written .file too large"):
        save_tensors({"w": torch.ones(100_000)}, tmp_path / "a.pt")
    with full_disk(50_000), pytest.raises(UserError, match="b.pt: cannot be written .file too large"):
        checkpoint_utils.torch_persistent_save({"w": torch.ones(100_000)}, str(tmp_path / "b.pt"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_may_read_a_file(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        for name in ("a.pt", "a.safetensors"):
            checkpoint_files.write_checkpoint({"model": {"w": torch.ones(1)}}, tmp_path / name, overwrite=False)
        with atomic_path(tmp_path / "b") as temporary:
            save_file({"w": torch.ones(1)}, temporary)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def test_a_damaged_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_tensors({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    for mmap in (False, True):
        with pytest.raises(UserError, match="a.pt: no readable checkpoint"):
            load_tensors(path, mmap=mmap)
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "gone.pt")
