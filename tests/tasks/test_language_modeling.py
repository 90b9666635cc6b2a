"""The task: binarised data checked before use, nothing lost, shards and documents."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from fairseq.tasks import TASK_REGISTRY

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.tasks.language_modeling import MHMoELanguageModelingTask

DOCUMENT_END: list[int] = []  # an empty line


def write_split(prefix, lines, dtype=np.uint16):
    builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for line in lines:
        builder.add_item(torch.tensor([*line, Dictionary().eos()]))
    builder.finalize(f"{prefix}.idx")


def random_lines(count, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(4, 24, size=generator.integers(1, 9)).tolist() for _ in range(count)]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    dictionary = Dictionary()
    for number in range(20):
        dictionary.add_symbol(f"w{number}")
    dictionary.save(str(folder / "dict.txt"))
    for split, count in (("train", 37), ("valid", 11), ("test", 13)):
        write_split(folder / split, random_lines(count))
    return folder


def task_for(data, **changes):
    parser = argparse.ArgumentParser()
    MHMoELanguageModelingTask.add_args(parser)
    args = parser.parse_args([str(data)])
    defaults = {
        "tpu": False, "seed": 1, "dataset_impl": None, "use_plasma_view": False, "plasma_path": "",
        "batch_size": None, "batch_size_valid": None, "data_buffer_size": 10,
    }  # fmt: skip
    for name, value in {**defaults, "tokens_per_sample": 16, **changes}.items():
        setattr(args, name, value)
    return MHMoELanguageModelingTask.setup_task(args)


def targets(task, split, **batching):
    iterator = task.get_batch_iterator(task.dataset(split), **batching).next_epoch_itr(shuffle=False)
    return [batch["target"] for batch in iterator]


def test_the_task_is_registered():
    assert TASK_REGISTRY["mhmoe_language_modeling"] is MHMoELanguageModelingTask


# ---------------------------------------------------------------------- nothing is lost


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("batching", [{"max_sentences": 3}, {"max_sentences": 8}, {"max_tokens": 50}])
@pytest.mark.parametrize("mode", ["none", "complete"])
def test_every_token_is_in_some_batch(data, multiple, batching, mode):
    task = task_for(data, sample_break_mode=mode)
    for split, count in (("train", 37), ("valid", 11)):
        task.load_dataset(split)
        expected = sorted(token for line in random_lines(count) for token in [*line, 2])
        batches = targets(task, split, required_batch_size_multiple=multiple, **batching)
        assert sorted(torch.cat([t[t.ne(1)] for t in batches]).tolist()) == expected


def test_whole_batches_come_first_and_keep_the_multiple(data):
    task = task_for(data, sample_break_mode="eos")
    task.load_dataset("train")
    sizes = [len(t) for t in targets(task, "train", max_sentences=8, required_batch_size_multiple=8)]
    assert sizes == [8, 8, 8, 8, 5]


def test_context_windows_still_work(data):
    task = task_for(data)
    task.load_dataset("valid")
    iterator = task.eval_lm_dataloader(task.dataset("valid"), batch_size=1, context_window=4, num_workers=0)
    assert sum(int(batch["ntokens"]) for batch in iterator) == sum(len(line) + 1 for line in random_lines(11))


# ---------------------------------------------------------------------- nothing is left out without a word


@pytest.mark.parametrize(
    "changes, how, message",
    [
        (
            {},
            {"max_positions": 15},
            r"3 of 4 blocks are longer than the model's 15 positions \(the longest: 16 tokens\)",
        ),
        (
            {"sample_break_mode": "eos"},
            {"max_positions": 8},
            r"[1-9] of 11 blocks are longer than the model's 8 positions \(the longest: 9 tokens\) and would be left "
            "out: give --tokens-per-sample 8, and --sample-break-mode none where a line",
        ),
        ({}, {"max_positions": 20, "context_window": 8}, "the longest: 24 tokens, 8 of them --context-window"),
        ({}, {"max_tokens": 12, "max_positions": 16}, r"--max-tokens \(12\) must be at least 16, the tokens of the"),
    ],
)
def test_blocks_that_do_not_fit_are_an_error_in_evaluation(data, changes, how, message):
    task = task_for(data, **changes)
    task.load_dataset("valid")
    with pytest.raises(UserError, match=message):
        task.eval_lm_dataloader(task.dataset("valid"), **how)


def test_a_validation_leaves_out_blocks_only_if_told_to(data):
    task = task_for(data, sample_break_mode="eos")
    task.load_dataset("valid")
    with pytest.raises(UserError, match="blocks are longer than the model's 8 positions"):
        task.get_batch_iterator(task.dataset("valid"), max_positions=8)
    told = task.get_batch_iterator(task.dataset("valid"), max_positions=8, ignore_invalid_inputs=True)
    assert 0 < sum(len(batch) for batch in told.frozen_batches) < 11


def test_a_context_window_leaves_room_for_a_block(data):
    with pytest.raises(
        UserError, match=r"--tokens-per-sample \(-4\) must be at least 1; .* takes --context-window off"
    ):
        task_for(data, tokens_per_sample=16 - 20)


# ---------------------------------------------------------------------- domains


def domains(data, first=4, second=7, between=True):
    """Adds a split for each domain to the data, with the lines of both as ``valid``."""
    lines = random_lines(first + second)
    write_split(data / "valid_first", lines[:first])
    write_split(data / "valid_second", lines[first:])
    write_split(data / "valid", [*lines[:first], *([DOCUMENT_END] if between else []), *lines[first:]])


def test_a_folder_of_one_text_has_no_domains(data):
    write_split(data / "valid_other", random_lines(5))  # one more set to validate on
    assert task_for(data).parts_of("valid") == task_for(data).parts_of("test") == {}


@pytest.mark.parametrize("between", [True, False])
def test_splits_that_add_up_to_the_whole_are_its_domains(data, between):
    domains(data, between=between)
    task, expected = task_for(data), {"first": "valid_first", "second": "valid_second"}
    assert task.parts_of("valid") == expected
    assert task.parts_of("valid_first") == task.parts_of("test") == task.parts_of("train") == {}
    write_split(data / "valid_other", random_lines(5))
    assert task.parts_of("valid") == {}  # which of them are its domains cannot be told
    (data / "manifest.json").write_text(json.dumps({"splits": {"valid": {}, **dict.fromkeys(expected.values(), {})}}))
    assert task.parts_of("valid") == expected
    assert task.parts_of("valid_first") == task.parts_of("valid_other") == {}


@pytest.mark.parametrize("missing", ["valid", "valid_first"])
def test_domains_without_all_of_their_files_are_none(data, missing):
    domains(data)
    (data / f"{missing}.idx").unlink()
    assert task_for(data).parts_of("valid") == {}


# ---------------------------------------------------------------------- documents and shards


def test_complete_doc_never_crosses_an_empty_line(data):
    documents = [[[5, 6], [7]], [[8], [9, 10], [11]]]
    lines = [line for document in documents for line in [*document, DOCUMENT_END]]
    write_split(data / "train", lines)
    task = task_for(data, sample_break_mode="complete_doc")
    task.load_dataset("train")
    blocks = {tuple(task.dataset("train")[i]["target"].tolist()) for i in range(len(task.dataset("train")))}
    assert blocks == {(5, 6, 2, 7, 2), (8, 2, 9, 10, 2, 11, 2)}
    crossing = task_for(data, sample_break_mode="complete")
    crossing.load_dataset("train")
    samples = [crossing.dataset("train")[i]["target"].tolist() for i in range(len(crossing.dataset("train")))]
    assert any({7, 8} <= set(sample) for sample in samples)


@pytest.fixture
def shards(data, tmp_path):
    second = tmp_path / "second"
    second.mkdir()
    write_split(second / "train", [[23] * 5] * 4)
    return data, second


def test_epochs_go_through_the_shards(shards):
    task = task_for(":".join(map(str, shards)))
    seen = []
    for epoch in (1, 2, 3):
        task.load_dataset("train", epoch=epoch)
        seen.append({int(token) for t in targets(task, "train", max_sentences=4) for token in t[t.ne(1)]})
    assert seen[0] == seen[2] and len(seen[0]) > 10
    assert seen[1] == {2, 23}
    task.load_dataset("valid", epoch=1)
    assert task.has_sharded_data("train")


def test_all_shards_are_checked_before_the_first_epoch(shards):
    (shards[1] / "train.bin").write_bytes(b"short")
    task = task_for(":".join(map(str, shards)))
    with pytest.raises(ValueError, match="second/train.bin has 5 bytes"):
        task.load_dataset("train", epoch=1)
    task.load_dataset("valid")


def test_shards_share_one_dictionary(shards):
    (shards[1] / "dict.txt").write_text("other 1\n")
    with pytest.raises(ValueError, match="second/dict.txt differs from .*data/dict.txt: shards share one dictionary"):
        task_for(":".join(map(str, shards)))


# ---------------------------------------------------------------------- bad data


def test_missing_folders_and_files(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="data folder .*nowhere does not exist"):
        task_for(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"dict.txt is missing: .* holds no binarised data"):
        task_for(tmp_path)
    task = task_for(data)
    with pytest.raises(FileNotFoundError, match="valid2.idx is missing"):
        task.load_dataset("valid2")
    (data / "valid.bin").unlink()
    with pytest.raises(FileNotFoundError, match="valid.bin is missing"):
        task.load_dataset("valid")


def test_no_data_at_all():
    with pytest.raises(ValueError, match="no data folder given"):
        task_for("")


@pytest.mark.parametrize(
    "file, keep, message",
    [
        ("train.bin", 20, "train.bin has 20 bytes, train.idx says [0-9,]+: truncated"),
        ("train.idx", 40, "train.idx has 40 bytes, its header says [0-9,]+: truncated"),
        ("train.idx", 12, "train.idx has 12 bytes and no complete header: truncated"),
        ("train.idx", 0, "train.idx has 0 bytes and no complete header: truncated"),
    ],
)
def test_truncated_files(data, file, keep, message):
    (data / file).write_bytes((data / file).read_bytes()[:keep])
    with pytest.raises(ValueError, match=message):
        task_for(data).load_dataset("train")


def test_an_empty_split(data):
    (data / "train.bin").write_bytes(b"")
    builder = MMapIndexedDatasetBuilder(str(data / "train.bin"), dtype=np.uint16)
    builder.finalize(str(data / "train.idx"))
    with pytest.raises(ValueError, match="train.bin is empty: there is no text in this split"):
        task_for(data).load_dataset("train")


def test_data_of_another_dictionary(data):
    write_split(data / "train", [[5, 99]])
    with pytest.raises(ValueError, match="train.bin has token id 99, dict.txt has 24 words"):
        task_for(data).load_dataset("train")


def test_another_format_is_left_to_fairseq(data):
    shutil.copy(data / "dict.txt", data / "train")  # raw text without an index
    (data / "train").write_text("w1 w2 w3\n")
    (data / "train.idx").unlink()
    task = task_for(data, dataset_impl="raw")
    task.load_dataset("train")
    assert task.dataset("train")[0]["target"].tolist() == [5, 6, 7, 2]


def test_tpu_means_bf16_was_given(data):
    with pytest.raises(ValueError, match="--mhmoe-precision bf16"):
        task_for(data, tpu=True)
