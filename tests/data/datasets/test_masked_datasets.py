"""The data sets of masked data modelling: batches, epochs, workers, and what becomes of bad images."""

import logging
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
import torch
from fairseq.data import ListDataset, RoundRobinZipDatasets
from fairseq.data.iterators import EpochBatchIterator
from image_folders import settings, words, write_images

from mhmoe_fairseq.data.datasets.base import DatasetSettings, ImageTextDataset
from mhmoe_fairseq.data.datasets.masked import MaskedImages, MaskedPairs, MaskedTexts
from mhmoe_fairseq.data.images.reading import ImageError, read_image
from mhmoe_fairseq.data.images.transforms import EvaluationViews, PretrainingViews
from mhmoe_fairseq.data.multimodal.index import read_index, write_index

COUNT = 7
LENGTHS = [3, 1, 12, 0, 8, 5, 9]  # of the texts; at most 8 fit beside <s> and </s>


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    paths = write_images(folder, COUNT)
    write_index(folder / "image.train.jsonl", "image", [{"image_path": path} for path in paths])
    records = [
        {"image_path": path, "text_segment": words(number, LENGTHS[number]), "image_id": number}
        for number, path in enumerate(paths)
    ]
    write_index(folder / "pair.train.jsonl", "pair", records)
    return folder


def lines(*lengths: int) -> ListDataset:
    items = [torch.tensor([*words(number, length), 2]) for number, length in enumerate(lengths)]
    return ListDataset(items, np.array([len(item) for item in items]))


def images(folder: Path, **changes: Any) -> MaskedImages:
    return MaskedImages(read_index(folder, "image", "train"), settings(folder, **changes), PretrainingViews(32, 16))


def pairs(folder: Path, **changes: Any) -> MaskedPairs:
    return MaskedPairs(read_index(folder, "pair", "train"), settings(folder, **changes), PretrainingViews(32, 16))


def texts(folder: Path, *lengths: int, **changes: Any) -> MaskedTexts:
    return MaskedTexts(lines(*lengths), settings(folder, **changes))


def batch_of(dataset: ImageTextDataset, *rows: int) -> dict[str, Any]:
    return dataset.collater([dataset[row] for row in (rows or range(len(dataset)))])


def is_same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(is_same(first[key], second[key]) for key in first)
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def test_a_batch_of_images(folder):
    batch = batch_of(images(folder), 2, 0, 5)
    assert batch["id"].tolist() == [2, 0, 5] and "modality" not in batch
    assert batch["net_input"]["images"].shape == (3, 3, 32, 32)
    assert batch["tokenizer_images"].shape == (3, 3, 16, 16) and batch["tokenizer_images"].dtype == torch.uint8
    plain = MaskedImages(read_index(folder, "image", "train"), settings(folder), EvaluationViews(32, 16))
    view = EvaluationViews(32, 16)(read_image(folder / "images/2.png"))[1]
    assert torch.equal(plain[2]["tokenizer_image"] / 255, view)  # nothing is lost
    masked = batch["net_input"]["masked_patches"]
    assert masked.dtype == torch.bool and masked.shape == (3, 16) and masked.sum(1).tolist() == [6, 6, 6]
    assert (batch["nsentences"], batch["ntokens"], batch["num_replaced"]) == (3, 18, 0)
    assert batch["net_input"]["text_tokens"] is None and batch["text_targets"] is None


def test_a_batch_of_pairs(folder):
    dataset = pairs(folder)
    batch = batch_of(dataset)
    tokens, targets = batch["net_input"]["text_tokens"], batch["text_targets"]
    assert tokens.shape == targets.shape == (7, 10)
    assert tokens.ne(1).sum(1).tolist() == [min(length, 8) + 2 for length in LENGTHS]  # cut, and right-padded
    for row, length in enumerate(LENGTHS):
        original = torch.tensor([0, *words(row, length)[:8], 2])
        kept = tokens[row, : len(original)]
        is_target = targets[row, : len(original)] != 1
        assert torch.equal(kept[~is_target], original[~is_target])
        assert torch.equal(targets[row, : len(original)][is_target], original[is_target])
        assert int(is_target.sum()) == (max(1, (min(length, 8) + 1) // 2) if length else 0)
    assert batch["ntokens"] == 7 * 6 + int(targets.ne(1).sum())
    assert batch["num_positions"] == sum(17 + min(length, 8) + 2 for length in LENGTHS)
    assert batch["masked_token_indices"].tolist() == [
        index for index in range(70) if targets[index // 10, index % 10] != 1
    ]
    masked = batch["net_input"]["masked_patches"]
    assert batch["masked_patch_indices"].tolist() == [index for index in range(112) if masked[index // 16, index % 16]]
    assert batch["net_input"]["images"].shape == (7, 3, 32, 32)
    assert dataset.sizes.tolist() == [17 + min(length, 8) + 2 for length in LENGTHS]


def test_lines_become_pieces_and_no_text_is_lost(folder):
    lengths = [3, 0, 8, 9, 0, 30, 1]
    dataset = texts(folder, *lengths, training=False)
    assert len(dataset) == 1 + 1 + 2 + 4 + 1
    pieces = []
    for row in range(len(dataset)):
        sample = dataset[row]
        text = torch.where(sample["text_targets"] != 1, sample["text_targets"], sample["text"]).tolist()
        assert text[0] == 0 and text[-1] == 2 and len(text) == dataset.num_tokens(row) <= 10
        pieces.append(text[1:-1])
    assert sum(pieces, []) == sum((words(number, length) for number, length in enumerate(lengths)), [])
    assert sorted(map(len, pieces[2:4])) == [4, 5] and {len(piece) for piece in pieces[4:8]} == {7, 8}


def test_a_batch_of_texts(folder):
    batch = batch_of(texts(folder, 3, 6), 0, 1)
    assert batch["net_input"]["text_tokens"].shape == (2, 8)
    assert batch["net_input"]["images"] is batch["net_input"]["masked_patches"] is batch["tokenizer_images"] is None
    assert batch["ntokens"] == 2 == int(batch["text_targets"].ne(1).sum())
    assert batch["masked_patch_indices"] is None and batch["num_positions"] == 5 + 8


def test_no_text_at_all(folder):
    for lengths in ([], [0, 0]):
        with pytest.raises(ValueError, match="the text of this split has no line that is not empty"):
            texts(folder, *lengths)


@pytest.mark.parametrize("make", [images, pairs, lambda folder, **changes: texts(folder, *[9] * 8, **changes)])
def test_masks_and_crops_are_new_in_every_epoch_and_for_every_seed(folder, make):
    dataset = make(folder)
    first = batch_of(dataset)
    assert is_same(batch_of(dataset), first) and is_same(batch_of(make(folder)), first)
    dataset.set_epoch(2)
    second = batch_of(dataset)
    assert not is_same(second, first) and not is_same(batch_of(make(folder, seed=2)), first)
    assert torch.equal(second["id"], first["id"])
    dataset.set_epoch(1)
    assert is_same(batch_of(dataset), first)


def test_a_row_does_not_depend_on_its_neighbours(folder):
    dataset = pairs(folder)
    together = batch_of(dataset)
    for row in range(COUNT):
        alone = batch_of(dataset, row)
        assert torch.equal(alone["net_input"]["images"][0], together["net_input"]["images"][row])
        assert torch.equal(alone["net_input"]["masked_patches"][0], together["net_input"]["masked_patches"][row])


def test_data_sets_draw_apart(folder):
    """The images of both are the same, the masks are not."""
    one, other = batch_of(images(folder)), batch_of(pairs(folder))
    assert not torch.equal(one["net_input"]["masked_patches"], other["net_input"]["masked_patches"])


def test_evaluation_is_the_same_every_time(folder):
    index = read_index(folder, "pair", "train")
    dataset = MaskedPairs(index, settings(folder, training=False), EvaluationViews(32, 16))
    first = batch_of(dataset)
    dataset.set_epoch(5)
    assert is_same(batch_of(dataset), first) and dataset.can_reuse_epoch_itr_across_epochs
    assert dataset.ordered_indices().tolist() == list(range(COUNT))
    whole = EvaluationViews(32, 16)(read_image(folder / "images/3.png"))
    assert torch.equal(first["net_input"]["images"][3], whole[0])


def test_training_order_is_new_in_every_epoch(folder):
    dataset = texts(folder, *[4] * 30)
    orders = []
    for epoch in (1, 2, 1):
        dataset.set_epoch(epoch)
        orders.append(dataset.ordered_indices().tolist())
    assert orders[0] == orders[2] != orders[1] and sorted(orders[1]) == list(range(30))
    assert not dataset.can_reuse_epoch_itr_across_epochs


def epoch_of(dataset: ImageTextDataset, epoch: int, workers: int) -> Iterator[dict[str, Any]]:
    """Batches as fairseq's trainer gets them."""
    dataset.set_epoch(epoch)
    batches = dataset.batch_by_size(dataset.ordered_indices(), max_sentences=2, required_batch_size_multiple=8)
    iterator = EpochBatchIterator(
        dataset, dataset.collater, batches, seed=1, num_workers=workers, epoch=epoch
    ).next_epoch_itr(shuffle=True)
    return list(iterator)


def test_workers_change_nothing(folder):
    alone = [epoch_of(pairs(folder), epoch, 0) for epoch in (1, 2)]
    dataset = pairs(folder)
    shared = [epoch_of(dataset, epoch, 2) for epoch in (1, 2)]
    assert [len(batches) for batches in alone] == [4, 4]  # 7 samples in twos: the last batch is not dropped
    assert all(is_same(one, two) for first, second in zip(alone, shared) for one, two in zip(first, second))
    assert not is_same(alone[0][0], alone[1][0])


def test_batches_of_so_many_positions(folder):
    dataset = pairs(folder)
    longest = dataset.num_tokens(2)
    batches = dataset.batch_by_size(dataset.ordered_indices(), max_tokens=2 * longest, required_batch_size_multiple=8)
    assert sorted(row for batch in batches for row in batch) == list(range(COUNT)) and max(map(len, batches)) == 2
    with pytest.raises(ValueError, match=rf"--max-tokens \({longest - 1}\) must be at least {longest}"):
        dataset.batch_by_size(dataset.ordered_indices(), max_tokens=longest - 1)
    assert len(dataset.filter_indices_by_size(np.arange(COUNT), 3)[0]) == COUNT  # texts are cut, none is left out


def test_in_fairseqs_round_robin(folder):
    parts = {"image": images(folder), "text": texts(folder, 3, 4, 5), "pair": pairs(folder)}
    zipped = RoundRobinZipDatasets(parts)
    indices = zipped.ordered_indices()
    batch = zipped.collater([zipped[index] for index in indices[:4]])
    assert {key: part["nsentences"] for key, part in batch.items()} == dict.fromkeys(parts, 4)
    given = {
        key: [name for name, value in part["net_input"].items() if value is not None] for key, part in batch.items()
    }
    assert given["image"] == ["images", "masked_patches"] and given["text"] == ["text_tokens"]
    assert given["pair"] == ["text_tokens", "images", "masked_patches"]


def test_no_sample_is_no_batch(folder):
    assert images(folder).collater([]) == texts(folder, 3).collater([]) == {}


def damaged(folder: Path, tmp_path: Path, *numbers: int) -> Path:
    """A copy of the folder in which these images are cut off."""
    for file in (folder / "images").iterdir():
        (tmp_path / "images").mkdir(exist_ok=True)
        content = file.read_bytes()
        is_bad = int(file.stem) in numbers
        (tmp_path / "images" / file.name).write_bytes(content[: len(content) // 2] if is_bad else content)
    for file in folder.glob("*.jsonl"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_bad_image_is_refused_with_line_file_and_rule(folder, tmp_path):
    copy = damaged(folder, tmp_path, 2)
    rule = r"pair\.train\.jsonl:3: .*images/2\.png: truncated or damaged image"
    with pytest.raises(ImageError, match=rule):
        batch_of(pairs(copy))
    with pytest.raises(ImageError, match=rule):  # an evaluation is of the whole split, or of none
        batch_of(pairs(copy, training=False, skip_bad_images=True))
    (copy / "images/0.png").unlink()
    with pytest.raises(ImageError, match=r"image\.train\.jsonl:1: .*images/0\.png: no such image"):
        images(copy)[0]


def test_the_next_good_one_takes_its_place(folder, tmp_path, caplog):
    copy = damaged(folder, tmp_path, 2, 3, 6)
    dataset = pairs(copy, skip_bad_images=True)
    with caplog.at_level(logging.WARNING):
        batch = batch_of(dataset)
        batch_of(dataset)
    assert batch["id"].tolist() == [0, 1, 4, 4, 4, 5, 0]
    assert (batch["nsentences"], batch["num_replaced"]) == (7, 3)
    assert len(caplog.records) == 3  # each image once
    assert "images/3.png: truncated or damaged image" in caplog.text
    assert "another sample takes its place" in caplog.text
    untouched = batch_of(pairs(folder))
    for row in (0, 1, 4, 5):
        assert torch.equal(batch["net_input"]["images"][row], untouched["net_input"]["images"][row])
    again = batch_of(pairs(copy, skip_bad_images=True))
    assert is_same(again, batch)
    masks = batch["net_input"]["masked_patches"]
    assert not torch.equal(masks[2], masks[4]) or not torch.equal(masks[3], masks[4])  # the row's own draws


def test_no_good_image_at_all(folder, tmp_path):
    dataset = pairs(damaged(folder, tmp_path, *range(COUNT)), skip_bad_images=True)
    with pytest.raises(ImageError, match=r"pair\.train\.jsonl:5: no good image in 7 rows from here on"):
        dataset[4]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"patch_size": 7}, r"--img-size \(32\) must be a multiple of --patch-size \(7\)"),
        ({"patch_size": 0}, r"--img-size \(32\) must be a multiple of --patch-size \(0\)"),
        ({"patch_size": 64}, r"--img-size \(32\) must be a multiple of --patch-size \(64\)"),
        ({"max_text_length": 2}, r"--max-text-length \(2\) must be at least 3"),
    ],
)
def test_settings_that_do_not_fit(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(folder, **changes)


def test_fractions_that_do_not_fit(folder):
    index = read_index(folder, "pair", "train")
    views = PretrainingViews(32, 16)
    with pytest.raises(ValueError, match=r"--image-mask-prob \(0\)"):
        MaskedImages(index, settings(folder), views, 0)
    with pytest.raises(ValueError, match=r"--pair-text-mask-prob \(1\)"):
        MaskedPairs(index, settings(folder), views, 0.4, 1)
    with pytest.raises(ValueError, match=r"--text-mask-prob \(2\)"):
        MaskedTexts(lines(3), settings(folder), 2)


def test_a_dictionary_without_mask(folder):
    dictionary = settings(folder).dictionary.__class__()
    plain = DatasetSettings(folder, dictionary, 32, 8, 10)
    with pytest.raises(ValueError, match="the dictionary has no <mask>"):
        MaskedTexts(lines(3), plain)
