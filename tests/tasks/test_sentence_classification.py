"""The task on files in fairseq's layout: splits, the first token, what it starts from, and bad data."""

import argparse

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from fairseq.tasks import TASK_REGISTRY
from language_models import SMALL, small_dictionary, small_model

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.tasks.sentence_classification import SentenceClassificationTask

CLASSES = ("entailment", "neutral", "contradiction")
EOS = 2


def write_split(prefix, rows):
    builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for row in rows:
        builder.add_item(torch.tensor([*row, EOS]))
    builder.finalize(f"{prefix}.idx")


def write_examples(folder, split, count, seed=0):
    """``count`` pairs of 1 to 8 words with classes 0, 1, 2, 0, ..."""
    generator = np.random.default_rng(seed)
    for name in ("input0", "input1"):
        write_split(folder / name / split, [generator.integers(4, 44, generator.integers(1, 9)) for _ in range(count)])
    write_split(folder / "label" / split, [[4 + index % 3] for index in range(count)])


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    for name in ("input0", "input1", "label"):
        (folder / name).mkdir(parents=True)
    dictionary = small_dictionary(38)
    for symbol in ("__de__", "__en__"):
        dictionary.add_symbol(symbol)
    dictionary.save(str(folder / "dict.txt"))
    (folder / "label" / "dict.txt").write_text("".join(f"{name} 1\n" for name in CLASSES))
    for split, count in (("train_en", 21), ("valid_de", 5), ("valid_en", 4)):
        write_examples(folder, split, count, seed=count)
    return folder


def task_for(data, **changes):
    parser = argparse.ArgumentParser()
    SentenceClassificationTask.add_args(parser)
    args = parser.parse_args([str(data)])
    defaults = {
        "tpu": False,
        "seed": 1,
        "no_save": True,
        "save_dir": "",
        "finetune_from_model": None,
        "restore_file": "checkpoint_last.pt",
    }
    for name, value in {**defaults, **changes}.items():
        setattr(args, name, value)
    return SentenceClassificationTask.setup_task(args)


def loaded(task, split):
    task.load_dataset(split)
    return task.dataset(split)


def test_the_task_and_its_flags():
    assert TASK_REGISTRY["mhmoe_sentence_classification"] is SentenceClassificationTask
    parser = argparse.ArgumentParser(add_help=False)
    SentenceClassificationTask.add_args(parser)
    assert {flag for action in parser._actions for flag in action.option_strings} == {
        "--num-classes", "--classification-head-name", "--mhmoe-head-dropout", "--tokens-per-sample",
        "--max-target-positions", "--mhmoe-language-token", "--mhmoe-load-log",
    }  # fmt: skip
    assert all(action.help for action in parser._actions)


# ---------------------------------------------------------------------- splits


def test_a_split_is_a_file_or_all_of_its_languages(data):
    task = task_for(data)
    whole, german, english = (loaded(task, split) for split in ("valid", "valid_de", "valid_en"))
    assert (len(loaded(task, "train")), len(whole), len(german), len(english)) == (21, 9, 5, 4)
    parts = [*(german[index] for index in range(5)), *(english[index] for index in range(4))]
    for index, part in enumerate(parts):
        assert torch.equal(whole[index]["tokens"], part["tokens"]) and whole[index]["target"] == part["target"]
    assert [german[index]["target"] for index in range(5)] == [0, 1, 2, 0, 1]
    assert int(german[0]["tokens"][0]) == EOS and int(german[0]["tokens"].eq(EOS).sum()) == 3


def test_single_sentences(data):
    for file in (data / "input1").iterdir():
        file.unlink()
    assert int(loaded(task_for(data), "train")[0]["tokens"].eq(EOS).sum()) == 2


def test_the_layout_of_fairseq_preprocess(data):
    (data / "dict.txt").rename(data / "input0" / "dict.txt")
    (data / "label" / "dict.txt").write_text("".join(f"{name} 1\n" for name in (*CLASSES, "madeupword0000")))
    task = task_for(data, num_classes=3)
    assert task.classes == list(CLASSES) and len(loaded(task, "train")) == 21


def test_a_languages_symbol_takes_the_first_place(data):
    task = task_for(data, mhmoe_language_token=True)
    dictionary = task.source_dictionary
    first = [int(loaded(task, "valid")[index]["tokens"][0]) for index in range(9)]
    assert first == [dictionary.index("__de__")] * 5 + [dictionary.index("__en__")] * 4
    for folder in ("input0", "input1", "label"):
        for end in ("bin", "idx"):
            (data / folder / f"valid_de.{end}").rename(data / folder / f"valid_fr.{end}")
    with pytest.raises(ValueError, match="--mhmoe-language-token: split valid_fr .* such as __fr__"):
        task.load_dataset("valid_fr")


def test_training_order_is_the_seeds_and_batches_hold_all(data):
    def batches(**changes):
        task = task_for(data, **changes)
        iterator = task.get_batch_iterator(loaded(task, "train"), max_sentences=4, required_batch_size_multiple=8)
        return [batch["id"].tolist() for batch in iterator.next_epoch_itr(shuffle=False)]

    assert batches() == batches() != batches(seed=2)
    assert sorted(index for batch in batches() for index in batch) == list(range(21))


def test_long_inputs_are_cut(data, caplog):
    task = task_for(data, tokens_per_sample=9)
    with caplog.at_level("INFO"):
        assert loaded(task, "train").sizes.max() == 9
    assert "inputs are cut to 9 tokens" in caplog.text
    assert task_for(data, max_target_positions=7).max_positions() == 7


# ---------------------------------------------------------------------- the model


def options(arch="mhmoe_lm_tiny", **flags):
    filled = architecture_options(arch, **{**SMALL, "mhmoe_budget": "none", **flags})
    return argparse.Namespace(**{**vars(filled), "arch": arch})


@pytest.fixture
def language_model(data, tmp_path):
    """A checkpoint of a small language model with the data's dictionary."""
    dictionary = Dictionary.load(str(data / "dict.txt"))
    model = small_model(dictionary=dictionary)
    torch.save({"model": model.state_dict(), "cfg": {}}, tmp_path / "lm.pt")
    return tmp_path / "lm.pt"


def test_the_model_has_a_new_head(data, language_model):
    task = task_for(data, finetune_from_model=str(language_model), classification_head_name="nli")
    model = task.build_model(options())
    model.load_state_dict(torch.load(language_model, weights_only=True)["model"], strict=True)
    assert model.classification_heads["nli"].weight.shape == (3, 32)
    assert model.classification_heads["nli"].dropout.p == 0.1
    evaluated = task.build_model(options(), from_checkpoint=True)
    with pytest.raises(RuntimeError, match="Missing key.*classification_heads.nli"):
        evaluated.load_state_dict(torch.load(language_model, weights_only=True)["model"], strict=True)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"decoder_layers": 3}, r"lm.pt: it has no parameter decoder.layers.2.*give --arch and the model's flags"),
        ({"no_bias": True}, r"lm.pt: this model has no parameter decoder\..*bias"),
        ({"decoder_ffn_embed_dim": 128}, r"is of shape \(.*64.*\), this model's of \(.*128.*\)"),
        ({"decoder_learned_pos": True}, "lm.pt: it has no parameter decoder.embed_positions.weight"),
    ],
)
@pytest.mark.parametrize("flag", ["finetune_from_model", "restore_file"])
def test_a_checkpoint_of_another_model_is_refused_before_training(data, language_model, flags, message, flag):
    task = task_for(data, **{flag: str(language_model)})
    with pytest.raises(ValueError, match=message):
        task.build_model(options(**flags))


def test_a_checkpoint_of_another_dictionary_is_refused_before_training(data, language_model):
    words = (data / "dict.txt").read_text().splitlines()
    (data / "dict.txt").write_text("\n".join([words[1], words[0], *words[2:]]) + "\n")
    task = task_for(data, finetune_from_model=str(language_model))
    with pytest.raises(
        ValueError, match="lm.pt: its dictionary .* is not that of .*data: prepare the data with --data"
    ):
        task.build_model(options())


def test_what_is_no_checkpoint_is_refused(data, tmp_path):
    (tmp_path / "text.pt").write_text("no checkpoint")
    task = task_for(data, finetune_from_model=str(tmp_path / "text.pt"))
    with pytest.raises(ValueError, match="text.pt: no readable checkpoint"):
        task.build_model(options())


# ---------------------------------------------------------------------- bad data


@pytest.mark.parametrize("name", ["", "nli.de"])
def test_a_name_that_weights_cannot_have(data, name):
    with pytest.raises(UserError, match=r"--classification-head-name \(.*\) must be a name without a dot"):
        task_for(data, classification_head_name=name)


def test_missing_files(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="data folder .*nowhere does not exist"):
        task_for(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="dict.txt is missing: make the data with mhmoe prepare classification"):
        task_for(tmp_path)
    with pytest.raises(FileNotFoundError, match="input0/test_de.idx is missing"):
        task_for(data).load_dataset("test_de")
    (data / "input1" / "valid_de.bin").unlink()
    with pytest.raises(FileNotFoundError, match="input1/valid_de.bin is missing"):
        task_for(data).load_dataset("valid")
    (data / "label" / "dict.txt").unlink()
    with pytest.raises(FileNotFoundError, match="label/dict.txt is missing"):
        task_for(data)


def test_data_that_do_not_belong_together(data):
    write_split(data / "input1" / "valid_de", [[5]] * 4)
    with pytest.raises(ValueError, match=r"valid_de has different numbers of examples \(input0 5, input1 4, label 5\)"):
        task_for(data).load_dataset("valid_de")
    write_split(data / "input1" / "valid_en", [[5], [99], [5], [5]])
    with pytest.raises(ValueError, match="input1/valid_en.bin has token id 99, dict.txt has 44 words"):
        task_for(data).load_dataset("valid_en")


def test_labels_outside_the_classes(data):
    write_split(data / "label" / "valid_en", [[4], [5], [7], [6]])
    with pytest.raises(ValueError, match="label/valid_en.bin has token id 7, dict.txt has 7 words"):
        task_for(data).load_dataset("valid_en")
    write_split(data / "label" / "valid_en", [[4], [5], [3], [6]])
    with pytest.raises(ValueError, match="label/valid_en.bin: example 3 has no class of label/dict.txt"):
        task_for(data).load_dataset("valid_en")


def test_bad_flags(data):
    with pytest.raises(ValueError, match=r"--num-classes \(2\): .*label/dict.txt has 3 classes"):
        task_for(data, num_classes=2)
    with pytest.raises(ValueError, match="--mhmoe-precision bf16"):
        task_for(data, tpu=True)
    with pytest.raises(ValueError, match=r"--tokens-per-sample \(4\) must be at least 5"):
        task_for(data, tokens_per_sample=4).load_dataset("train")
    (data / "label" / "dict.txt").write_text("one 1\n")
    with pytest.raises(ValueError, match="label/dict.txt has 1 classes, and there must be at least two"):
        task_for(data)


def test_classes_of_a_checkpoint(data):
    task = task_for(data)
    task.load_state_dict(task.state_dict())
    task.load_state_dict({})  # a language model's
    with pytest.raises(ValueError, match="has the classes entailment, .*; the checkpoint's are neutral, entailment"):
        task.load_state_dict({"classes": ["neutral", "entailment", "contradiction"]})
