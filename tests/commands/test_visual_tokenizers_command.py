"""``mhmoe visual-tokenizer``: fitting both kinds to a prepared folder, describing a file, showing ids."""

import json
import shutil

import pytest
import torch
from image_text_data import prepare_shapes
from PIL import Image

from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.data.visual_tokenizers import load_visual_tokenizer
from mhmoe_fairseq.prepare.visual_tokenizers.fitting import whole_images

SMALL = ["--vocab-size", "12", "--patch-size", "8", "--image-size", "32"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Two dozen prepared images, without a tokenizer of their own."""
    return prepare_shapes(tmp_path_factory.mktemp("shapes") / "data", tokenizer=None)


@pytest.fixture
def run(capsys):
    def call(*arguments):
        status = main(["visual-tokenizer", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_kmeans_from_the_command_line(run, shapes, tmp_path):
    status, out, err = run("fit", shapes, "--output", tmp_path / "a.pt", *SMALL)
    assert (status, err) == (0, "")
    assert "codes used" in out and out.endswith(f"done: {tmp_path / 'a.pt'}\n")
    figures = json.loads((tmp_path / "a.pt.json").read_text())
    assert figures["provenance"]["images"] == 12 and 0 < figures["provenance"]["valid"]["used"] <= 1
    with Image.open(tmp_path / "a.pt.png") as image:
        assert image.size == (6 * 32, 2 * 32)  # six held-out images over what their ids stand for
    run("fit", shapes, "--output", tmp_path / "b.pt", *SMALL)
    first, second = (load_visual_tokenizer(tmp_path / name) for name in ("a.pt", "b.pt"))
    assert torch.equal(first.centroids, second.centroids)


def test_the_small_network_learns_and_is_the_same_twice(run, shapes, tmp_path):
    arguments = [*SMALL, "--kind", "vqvae", "--updates", 40, "--batch-size", 6]
    status, out, _ = run("fit", shapes, "--output", tmp_path / "a.pt", *arguments)
    errors = [
        float(line.split("mean squared error ")[1].split(",")[0]) for line in out.splitlines() if "vqvae " in line
    ]
    assert status == 0 and len(errors) == 10
    assert errors[-1] < 0.7 * errors[0]
    run("fit", shapes, "--output", tmp_path / "b.pt", *arguments)
    first, second = (load_visual_tokenizer(tmp_path / name) for name in ("a.pt", "b.pt"))
    images = whole_images(shapes, "test", 32, 6, seed=0)
    ids = first.encode(images)
    assert ids.shape == (6, 16) and len(ids.unique()) > 3 and int(ids.max()) < 12
    assert torch.equal(ids, second.encode(images))
    decoded = first.decode(ids)
    white = torch.ones_like(images)
    assert (decoded - images).square().mean() < (white - images).square().mean()


def test_info_and_encode(run, shapes, tmp_path):
    run("fit", shapes, "--output", tmp_path / "a.pt", *SMALL)
    status, out, _ = run("info", tmp_path / "a.pt")
    assert status == 0
    assert {name: json.loads(out)[name] for name in ("kind", "vocab_size", "token_shape", "parameters")} == {
        "kind": "patch_kmeans", "vocab_size": 12, "token_shape": [4, 4], "parameters": 12 * 192 + 192,
    }  # fmt: skip
    image = shapes / "images" / "large-red-circle.png"
    status, out, _ = run("encode", tmp_path / "a.pt", image)
    assert status == 0
    ids = torch.tensor(json.loads(out)["ids"])
    assert ids.shape == (4, 4) and ids[0, 0] == ids[0, 3] and ids[0, 0] != ids[1, 1]  # white corners, a red middle


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", "1"], "--vocab-size (1) must be at least 2"),
        (["--image-size", "30"], "--image-size 30: must be a multiple of --patch-size 8"),
        (["--iterations", "0"], "--iterations (0) must be at least 1"),
        (["--max-patches", "0"], "--max-patches (0) must be at least 1"),
        (["--vocab-size", "5000"], "5000 codes (--vocab-size, in mhmoe prepare --visual-vocab-size): more than the"),
        (["--kind", "vqvae", "--updates", "0"], "--updates (0) must be at least 1"),
        (["--kind", "vqvae", "--lr", "2"], "--lr (2) must be in (0, 1)"),
        (["--kind", "vqvae", "--device", "nothing"], "--device (nothing): PyTorch cannot use it here"),
    ],
)
def test_bad_flags_are_one_line(run, shapes, tmp_path, arguments, message):
    status, _, err = run("fit", shapes, "--output", tmp_path / "a.pt", *SMALL, *arguments)
    assert status == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "a.pt").exists()


def test_held_out_images_are_read_before_anything_is_fitted(run, shapes, tmp_path):
    folder = shutil.copytree(shapes, tmp_path / "data")
    (folder / "image.valid.jsonl").write_text("")
    status, out, err = run("fit", folder, "--output", tmp_path / "a.pt", *SMALL)
    assert status == 2 and "image.valid.jsonl" in err and "codes used" not in out


def test_files_are_not_replaced_and_folders_without_images_refused(run, shapes, tmp_path):
    (tmp_path / "a.pt").write_text("mine")
    status, _, err = run("fit", shapes, "--output", tmp_path / "a.pt", *SMALL)
    assert status == 2 and "is there already" in err and (tmp_path / "a.pt").read_text() == "mine"
    status, _, err = run("fit", tmp_path, *SMALL)
    assert status == 2 and "has no image.train.jsonl" in err
    status, _, err = run("info", tmp_path / "a.pt")
    assert status == 2 and "no readable visual tokenizer" in err
