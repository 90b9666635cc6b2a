"""The task of several languages: sampling, order, per-language splits, language symbols, bad data."""

import argparse
import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from fairseq.logging import metrics
from fairseq.tasks import TASK_REGISTRY
from multilingual_data import LANGUAGES, build_dictionary, pieces, write_languages

from mhmoe_fairseq.data.datasets.batching import passes
from mhmoe_fairseq.data.datasets.languages import sampled_counts, sampling_shares
from mhmoe_fairseq.data.languages import language_symbol
from mhmoe_fairseq.tasks.multilingual_language_modeling import (
    MHMoEMultilingualLanguageModelingTask,
    language_sums,
    log_languages,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return write_languages(tmp_path_factory.mktemp("languages") / "data")


@pytest.fixture
def data(prepared, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(prepared, tmp_path / "data")


def task_for(data, **changes):
    parser = argparse.ArgumentParser()
    MHMoEMultilingualLanguageModelingTask.add_args(parser)
    args = parser.parse_args([str(data)])
    defaults = {
        "tpu": False, "seed": 1, "dataset_impl": None, "use_plasma_view": False, "plasma_path": "",
        "batch_size": None, "batch_size_valid": None, "data_buffer_size": 0,
    }  # fmt: skip
    for name, value in {**defaults, "tokens_per_sample": 32, **changes}.items():
        setattr(args, name, value)
    return MHMoEMultilingualLanguageModelingTask.setup_task(args)


def loaded(data, split, **changes):
    task = task_for(data, **changes)
    task.load_dataset(split)
    return task


def epoch_of(task, split="train", epoch=1, **sharding):
    """fairseq's iterator of one epoch of batches of 4."""
    batching = {"max_sentences": 4, "seed": task.args.seed, "required_batch_size_multiple": 1}
    return task.get_batch_iterator(task.dataset(split), epoch=epoch, **batching, **sharding)


def read(iterator):
    """The numbers of the blocks of each batch."""
    return [batch["id"].tolist() for batch in iterator.next_epoch_itr()]


def samples(task, split):
    dataset = task.dataset(split)
    return [dataset[index] for index in range(len(dataset))]


def test_the_task_is_registered():
    assert TASK_REGISTRY["mhmoe_multilingual_language_modeling"] is MHMoEMultilingualLanguageModelingTask


# ---------------------------------------------------------------------- the formula


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_counts_follow_the_formula(alpha):
    sizes = np.array([100_003, 7_001, 503])
    counts = sampled_counts(sizes, alpha)
    by_hand = (sizes / sizes.sum()) ** alpha
    by_hand /= by_hand.sum()
    assert counts.sum() == sizes.sum()
    np.testing.assert_allclose(counts / counts.sum(), by_hand, rtol=0.01)
    np.testing.assert_array_less(np.abs(counts - by_hand * sizes.sum()), 1)


def test_alpha_one_is_every_block_once_and_alpha_zero_equal_parts():
    sizes = np.array([83, 21, 1])
    assert sampled_counts(sizes, 1.0).tolist() == [83, 21, 1]
    assert sampled_counts(sizes, 0.0).tolist() == [35, 35, 35]
    assert sampling_shares(np.array([21, 83]), 0.7) == pytest.approx([0.2765, 0.7235], abs=1e-4)


@pytest.mark.parametrize("count", [0, 3, 10, 25])
def test_blocks_are_seen_equally_often(count):
    seen: Counter = Counter({block: 0 for block in range(10)})
    for visit in range(7):
        blocks = passes(10, count, visit, seed=1, name="de")
        assert len(blocks) == count
        seen.update(blocks.tolist())
        assert max(seen.values()) - min(seen.values()) <= 1


def test_every_pass_language_and_seed_has_an_order_of_its_own():
    orders = {
        (seed, language, visit): tuple(passes(30, 30, visit, seed, language).tolist())
        for seed in (1, 2)
        for language in ("de", "en")
        for visit in range(5)
    }
    assert len(set(orders.values())) == len(orders) == 20
    assert all(sorted(order) == list(range(30)) != list(order) for order in orders.values())
    # Passes are independent: how far a block moves from one to the next is as if both were drawn at random.
    places = np.argsort([order for key, order in orders.items() if key[:2] == (1, "de")], axis=1)
    assert 7 < np.abs(np.diff(places, axis=0)).mean() < 13  # (30 + 1) / 3 on average


@pytest.mark.parametrize("count", [7, 30, 50])
def test_epochs_go_on_where_the_one_before_stopped(count):
    """Whatever an epoch takes of a language, the stream of its passes is the same."""
    stream = np.concatenate([passes(30, 30, visit, seed=4, name="el") for visit in range(9)])
    epochs = np.concatenate([passes(30, count, visit, seed=4, name="el") for visit in range(5)])
    assert epochs.tolist() == stream[: 5 * count].tolist()


# ---------------------------------------------------------------------- what an epoch holds


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_languages_are_read_as_often_as_the_formula_says(prepared, alpha):
    task = loaded(prepared, "train", multilang_sampling_alpha=alpha, tokens_per_sample=8)
    sizes = np.array([len(part) for part in task.dataset("train").parts.values()])
    read_of = Counter()
    for batch in epoch_of(task, epoch=3).next_epoch_itr():
        read_of.update(batch["languages"].tolist())
    frequencies = np.array([read_of[number] for number in range(4)]) / sum(read_of.values())
    np.testing.assert_allclose(frequencies, sampling_shares(sizes, alpha), rtol=0.01)
    assert sum(read_of.values()) == sizes.sum()


def test_batches_mix_languages(prepared):
    task = loaded(prepared, "train", multilang_sampling_alpha=0.0, tokens_per_sample=8)
    batches = [batch["languages"] for batch in epoch_of(task).next_epoch_itr()]
    mixed = sum(len(languages.unique()) > 1 for languages in batches) / len(batches)
    assert mixed > 0.8  # of four languages, all four rows are of one in 1 of 64 batches


def test_two_runs_with_one_seed_read_the_same_batches(prepared):
    tasks = [loaded(prepared, "train", multilang_sampling_alpha=0.5, seed=seed) for seed in (1, 1, 2)]
    for epoch in (1, 2):
        first, second, other = (read(epoch_of(task, epoch=epoch)) for task in tasks)
        assert first == second
        assert first != other and sorted(map(len, first)) == sorted(map(len, other))
    assert read(epoch_of(tasks[0], epoch=1)) != read(epoch_of(tasks[0], epoch=2))


def test_an_epoch_does_not_depend_on_those_before_it(prepared):
    straight, resumed = (loaded(prepared, "train", multilang_sampling_alpha=0.3) for _ in range(2))
    for epoch in (1, 2):
        expected = read(epoch_of(straight, epoch=epoch))
    assert read(epoch_of(resumed, epoch=2)) == expected
    iterator = epoch_of(straight, epoch=2)
    assert not straight.can_reuse_epoch_itr(straight.dataset("train"))
    assert iterator.epoch == 2 and iterator.next_epoch_idx == 2


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("ranks_before, ranks_after", [(1, 1), (2, 2), (1, 2), (2, 1)])
def test_resuming_in_the_middle_of_an_epoch_is_exact(prepared, epoch, ranks_before, ranks_after):
    def iterators(ranks):
        task = loaded(prepared, "train", multilang_sampling_alpha=0.5)
        return [epoch_of(task, epoch=epoch, num_shards=ranks, shard_id=rank) for rank in range(ranks)]

    def rounds(iterators):
        running = [iterator.next_epoch_itr() for iterator in iterators]
        while running[0].has_next():
            batches = [next(rank) for rank in running]  # the last round may have nothing for some
            yield [block for batch in batches if batch for block in batch["id"].tolist()]

    seen_before = 12
    before = iterators(ranks_before)
    going = rounds(before)
    for _ in range(seen_before // ranks_before):
        next(going)
    state = json.loads(json.dumps(before[0].state_dict()))
    after = iterators(ranks_after)
    for iterator in after:
        iterator.load_state_dict(dict(state))
    straight = list(rounds(iterators(ranks_after)))
    assert list(rounds(after)) == straight[seen_before // ranks_after :]
    assert state["epoch"] == after[0].epoch == epoch


def test_shards_take_turns(prepared, tmp_path):
    second = write_languages(tmp_path / "second", {"de": 20, "el": 20, "en": 20, "zh": 20})
    (second / "dict.txt").unlink()
    task = task_for(f"{prepared}:{second}", multilang_sampling_alpha=0.0)
    counts = []
    for epoch in (1, 2, 3):
        task.load_dataset("train", epoch=epoch)
        counts.append(len(task.dataset("train")))
        seen = Counter()
        for batch in epoch_of(task, epoch=epoch).next_epoch_itr():
            seen.update(batch["languages"].tolist())
        assert max(seen.values()) - min(seen.values()) <= 1
    assert counts[0] == counts[2] > counts[1]
    assert task.has_sharded_data("train")


# ---------------------------------------------------------------------- splits


@pytest.mark.parametrize("mode", ["none", "complete", "complete_doc", "eos"])
def test_the_split_of_all_languages_is_those_of_each(prepared, mode):
    task = loaded(prepared, "valid", sample_break_mode=mode)
    together = samples(task, "valid")
    apart = []
    for number, language in enumerate(LANGUAGES):
        task.load_dataset(f"valid_{language}")
        own = samples(task, f"valid_{language}")
        assert {int(sample["language"]) for sample in own} == {number}
        apart += own
    assert len(together) == len(apart)
    for one, other in zip(together, apart):
        assert torch.equal(one["target"], other["target"]) and torch.equal(one["source"], other["source"])
        assert one["language"] == other["language"]


def test_no_block_runs_over_two_languages(prepared):
    task = loaded(prepared, "test", sample_break_mode="none")
    dictionary = task.dictionary
    for number, language in enumerate(LANGUAGES):
        text = (prepared / "text" / language / "test.txt").read_text(encoding="utf-8")
        expected = [token for line in text.splitlines() for token in [*map(dictionary.index, pieces(line)), 2]]
        blocks = [sample["target"] for sample in samples(task, "test") if sample["language"] == number]
        assert torch.cat(blocks).tolist() == expected


@pytest.mark.parametrize("multiple", [1, 8])
def test_every_block_is_in_some_batch(prepared, multiple):
    task = loaded(prepared, "valid")
    iterator = task.get_batch_iterator(task.dataset("valid"), max_sentences=8, required_batch_size_multiple=multiple)
    seen = [block for batch in iterator.next_epoch_itr(shuffle=False) for block in batch["id"].tolist()]
    assert sorted(seen) == list(range(len(task.dataset("valid"))))


def test_characters_are_the_texts(prepared):
    for mode in ("none", "complete_doc"):
        task = loaded(prepared, "valid", sample_break_mode=mode)
        characters = Counter()
        for sample in samples(task, "valid"):
            characters[LANGUAGES[sample["language"]]] += sample["characters"]
        for language in LANGUAGES:
            text = (prepared / "text" / language / "valid.txt").read_text(encoding="utf-8")
            lines = [line for line in text.splitlines(keepends=True) if mode == "none" or line != "\n"]
            assert characters[language] == pytest.approx(len("".join(lines)))


def test_a_subset_of_the_languages_changes_neither_dictionary_nor_blocks(prepared):
    whole, subset = loaded(prepared, "valid"), loaded(prepared, "valid", langs="zh,de")
    assert subset.languages == ["de", "zh"]
    assert subset.dictionary.symbols == whole.dictionary.symbols
    wanted = [sample["target"] for sample in samples(whole, "valid") if LANGUAGES[sample["language"]] in ("de", "zh")]
    found = [sample["target"] for sample in samples(subset, "valid")]
    assert len(wanted) == len(found) and all(map(torch.equal, wanted, found))


def test_the_context_before_a_block_is_of_its_language(prepared):
    task = loaded(prepared, "test", tokens_per_sample=16)
    batches = task.eval_lm_dataloader(task.dataset("test"), batch_size=3, context_window=8, num_workers=0)
    known = {}
    for number, language in enumerate(LANGUAGES):
        text = (prepared / "text" / language / "test.txt").read_text(encoding="utf-8")
        known[number] = {task.dictionary.eos(), *map(task.dictionary.index, pieces(text))}
    tokens = 0
    for batch in batches:
        for row, language in zip(batch["net_input"]["src_tokens"], batch["languages"].tolist()):
            assert set(row[row.ne(1)].tolist()) <= known[language]
        tokens += batch["ntokens"]
    assert tokens == task.dataset("test").sizes.sum()


# ---------------------------------------------------------------------- language symbols


@pytest.mark.parametrize("mode", ["none", "eos"])
def test_the_language_token_stands_before_every_block_and_is_no_target(prepared, mode):
    without, with_token = (
        loaded(prepared, "valid", mhmoe_language_token=flag, sample_break_mode=mode) for flag in (False, True)
    )
    assert with_token.dictionary.symbols == without.dictionary.symbols
    symbols = {with_token.dictionary.index(language_symbol(language)) for language in LANGUAGES}
    for plain, marked in zip(samples(without, "valid"), samples(with_token, "valid")):
        assert torch.equal(plain["target"], marked["target"])
        assert torch.equal(plain["source"][1:], marked["source"][1:])
        assert with_token.dictionary[marked["source"][0]] == language_symbol(LANGUAGES[marked["language"]])
        assert not symbols & set(marked["target"].tolist())


def test_a_model_is_evaluated_as_it_was_trained(prepared):
    without, with_token = (task_for(prepared, mhmoe_language_token=flag) for flag in (False, True))
    without.load_state_dict(without.state_dict())
    with_token.load_state_dict(with_token.state_dict())
    with pytest.raises(ValueError, match="trained with --mhmoe-language-token: add the flag"):
        without.load_state_dict(with_token.state_dict())
    with pytest.raises(ValueError, match="trained without --mhmoe-language-token: leave out the flag"):
        with_token.load_state_dict(without.state_dict())


# ---------------------------------------------------------------------- bad data


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"langs": "de,xx"}, r"--langs \(de,xx\): .*data has no binarised text of 'xx'; it has de, el, en, zh"),
        ({"langs": "de,el,de"}, r"--langs \(de,el,de\) names de twice"),
        ({"multilang_sampling_alpha": -0.1}, r"--multilang-sampling-alpha \(-0.1\) must be in \[0, 100\]"),
        ({"mhmoe_language_token": True, "add_bos_token": True}, "--mhmoe-language-token and --add-bos-token exclude"),
    ],
)
def test_bad_flags(prepared, changes, message):
    with pytest.raises(ValueError, match=message):
        loaded(prepared, "valid", **changes)


def test_splits_that_are_not_there(prepared):
    task = task_for(prepared, langs="de,en")
    with pytest.raises(ValueError, match=r"no split 'holdout': no language's folder in .* has holdout.idx"):
        task.load_dataset("holdout")
    with pytest.raises(ValueError, match=r"no split 'valid_zh': .* no language that is read \(de, en\) ends its name"):
        task.load_dataset("valid_zh")


def test_a_folder_without_languages(data):
    for language in LANGUAGES:
        (data / language / "train.idx").unlink()
    with pytest.raises(ValueError, match=r"has no language: no folder in it, such as .*data/de, has a train.idx"):
        loaded(data, "valid")
    assert len(loaded(data, "valid", langs="de").dataset("valid")) > 3


def test_a_language_without_data(data):
    (data / "el" / "valid.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"el/valid.bin is missing"):
        loaded(data, "valid")


def test_an_empty_validation_split(data):
    builder = MMapIndexedDatasetBuilder(str(data / "de" / "valid.bin"), dtype=np.uint16)
    builder.finalize(str(data / "de" / "valid.idx"))
    with pytest.raises(ValueError, match=r"de/valid.bin is empty: there is no text in this split"):
        loaded(data, "valid")


@pytest.mark.parametrize("how", ["link", "copy"])
def test_two_languages_with_the_same_files(data, how):
    for name in ("train.bin", "train.idx"):
        (data / "en" / name).unlink()
        if how == "link":
            (data / "en" / name).symlink_to(data / "de" / name)
        else:
            shutil.copy(data / "de" / name, data / "en" / name)
    with pytest.raises(ValueError, match=r"de/train.bin and .*en/train.bin are the same text: de and en need"):
        loaded(data, "train")


def test_dictionaries_of_other_languages(data):
    (data / "de" / "dict.txt").write_text("andere 1\n")
    with pytest.raises(ValueError, match=r"de/dict.txt differs from .*data/dict.txt: all languages share one"):
        loaded(data, "valid")
    (data / "de" / "dict.txt").unlink()
    words = (data / "dict.txt").read_text(encoding="utf-8").splitlines()
    (data / "dict.txt").write_text("\n".join(words[:50]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"data/dict.txt is not the dictionary that .*data was binarised with, says"):
        loaded(data, "train")
    (data / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"token id \d+, dict.txt has 54 words: binarised with another dictionary"):
        loaded(data, "train")


def test_text_in_words_that_the_dictionary_lacks(data):
    builder = MMapIndexedDatasetBuilder(str(data / "zh" / "valid.bin"), dtype=np.uint16)
    for _ in range(5):
        builder.add_item(torch.tensor([3, 3, 3, 2]))
    builder.finalize(str(data / "zh" / "valid.idx"))
    with pytest.raises(
        ValueError, match="valid of zh: 75% of its words are unknown; dict.txt is a dictionary of other"
    ):
        loaded(data, "valid")


def test_a_dictionary_without_language_symbols(data):
    (data / "manifest.json").unlink()
    dictionary = Dictionary()
    for symbol in build_dictionary().symbols[4:]:
        dictionary.add_symbol(symbol.replace("__de__", "other"))
    dictionary.save(str(data / "dict.txt"))
    loaded(data, "valid")
    with pytest.raises(ValueError, match="--mhmoe-language-token: dict.txt has no __de__"):
        loaded(data, "valid", mhmoe_language_token=True)


# ---------------------------------------------------------------------- metrics of languages

LOSSES = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0], [7.0, 8.0, 9.0], [0.0, 0.0, 0.0]])
SAMPLE = {
    "target": torch.tensor([[5, 6, 2], [7, 2, 1], [8, 9, 2], [1, 1, 1]]),  # a last row of padding alone
    "languages": torch.tensor([2, 0, 2]),
    "characters": torch.tensor([10.0, 3.0, 14.0]),
}


def test_sums_are_of_each_languages_rows_without_padding() -> None:
    sums = language_sums(SAMPLE, LOSSES.flatten(), 3, pad=1)
    assert {key: value.tolist() for key, value in sums.items()} == {
        "language_loss": [9.0, 0.0, 30.0], "language_tokens": [2.0, 0.0, 6.0], "language_characters": [3.0, 0.0, 24.0],
    }  # fmt: skip


def test_figures_are_of_all_batches_together() -> None:
    sums = language_sums(SAMPLE, LOSSES.flatten(), 3, pad=1)
    other = {**SAMPLE, "languages": torch.tensor([0, 0, 2])}
    with metrics.aggregate(new_root=True) as logged:
        for sample in (SAMPLE, other):
            log_languages(["de", "en", "fr"], [language_sums(sample, LOSSES.flatten(), 3, pad=1)])
        found = logged.get_smoothed_values()
    assert "ppl_en" not in found
    assert found["ppl_de"] == pytest.approx(math.exp((9 + 15) / (2 + 5)), abs=0.01)
    assert found["ppl_fr"] == pytest.approx(math.exp((30 + 24) / (6 + 3)), rel=1e-3)
    assert found["bpc_de"] == pytest.approx((9 + 15) / (3 + 13) / math.log(2), abs=1e-4)
    assert found["bpc"] == pytest.approx(2 * 39 / (2 * 27) / math.log(2), abs=1e-4)
    assert sums.keys() >= {"language_loss", "language_tokens"}
