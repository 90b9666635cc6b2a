"""``mhmoe analyze`` on a really pre-trained, tiny model of images and text."""

import json
import shutil

import pytest
import torch
from browser import Page, as_shown, chosen_anew, needs_browser, shown_subtokens
from console import evaluation_record, run_console
from image_text_data import prepare_shapes
from images_and_words import training_words

from mhmoe_fairseq.analysis.routing.diversity import flat_patches, measure_diversity, prepare_images, shown
from mhmoe_fairseq.checkpoints.open import open_model
from mhmoe_fairseq.commands.analyze import choose_images
from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.data.images.reading import read_image
from mhmoe_fairseq.data.images.transforms import EvaluationTransform
from mhmoe_fairseq.data.vocabularies import MODEL_FILE, read_vocabulary
from mhmoe_fairseq.evaluation.records import read_record


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
    record = read_record(tmp_path / "routing-valid.json")
    assert list(record.parts) == record.experts.parts == ["image", "text", "image of pairs", "text of pairs"]
    heads, top_k = 2, 2
    for part, metrics in record.parts.items():
        spread = metrics["experts per position"]
        assert [sum(row.loads) for row in record.experts.of(part).layers] == [spread.count * heads * top_k] * 2
        assert all(1 <= mean <= 4 for mean in record.settings["experts_per_position"][part])
        assert f"| {part} " in output
    assert record.parts["image"]["experts per position"].count == 17 * sum(1 for _ in open(data / "image.valid.jsonl"))
    by_part = torch.tensor([[row.loads for row in record.experts.of(part).layers] for part in record.parts])
    assert by_part.sum(0).tolist() == [row.loads for row in record.experts.of(None).layers]
    for file in ("routing-valid.png", "routing-valid-load.png"):
        assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")
    assert "4 at most" in output and "in common" in output


def test_analyze_agrees_with_mhmoe_evaluate(run, data, tmp_path):
    checkpoint, flags = run / "checkpoint_last.pt", ("--data", data, "--split", "test")
    evaluated = evaluation_record(tmp_path, checkpoint, *flags)
    assert command("analyze", checkpoint, *flags, "--out", tmp_path, "--no-plots") == 0
    record = read_record(tmp_path / "routing-test.json")
    assert record.experts.of(None) == evaluated.experts.of(None)
    assert record.metrics["loss"].value == pytest.approx(evaluated.metrics["loss"].value, abs=1e-6)


@torch.no_grad()
def test_diversity_counts_the_experts_of_every_patch(run, data):
    """Against routing patch by patch with the model's own layers."""
    images = choose_images(data, "valid", 3)
    assert len(images) == 3
    origin = {"path": str(run / "checkpoint_last.pt"), "sha256": "", "updates": 4}
    measured = measure_diversity(origin, data, prepare_images(images, 32))
    opened = open_model(run / "checkpoint_last.pt", data)
    model, task = opened.model, opened.task
    transform = EvaluationTransform(task.args.img_size)
    inputs = {}
    for layer, module in enumerate(model.beit3.encoder.layers):
        module.moe_layer.register_forward_pre_hook(lambda module, given, layer=layer: inputs.update({layer: given[0]}))
    for number, path in enumerate(images):
        model(images=transform(read_image(path))[None])
        for index, layer in enumerate(measured["layers"]):
            moe = model.beit3.encoder.layers[layer].moe_layer
            for patch in range(16):
                subtokens = moe.head_projection(inputs[layer][0, 1 + patch]).view(2, -1)
                experts = {int(expert) for row in moe.router(subtokens) for expert in row.topk(2).indices}
                assert measured["counts"][number][index][patch // 4][patch % 4] == len(experts)
    assert (measured["updates"], measured["most"]) == (4, 4)


def test_diversity_orders_checkpoints_and_draws(run, data, tmp_path, capsys):
    files = [run / "checkpoint_last.pt", *sorted(run.glob("checkpoint_*_[24].pt"), reverse=True)]
    assert len(files) == 3
    assert command("analyze", "--diversity", *files, "--data", data, "--images", 4, "--out", tmp_path) == 0
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


def test_diversity_is_of_one_training(run, data, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other") / "checkpoint_last.pt"
    assert command("analyze", "--diversity", run / "checkpoint_last.pt", other, "--data", data, "--no-plots") == 2
    assert "--diversity: follows one training, and the checkpoints lie in 2 folders" in capsys.readouterr().err


@needs_browser
def test_a_page_of_pairs_shows_patches_and_words_in_a_browser(run, data, tmp_path, capsys):
    images, words = choose_images(data, "valid", 2), [tmp_path / "one.txt", tmp_path / "two.txt"]
    words[0].write_text("large red circle\n")
    words[1].write_text("small\n blue bar")
    flags = ("--data", data, "--view", "--out", tmp_path, "--image", *images, "--text")
    assert command("analyze", run / "checkpoint_last.pt", *flags, *words) == 0
    opened = open_model(run / "checkpoint_last.pt", data)
    text = read_vocabulary(data / MODEL_FILE).encode_lines(["small blue bar"])[0]
    given = {"text_tokens": torch.tensor([[0, *text, 2]]), "images": prepare_images(images, 32)[1:]}
    layer = opened.model.beit3.encoder.layers[1].moe_layer
    chosen = chosen_anew(layer, opened.model, **given)
    for position in (7, 19):  # a patch, and a word's piece
        page = Page(tmp_path / "view.html", f"sample=2&layer=2&token={position}")
        assert len(page.of("token")) == len(chosen) == 17 + 2 + len(text)
        assert shown_subtokens(page) == as_shown(chosen[position - 1])
    [label] = [attrs["aria-label"] for attrs, _ in page.of("token") if attrs["data-token"] == "6"]
    assert label.startswith("patch, row 2, column 1: experts ")
    (tmp_path / "long.txt").write_text("large red circle " * 9)
    assert command("analyze", run / "checkpoint_last.pt", *flags[:5], "--text", tmp_path / "long.txt") == 2
    assert "the model's texts have at most 16" in capsys.readouterr().err


def test_words_are_looked_for_in_language_models_alone(run, data, tmp_path, capsys):
    (tmp_path / "words.json").write_text('{"polysemous": ["red"], "control": ["bar"]}')
    flags = ("--data", data, "--polysemy", tmp_path / "words.json", "--out", tmp_path / "out")
    assert command("analyze", run / "checkpoint_last.pt", *flags) == 2
    assert "is no language model: --polysemy looks at the words of text" in capsys.readouterr().err


def test_single_images_and_no_plots(run, data, tmp_path):
    image = next((data / "images").glob("*.png"))
    flags = ("--data", data, "--image", image, "--out", tmp_path, "--no-plots")
    assert command("analyze", "--diversity", run / "checkpoint_last.pt", *flags) == 0
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
    assert command("analyze", "--diversity", run / "checkpoint_last.pt", "--data", data, "--no-plots", *flags) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and message in error[0]
