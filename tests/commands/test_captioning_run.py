"""Fine-tuning on captions through fairseq-train, and mhmoe evaluate and generate with its result."""

import itertools
import json
import re

import pytest
import torch
from console import evaluation_record, run_console
from image_text_data import COLOURS, SHAPES, SIZES, prepare_shapes
from images_and_words import training_words

from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.metrics.caption_words import tokenize
from mhmoe_fairseq.metrics.captions import CiderD, read_ground_truth
from mhmoe_fairseq.tasks.masked_multimodal import MaskedMultimodalTaskConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_shapes(tmp_path_factory.mktemp("shapes") / "data")


def captioning_words(data, save_dir, *flags, updates):
    return training_words(
        data, save_dir, "--task", "mhmoe_captioning", "--criterion", "mhmoe_captioning", "--batch-size", 6,
        "--best-checkpoint-metric", "cider", "--maximize-best-checkpoint-metric", *flags, updates=updates,
    )  # fmt: skip


def validations(log):
    return [json.loads(line) for line in re.findall(r"valid[ |:]+(\{.*\})", log)]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A model that has learnt captions a little: the folder and the log."""
    root = tmp_path_factory.mktemp("captioning")
    flags = ["--batch-size", 2, "--validate-interval", 10, "--caption-mask-prob", 0.4, "--label-smoothing", 0]
    flags += ["--lr", 0.01]
    log = run_console("fairseq-train", *captioning_words(data, root / "run", *flags, updates=240), cwd=root)
    return root / "run", log


def training_captions(data):
    """As the source has them: size, colour, shape."""
    held_out = {text for split in ("val", "test") for texts in
                read_ground_truth(data / f"coco_karpathy_{split}_gt.json").values() for text in texts}  # fmt: skip
    return {" ".join(words) for words in itertools.product(SIZES, COLOURS, SHAPES)} - held_out


def caption(*arguments):
    return main(["evaluate", *map(str, arguments)])


def write(*arguments):
    return main(["generate", *map(str, arguments)])


def test_validation_selects_the_checkpoint_by_cider(run):
    records = validations(run[1])
    ciders = [float(record["valid_cider"]) for record in records]
    assert len(ciders) == 4 and max(ciders[1:]) > ciders[0]  # with each of eight seeds
    assert float(records[-1]["valid_best_cider"]) == max(ciders)
    assert float(records[-1]["valid_nll_loss"]) < float(records[0]["valid_nll_loss"])


def test_captions_of_a_split_and_their_scores(run, data, tmp_path, capsys):
    folder, log = run
    flags = ("--split", "valid", "--output", tmp_path / "captions.json", "--no-java", "--batch-size", 4)
    record = evaluation_record(tmp_path, folder / "checkpoint_last.pt", *flags)
    written = json.loads((tmp_path / "captions.json").read_text())
    references = read_ground_truth(data / "coco_karpathy_val_gt.json")
    assert [row["image_id"] for row in written] == list(references)
    assert all(set(row) == {"image_id", "caption"} for row in written)
    # What validation decoded and scored, batch by batch, is the same.
    assert record.main == record.metrics["CIDEr"] and record.experts is None
    assert record.main.value == pytest.approx(float(validations(log)[-1]["valid_cider"]), abs=0.01)
    assert record.main.count == len(references) == 6 and record.settings["beam"] == 3
    known = {word for captions in references.values() for text in captions for word in text.split()}
    assert {word for row in written for word in row["caption"].split()} & known
    output = re.sub(" +", " ", capsys.readouterr().out)
    assert "\nbeam: 3\n" in output and f"| {record.main.value:.2f} |" in output
    assert "METEOR: absent, not asked for" in output
    constant = record.settings["one caption for all"]
    assert constant in training_captions(data) and f"one caption for all: {constant}\n" in output
    assert record.main.baselines["one caption for all"] >= 0 and len(record.metrics) == 6


def test_single_images(run, data, tmp_path, capsys):
    images = sorted((data / "images").glob("*.png"))[:3]
    output = tmp_path / "captions.json"
    assert write(run[0], "--image", *images, "--beam", 1, "--batch-size", 2, "--output", output) == 0
    lines = capsys.readouterr().out.splitlines()
    records = json.loads(output.read_text())
    assert lines == [f"{record['image_path']}: {record['caption']}" for record in records]
    assert [record["image_path"] for record in records] == list(map(str, images))


def test_references_of_other_images_are_noticed_before_anything_is_decoded(run, data, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr("mhmoe_fairseq.evaluation.captions.CaptionDataset")
    moved = tmp_path / "data"
    moved.mkdir()
    for file in data.iterdir():
        (moved / file.name).symlink_to(file)
    truth = json.loads((data / "coco_karpathy_test_gt.json").read_text())
    missing = truth["images"][0]["id"]
    captions = [row for row in truth["annotations"] if row["image_id"] != missing]
    extra = {"image_id": 777, "id": 777, "caption": "an image"}
    for changed, message in (
        ({"images": [*truth["images"], {"id": 777}], "annotations": [*truth["annotations"], extra]},
         "_test_gt.json: 1 of 7 images are not in .*coco_captioning.test.jsonl, first image_id 777"),
        ({"images": truth["images"][1:], "annotations": captions},
         f"coco_captioning.test.jsonl: 1 of 6 images are not in .*_test_gt.json, first image_id {missing}"),
    ):  # fmt: skip
        (moved / "coco_karpathy_test_gt.json").unlink()
        (moved / "coco_karpathy_test_gt.json").write_text(json.dumps(changed))
        assert caption(run[0], "--data", moved) == 2
        assert re.search(message, capsys.readouterr().err)


def test_without_references_there_are_captions_but_no_scores(run, data, tmp_path, capsys):
    moved = tmp_path / "data"
    moved.mkdir()
    for file in data.iterdir():
        if file.name != "coco_karpathy_test_gt.json":
            (moved / file.name).symlink_to(file)
    output = tmp_path / "captions.json"
    assert caption(run[0], "--data", moved, "--output", output) == 0
    assert len(json.loads(output.read_text())) == 6
    assert "CIDEr: absent, the data have no reference captions of this split" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--beam", "0"), "--beam (0) must be at least 1"),
        (("--max-len", "99"), "a caption of 99 tokens is too long: --max-text-length leaves 15"),
        (("--batch-size", "0"), "--batch-size (0) must be at least 1"),
        (("--image", "{data}/dict.txt"), "--image: mhmoe generate CHECKPOINT --image FILE captions single images"),
        (("--split", "train"), "--split train: must be one of valid, test"),
        (("--max-tokens", "8"), "--max-tokens: has no meaning for a checkpoint of task mhmoe_captioning"),
        (("--data", "{data}/images"), "images/dict.txt"),
    ],
)
def test_bad_input_is_one_line(run, data, capsys, flags, message):
    assert caption(run[0], *(flag.format(data=data) for flag in flags)) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("mhmoe evaluate: error: ") and message in error[0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--image", "nowhere.png"), "--image (nowhere.png) does not exist"),
        (("--image", "{data}/dict.txt"), "dict.txt: not an image"),
        (("--image", "{data}/dict.txt", "--sampling"), "--sampling: has no meaning with --image"),
        (("--image", "{data}/dict.txt", "--seed", "0"), "--seed: has no meaning with --image"),
        (("--image", "{data}/dict.txt", "--max-len-b", "9"), "--max-len-b: has no meaning with --image"),
        (("--prompt", "a", "--max-len", "3"), "--max-len: needs --image"),
    ],
)
def test_bad_input_for_single_images_is_one_line(run, data, capsys, flags, message):
    assert write(run[0], *(flag.format(data=data) for flag in flags)) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("mhmoe generate: error: ") and message in error[0]


def test_weights_that_a_model_lacks_are_named(run, data, tmp_path, capsys):
    checkpoint = torch.load(run[0] / "checkpoint_last.pt", weights_only=True)
    known = {
        name: value for name, value in checkpoint["cfg"]["task"].items() if hasattr(MaskedMultimodalTaskConfig, name)
    }
    checkpoint["cfg"]["task"] = {**known, "_name": "mhmoe_masked_multimodal"}
    torch.save(checkpoint, tmp_path / "other.pt")
    assert write(tmp_path / "other.pt", "--image", next((data / "images").glob("*.png"))) == 2
    error = capsys.readouterr().err
    assert "other.pt: cannot be loaded" in error and '"image_head.weight", "image_head.bias"' in error


def test_two_ranks_with_shared_experts_caption_as_one(data, tmp_path, workers2):
    """Three images on one rank, two on the other and then none: all decode until the last is done."""
    flags = ("--batch-size-valid", 2, "--caption-mask-prob", 0.4)
    words = (captioning_words(data, tmp_path / name, *flags, "--update-freq", freq, updates=2)
             for name, freq in (("one", 2), ("two", 1)))  # fmt: skip
    one = run_console("fairseq-train", *next(words), cwd=tmp_path)
    two = workers2.fairseq("fairseq-train", *next(words))[0]
    assert "2 of 2 processes share the experts of a layer" in two
    for record, other in zip(validations(one), validations(two), strict=True):
        for key in ("valid_cider", "valid_loss", "valid_accuracy", "valid_moe_entropy"):
            assert float(other[key]) == pytest.approx(float(record[key]), abs=2e-3)


@pytest.mark.slow
def test_a_pre_trained_model_learns_captions(data, tmp_path):
    """Better than the best single caption for all images; the held-out combinations of words are new."""
    run_console("fairseq-train", *training_words(data, tmp_path / "pretrained", updates=20), cwd=tmp_path)
    flags = ["--finetune-from-model", tmp_path / "pretrained" / "checkpoint_last.pt", "--validate-interval", 25]
    flags += ["--layer-decay", 0.9, "--caption-mask-prob", 0.4, "--lr", 0.005]
    log = run_console("fairseq-train", *captioning_words(data, tmp_path / "run", *flags, updates=400), cwd=tmp_path)
    references = [[tokenize(text) for text in texts] for texts in
                  read_ground_truth(data / "coco_karpathy_val_gt.json").values()]  # fmt: skip
    cider = CiderD(references)
    candidates = [words for image in references for words in image]
    best = max(sum(cider.score(place, words) for place in range(len(cider))) for words in candidates) / len(cider)
    assert float(validations(log)[-1]["valid_best_cider"]) > 100 * best
