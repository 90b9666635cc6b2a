"""Checkpoints on disk: nothing lost in safetensors, nothing run, no file half written."""

import json
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mhmoe_fairseq.checkpoints.files import TensorTable, check_output, decode, encode, read_checkpoint, write_checkpoint
from mhmoe_fairseq.common.errors import UserError


def assert_same(ours: object, theirs: object, place: str = "checkpoint") -> None:
    """Equal in type, order and every bit."""
    assert type(ours) is type(theirs), place
    if torch.is_tensor(ours):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), place
        assert torch.equal(as_bytes(ours), as_bytes(theirs)), place
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs), place
        for key, value in ours.items():
            assert_same(value, theirs[key], f"{place}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), place
        for index, value in enumerate(ours):
            assert_same(value, theirs[index], f"{place}.{index}")
    else:
        assert repr(ours) == repr(theirs), place


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def small_checkpoint() -> dict:
    """Every kind of value that fairseq's checkpoints hold, and some that they might."""
    tied = torch.randn(5, 4)
    return {
        "args": None,
        "cfg": {"model": {"_name": "mhmoe_lm_tiny", "lr": [0.1, 1e-300, float("inf")], "on": True, "$odd": 1}},
        "model": OrderedDict(
            [("a.weight", tied), ("b.weight", tied), ("half", torch.randn(3).bfloat16()), ("n", torch.arange(4))]
        ),
        "optimizer_history": [{"num_updates": 60, "lr_scheduler_state": {"best": None}}],
        "task_state": {},
        "extra_state": {"metrics": OrderedDict(train=[(10, "loss", {"sum": torch.tensor(-0.0), "none": None})])},
        "last_optimizer_state": {
            "state": {
                0: {"step": 60, "exp_avg": torch.tensor([float("nan"), 1e-45])},
                1: {"step": 0, "exp_avg": torch.zeros(0, 3)},
            },
            "param_groups": [{"betas": (0.9, 0.98), "params": [0, 1], "big": 2**80}],
        },
    }


def test_nothing_is_lost_in_safetensors_and_tied_weights_stay_tied(tmp_path: Path) -> None:
    original = small_checkpoint()
    write_checkpoint(original, tmp_path / "a.safetensors", overwrite=False)
    write_checkpoint(read_checkpoint(tmp_path / "a.safetensors"), tmp_path / "b.pt", overwrite=False)
    again = read_checkpoint(tmp_path / "b.pt")
    assert_same(original, again)
    assert again["model"]["a.weight"].data_ptr() == again["model"]["b.weight"].data_ptr()


def test_other_software_reads_weights_by_their_names_and_the_configuration_as_json(tmp_path: Path) -> None:
    original = small_checkpoint()
    write_checkpoint(original, tmp_path / "a.safetensors", overwrite=False)
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert torch.equal(tensors["a.weight"], original["model"]["a.weight"]) and "b.weight" not in tensors
    assert set(tensors) == {
        "a.weight", "half", "n", "last_optimizer_state.state.0.exp_avg", "last_optimizer_state.state.1.exp_avg",
    }  # fmt: skip
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert "mhmoe_lm_tiny" in json.dumps(json.loads(metadata["cfg"]))


def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    bank = torch.randn(1000, 100)
    write_checkpoint({"model": {"row": bank[3]}}, tmp_path / "a.pt", overwrite=False)
    assert (tmp_path / "a.pt").stat().st_size < 4000
    assert torch.equal(read_checkpoint(tmp_path / "a.pt")["model"]["row"], bank[3])


def test_two_tensors_of_one_name_both_survive() -> None:
    table = TensorTable()
    value = {"x.y": torch.ones(2), "x": {"y": torch.zeros(2)}}
    encoded = json.loads(json.dumps(encode(value, table, ("extra",))))
    assert_same(value, decode(encoded, table.tensors))


def test_objects_are_refused_by_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a.safetensors: .*extra_state.odd is a Path|PosixPath"):
        write_checkpoint({"extra_state": {"odd": tmp_path}}, tmp_path / "a.safetensors", overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model": {}, "cfg": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil.pt: refused, not run: it holds an object of getattr, and"):
        read_checkpoint(tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError, match="plain.pt: no readable checkpoint .it is not a file of torch.save"):
        read_checkpoint(tmp_path / "plain.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"mhmoe_checkpoint": "7"}, "its layout 7 is not known"),
        ({"mhmoe_checkpoint": "1", "cfg": "null"}, "metadata are damaged .*checkpoint"),
        ({"mhmoe_checkpoint": "1", "cfg": "null", "checkpoint": "{"}, "metadata are damaged"),
        ({"mhmoe_checkpoint": "1", "cfg": "null", "checkpoint": '{"a": {"$tensor": "no"}}'}, "damaged .*no"),
        ({"mhmoe_checkpoint": "1", "cfg": "null", "checkpoint": '{"a": {"$scalar": ["load", "00"]}}'}, "no dtype"),
        ({"mhmoe_checkpoint": "1", "cfg": "null", "checkpoint": "[" * 100_000 + "]" * 100_000}, "damaged"),
    ],
)
def test_damaged_metadata_are_one_clear_error(tmp_path: Path, metadata: dict, message: str) -> None:
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors", metadata)
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "a.safetensors")


def test_a_truncated_file_is_one_clear_error(tmp_path: Path) -> None:
    for name in ("a.pt", "a.safetensors"):
        write_checkpoint(small_checkpoint(), tmp_path / name, overwrite=False)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=f"{name}: no readable checkpoint"):
            read_checkpoint(tmp_path / name)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_checkpoint({"model": {"w": torch.ones(1)}}, path, overwrite=False)
    with pytest.raises(UserError, match="does not fit into safetensors"):
        write_checkpoint({"model": {"w": torch.ones(1)}, "odd": object()}, path, overwrite=True)
    assert torch.equal(read_checkpoint(path)["model"]["w"], torch.ones(1))
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_existing_files_unknown_suffixes_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").touch()
    (tmp_path / "folder.pt").mkdir()
    for name, message in (("a.pt", "exists: give --overwrite"), ("a.bin", "must end in .pt or .safetensors"),
                          ("folder.pt", "is a folder"), ("a:b.pt", "must have no ':' in its path")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            check_output(tmp_path / name, overwrite=False)
    check_output(tmp_path / "a.pt", overwrite=True)
