"""``mhmoe analyze`` and ``mhmoe diversity`` on a really pre-trained, tiny model of images and text."""

from __future__ import annotations

import json

import pytest
import torch
from console import run_console
from image_text_data import prepare_shapes
from images_and_words import training_words

from mhmoe_fairseq.analysis.routing.activation import load_for_evaluation
from mhmoe_fairseq.analysis.routing.diversity import flat_patches, measure_diversity, shown
from mhmoe_fairseq.commands.diversity import choose_images
from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.data.images.reading import read_image
from mhmoe_fairseq.data.images.transforms import EvaluationTransform


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_shapes(tmp_path_factory.mktemp("shapes") / "data")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Checkpoints after 2 and 4 updates, and the last one, which is the latter."""
    folder = tmp_path_factory.mktemp("run") / "mhmoe"
    flags = ["--moe-freq", 1, "--save-interval-updates", 2, "--disable-validation"]
    run_console("fairseq-train", *training_words(data, folder, *flags, updates=4), cwd=data)
    return folder


def command(name, *arguments):
    return main([name, *map(str, arguments)])


@pytest.mark.parametrize("batch_size", [1, 4])  # by ones, most batches have no sample of some modality
def test_analyze_counts_every_position_of_the_split(batch_size, run, data, tmp_path, capsys):
    flags = ("--data", data, "--out", tmp_path)
    assert command("analyze", run / "checkpoint_last.pt", *flags, "--batch-size", batch_size) == 0
    output = capsys.readouterr().out
    activation, modalities = (json.loads((tmp_path / f"{name}-valid.json").read_text())
                              for name in ("activation", "modalities"))  # fmt: skip
    assert modalities["groups"] == ["image", "text", "image of pairs", "text of pairs"]
    heads, top_k = 2, 2
    for group, positions in enumerate(modalities["positions"]):
        assert [sum(load) for load in modalities["load"][group]] == [positions * heads * top_k] * 2
    patches = 17 * sum(1 for _ in open(data / "image.valid.jsonl"))
    assert modalities["positions"][0] == patches
    by_group = torch.tensor(modalities["load"]).sum(0)
    assert torch.equal(by_group, torch.tensor(activation["load"]))
    assert activation["tokens"] == sum(modalities["positions"])
    assert all(1 <= mean <= 4 for means in modalities["distinct"] for mean in means)
    for file in ("activation-valid.png", "modalities-valid-load.png"):
        assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")
    assert f"{activation['tokens']} positions" in output and "| text of pairs " in output


def test_analyze_agrees_with_mhmoe_evaluate_and_keeps_what_it_measured(run, data, tmp_path, capsys):
    checkpoint = run / "checkpoint_last.pt"
    assert command("evaluate", checkpoint, "--data", data, "--split", "test", "--json", tmp_path / "eval.json") == 0
    flags = ("--data", data, "--split", "test", "--out", tmp_path, "--no-plots")
    capsys.readouterr()
    assert command("analyze", checkpoint, *flags) == 0
    first = capsys.readouterr().out
    scores = json.loads((tmp_path / "eval.json").read_text())
    activation = json.loads((tmp_path / "activation-test.json").read_text())
    assert activation["load"] == scores["experts"]["load"]
    assert activation["loss"] == pytest.approx(scores["total"]["loss"], abs=1e-3)
    assert command("analyze", checkpoint, *flags) == 0
    again = capsys.readouterr().out
    assert "measuring" in first and "measuring" not in again
    assert again.splitlines()[1:] == first.splitlines()[2:]


@torch.no_grad()
def test_diversity_counts_the_experts_of_every_patch(run, data):
    """Against routing patch by patch with the model's own layers."""
    images = choose_images(data, "valid", 3)
    assert len(images) == 3
    measured = measure_diversity(run / "checkpoint_last.pt", data, images)
    model, task = load_for_evaluation(run / "checkpoint_last.pt", data)
    transform = EvaluationTransform(task.args.img_size)
    inputs = {}
    for layer, module in enumerate(model.beit3.encoder.layers):
        module.moe_layer.register_forward_pre_hook(lambda module, given, layer=layer: inputs.update({layer: given[0]}))
    for number, path in enumerate(images):
        model(images=transform(read_image(path))[None])
        for place, layer in enumerate(measured.layers):
            moe = model.beit3.encoder.layers[layer].moe_layer
            for patch in range(16):
                subtokens = moe.head_projection(inputs[layer][0, 1 + patch]).view(2, -1)
                experts = {int(expert) for row in moe.router(subtokens) for expert in row.topk(2).indices}
                assert int(measured.counts_BLhw[number, place].flatten()[patch]) == len(experts)
    assert (measured.updates, measured.most) == (4, 4)


def test_the_diversity_command_orders_checkpoints_and_draws(run, data, tmp_path, capsys):
    files = [run / "checkpoint_last.pt", *sorted(run.glob("checkpoint_*_[24].pt"), reverse=True)]
    assert len(files) == 3
    assert command("diversity", *files, "--data", data, "--images", 4, "--out", tmp_path) == 0
    record = json.loads((tmp_path / "diversity.json").read_text())
    assert [entry["updates"] for entry in record["checkpoints"]] == [2, 4]
    assert len(record["images"]) == 4 and all(name.startswith("images/") for name in record["images"])
    for entry in record["checkpoints"]:
        counts = torch.tensor(entry["counts"], dtype=torch.float64)
        assert counts.shape == (4, 2, 4, 4)
        assert entry["mean"] == pytest.approx(float(counts.mean()))
        assert entry["mean_by_layer"] == pytest.approx(counts.mean((0, 2, 3)).tolist())
        assert 1 <= entry["mean_flat"] <= 4 and 1 <= entry["mean_drawn"] <= 4
    for name in ("diversity.png", "diversity-course.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "experts of a patch's sub-tokens, at most 4" in capsys.readouterr().out


def test_single_images_and_no_plots(run, data, tmp_path):
    image = next((data / "images").glob("*.png"))
    flags = ("--data", data, "--image", image, "--out", tmp_path, "--no-plots")
    assert command("diversity", run / "checkpoint_last.pt", *flags) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["diversity.json"]


def test_patches_of_one_colour():
    images = torch.ones(1, 3, 16, 16)
    images[0, 1, 3, 12] = -1.0  # in the upper right patch, in one channel
    assert flat_patches(images, 8).tolist() == [[[True, False], [True, True]]]
    assert shown(images[0]).getpixel((12, 3)) == (255, 0, 255)


def test_images_are_spread_over_the_split(data):
    everything = choose_images(data, "train", 1000)
    assert len(everything) == len(set(everything)) == 12
    few = choose_images(data, "train", 3)
    assert [everything.index(path) for path in few] == [0, 5, 11]
    assert all(path.is_file() for path in few)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--images", "0"), "--images/--pictures (0) must be at least 1"),
        (("--split", "holdout"), "no split 'holdout'"),
        (("--image", "nowhere.png"), "--image (nowhere.png) does not exist"),
    ],
)
def test_bad_input_is_one_line(run, data, capsys, flags, message):
    assert command("diversity", run / "checkpoint_last.pt", "--data", data, "--no-plots", *flags) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and message in error[0]
