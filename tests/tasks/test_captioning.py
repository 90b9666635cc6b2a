"""The captioning task: flags, what splits hold, decoding with a real model, bad data."""

import argparse
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from beit3_models import small_beit3
from image_text_data import IMG_SIZE, PATCH_SIZE, prepare_shapes
from language_models import FAMILIES

from mhmoe_fairseq.checkpoints.open import Opened
from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.data.multimodal.masking import masked_count
from mhmoe_fairseq.evaluation import captions as evaluation
from mhmoe_fairseq.metrics.caption_words import tokenize
from mhmoe_fairseq.metrics.captions import CiderD
from mhmoe_fairseq.models.captions import CaptionSearch, search_captions
from mhmoe_fairseq.tasks.captioning import CaptioningTask

FLAGS = ("--img-size", str(IMG_SIZE), "--patch-size", str(PATCH_SIZE), "--max-text-length", "16")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_shapes(tmp_path_factory.mktemp("shapes") / "data")


@pytest.fixture
def copied(data, tmp_path):
    return shutil.copytree(data, tmp_path / "data")


def build(data, *flags, seed=1):
    parser = argparse.ArgumentParser()
    CaptioningTask.add_args(parser)
    args = parser.parse_args([str(data), *FLAGS, *map(str, flags)])
    common = {"tpu": False, "no_save": True, "seed": seed, "save_dir": "", "restore_file": "checkpoint_last.pt"}
    for name, value in {**common, "finetune_from_model": None}.items():
        setattr(args, name, value)
    return CaptioningTask.setup_task(args)


def batch_of(task, split, epoch=1):
    """All samples of a split."""
    task.load_dataset(split)
    dataset = task.dataset(split)
    dataset.set_epoch(epoch)
    return dataset.collater([dataset[row] for row in range(len(dataset))])


def test_the_flags():
    parser = argparse.ArgumentParser(add_help=False)
    CaptioningTask.add_args(parser)
    own = {flag for action in parser._actions for flag in action.option_strings if "caption" in flag}
    assert own == {"--caption-mask-prob", "--caption-beam", "--caption-length-penalty", "--caption-max-len"}
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--caption-mask-prob", 1.0), r"--caption-mask-prob \(1.0\)"),
        (("--caption-beam", 0), r"--caption-beam \(0\) must be at least 1"),
        (("--caption-max-len", 16), "a caption of 16 tokens is too long: --max-text-length leaves 15 after <s>"),
        (("--caption-length-penalty", -1), r"--caption-length-penalty \(-1.0\) must be in \[0, 100\]"),
    ],
)
def test_bad_flags(data, flags, message):
    with pytest.raises(ValueError, match=message):
        build(data, *flags)


# ---------------------------------------------------------------------- splits


def test_training_masks_are_new_in_every_epoch_and_the_seeds(data):
    batches = {
        (seed, epoch): batch_of(build(data, "--caption-mask-prob", 0.5, seed=seed), "train", epoch)
        for seed, epoch in ((1, 1), (1, 2), (2, 1))
    }
    again = batch_of(build(data, "--caption-mask-prob", 0.5), "train")
    targets = {key: batch["text_targets"] for key, batch in batches.items()}
    assert torch.equal(targets[1, 1], again["text_targets"])
    assert not any(torch.equal(one, two) for one, two in itertools.combinations(targets.values(), 2))
    assert again["net_input"]["images"].shape == (len(again["id"]), 3, IMG_SIZE, IMG_SIZE)


def test_held_out_images_come_with_their_first_reference(data):
    """Masked alike for every seed and epoch; every image once."""
    task = build(data)
    batch, other = batch_of(task, "valid"), batch_of(build(data, seed=5), "valid", epoch=3)
    assert torch.equal(batch["text_targets"], other["text_targets"])
    assert torch.equal(batch["net_input"]["text_tokens"], other["net_input"]["text_tokens"])
    truth = json.loads((data / "coco_karpathy_val_gt.json").read_text())
    captions = {row["image_id"]: row["caption"] for row in reversed(truth["annotations"])}
    assert batch["image_ids"].tolist() == [image["id"] for image in truth["images"]]
    for image, tokens, targets in zip(
        batch["image_ids"].tolist(), batch["net_input"]["text_tokens"], batch["text_targets"]
    ):
        text = task.dataset("valid").settings.text(task.encode(captions[image]))
        kept = targets.eq(task.dictionary.pad())[: len(text)]
        assert torch.equal(tokens[: len(text)][kept], text[kept])
        assert torch.equal(targets[: len(text)][~kept], text[~kept])
    assert batch["ntokens"] == int(batch["text_targets"].ne(task.dictionary.pad()).sum())


def test_ids_and_text(data):
    task = build(data)
    for text in ("small red circle", "large, yellow? bar", "ünïcode ✂"):
        assert task.decode(tuple(task.encode(text))) == text


def test_cider_is_of_the_split(data):
    task = build(data)
    for split, name in (("valid", "val"), ("test", "test")):
        task.load_dataset(split)
        truth = json.loads((data / f"coco_karpathy_{name}_gt.json").read_text())["annotations"]
        by_hand = CiderD([[tokenize(row["caption"])] for row in truth])
        for place, row in enumerate(truth):
            words = tokenize(row["caption"].replace("small", "large"))
            assert task.dataset(split).cider.score(place, words) == pytest.approx(by_hand.score(place, words))


def test_captions_that_nobody_scores_or_keeps_are_not_written(copied, monkeypatch):
    monkeypatch.setattr(evaluation, "find_search", lambda opened, *chosen: opened.task.search)
    (copied / "coco_karpathy_test_gt.json").unlink()
    with pytest.raises(UserError, match="--split test has no captions to score by: give --output FILE"):
        evaluation.evaluate_captions(Opened(torch.nn.Identity(), build(copied), {}, copied / "model.pt"), "test", None)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_validation_scores_each_image_against_its_own_references(copied, split, monkeypatch):
    """In whatever order the index, the ground truth and a batch have the images."""
    name = {"valid": "val"}.get(split, split)
    index = copied / f"coco_captioning.{name}.jsonl"
    index.write_text("".join(reversed(index.read_text().splitlines(keepends=True))))
    task = build(copied)
    task.load_dataset(split)
    dataset = task.dataset(split)
    truth = json.loads((copied / f"coco_karpathy_{name}_gt.json").read_text())["annotations"]
    references = {row["image_id"]: row["caption"] for row in truth}
    keys = list(references)
    by_hand = CiderD([[tokenize(references[key])] for key in keys])
    batch = dataset.collater([dataset[row] for row in (3, 0, 5)])
    written = [references[image] for image in batch["image_ids"].tolist()]
    monkeypatch.setattr(task, "write_captions", lambda model, images: written)
    _, _, log = task.evaluate_batch(batch, torch.nn.Identity(), lambda model, sample: (torch.zeros(()), 1, {}))
    own = [by_hand.score(keys.index(image), tokenize(references[image])) for image in batch["image_ids"].tolist()]
    assert log["captions"] == 3 and log["cider_sum"] == pytest.approx(sum(own))
    others = [by_hand.score(place, tokenize(text)) for text in written for place in range(len(keys))]
    assert sorted(others)[-3:] == pytest.approx(sorted(own))  # any other image's are worse


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("flags, share", [((), 0.7), (("--caption-mask-prob", 0.3), 0.3)])
def test_the_share_of_masked_words_is_the_flags(data, split, flags, share):
    """``</s>`` is one of the words, and masked as often as any other."""
    batch, ends, rows = None, 0, 0
    for epoch in range(1, 9 if split == "train" else 2):
        task = build(data, *flags)
        batch = batch_of(task, split, epoch)
        tokens, targets = batch["net_input"]["text_tokens"], batch["text_targets"]
        words = tokens.ne(task.dictionary.pad()).sum(1) - 1
        assert targets.ne(task.dictionary.pad()).sum(1).tolist() == [masked_count(int(n), share) for n in words]
        ends += int(targets.eq(task.dictionary.eos()).sum())
        rows += len(words)
    assert 0 < ends < rows
    assert split != "train" or abs(ends / rows - share) < 0.15


def test_the_search_is_the_flags(data):
    flags = ("--caption-beam", 2, "--caption-length-penalty", 0.25, "--caption-max-len", 7)
    assert build(data, *flags).search == CaptionSearch(2, 0.25, 7)
    assert build(data).search == CaptionSearch(3, 0.6, 15)
    dictionary = build(data).dictionary
    assert build(data).specials == (
        dictionary.bos(), dictionary.eos(),
        (dictionary.bos(), dictionary.pad(), dictionary.unk(), dictionary.index("<mask>")),
    )  # fmt: skip


# ---------------------------------------------------------------------- decoding


def full_forward(model, task, image):
    """Greedy, with the whole sequence at every step."""
    words, mask = [], task.mask_index
    while len(words) < task.search.max_len - 1:
        tokens = torch.tensor([[task.dictionary.bos(), *words, mask]])
        features, _ = model(text_tokens=tokens, images=image[None], attention="caption")
        scores = model.text_logits(features[0, -1])
        scores[[*task.specials.never, *([] if words else [task.dictionary.eos()])]] = -torch.inf
        if int(scores.argmax()) == task.dictionary.eos():
            break
        words.append(int(scores.argmax()))
    return tuple(words)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy_captions_are_those_of_the_full_forward(data, family):
    task = build(data, "--caption-beam", 1, "--caption-max-len", 6)
    sizes = {"img_size": IMG_SIZE, "patch_size": PATCH_SIZE, "max_text_length": 16}
    model = small_beit3(f"{family}_beit3_tiny", dictionary=task.dictionary, num_visual_tokens=0, **sizes).eval()
    model.text_head.weight.mul_(40)  # an untrained model's scores are nearly alike
    images = batch_of(task, "valid")["net_input"]["images"]
    expected = [full_forward(model, task, image) for image in images]
    found = search_captions(model, images, task.search, task.specials)
    assert [caption.tokens for caption in found] == expected
    assert len(set(expected)) > 1
    assert task.write_captions(model, images) == [task.decode(tokens) for tokens in expected]


@torch.no_grad()
def test_a_beams_score_is_that_of_its_caption(data):
    task = build(data, "--caption-beam", 3, "--caption-max-len", 5)
    sizes = {"img_size": IMG_SIZE, "patch_size": PATCH_SIZE, "max_text_length": 16}
    model = small_beit3(dictionary=task.dictionary, num_visual_tokens=0, **sizes).eval()
    model.text_head.weight.mul_(40)
    images = batch_of(task, "valid")["net_input"]["images"]
    for image, caption in zip(images, search_captions(model, images, task.search, task.specials)):
        total, text = 0.0, [task.dictionary.bos()]
        for token in (*caption.tokens, task.dictionary.eos()):
            features, _ = model(torch.tensor([[*text, task.mask_index]]), image[None], attention="caption")
            total += float(model.text_logits(features[0, -1]).log_softmax(-1)[token])
            text.append(token)
        assert caption.score == pytest.approx(total / (len(caption.tokens) + 1) ** 0.6, abs=1e-4)


# ---------------------------------------------------------------------- bad data


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("coco_karpathy_val_gt.json", None, "coco_karpathy_val_gt.json is missing"),
        ("coco_captioning.val.jsonl", None, "coco_captioning.val.jsonl is missing"),
        ("sentencepiece.model", None, "sentencepiece.model is missing"),
        ("coco_captioning.val.jsonl", '"image_id": 12|"image_id": 999', "1 of 6 images have no reference caption"),
        ("coco_captioning.val.jsonl", "{|", r"coco_captioning.val.jsonl:1: "),
    ],
)
def test_bad_files_are_named(copied, file, change, message):
    path: Path = copied / file
    if change is None:
        path.unlink()
    else:
        old, new = change.split("|")
        path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(copied).load_dataset("valid")


def test_training_needs_captions(copied):
    path = copied / "coco_captioning.train.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps({**row, "text_segment": None}) + "\n")
    with pytest.raises(ValueError, match=r"coco_captioning.train.jsonl:1: text_segment is null"):
        build(copied).load_dataset("train")
