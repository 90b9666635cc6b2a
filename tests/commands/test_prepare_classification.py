"""``mhmoe prepare classification``: XNLI's formats, labels, and everything that a user can get wrong."""

import json
import shutil

import numpy as np
import pytest
from fairseq.data import Dictionary, data_utils
from labelled import XNLI_LABELS, prepare, write_jsonl, write_official_tsv, xnli_rows
from trained_model import sentences

from mhmoe_fairseq.common.files import read_json
from mhmoe_fairseq.data.vocabularies import SentencePieceVocabulary, train_sentencepiece, write_dictionary
from mhmoe_fairseq.prepare.classification import ClassificationPreparation

CODES = ("en", "de", "zh")


@pytest.fixture(scope="session")
def lm_data(tmp_path_factory):
    """The dictionary and SentencePiece model of a language model's data, with a language symbol at the end."""
    folder = tmp_path_factory.mktemp("lm-data")
    lines = sentences(300)
    train_sentencepiece(
        lines, 300, folder / "sentencepiece.model", vocab_size=320, model="unigram", max_lines=1000, seed=1
    )
    vocabulary = SentencePieceVocabulary(folder / "sentencepiece.model")
    symbols = [*vocabulary.symbols, "__de__"]
    write_dictionary(folder / "dict.txt", symbols, np.ones(len(symbols) + 4, dtype=np.int64))
    return folder


@pytest.fixture
def files(tmp_path):
    """``LANG=FILE`` by language, in Hugging Face's fields."""
    return {code: f"{code}={write_jsonl(tmp_path / f'{code}.jsonl', xnli_rows(code))}" for code in CODES}


@pytest.fixture
def run(capsys, lm_data, tmp_path):
    """Exit status, output and error of a preparation into ``tmp_path / "data"``."""

    def run(*arguments):
        status = prepare("--data", lm_data, "--dest", tmp_path / "data", *arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def texts(dest, folder, split):
    """The text of every example of a split, by fairseq's own reader."""
    vocabulary = SentencePieceVocabulary(dest / "sentencepiece.model")
    dictionary = Dictionary.load(str(dest / "dict.txt"))
    dataset = data_utils.load_indexed_dataset(str(dest / folder / split), dictionary)
    items = [dataset[index].tolist() for index in range(len(dataset))]
    assert all(item[-1] == dictionary.eos() and dictionary.unk() not in item for item in items)
    return [vocabulary._model.decode(item[:-1]) for item in items]


def labels(dest, split):
    dictionary = Dictionary.load(str(dest / "label" / "dict.txt"))
    dataset = data_utils.load_indexed_dataset(str(dest / "label" / split), dictionary)
    return [dictionary[int(dataset[index][0])] for index in range(len(dataset))]


def words_of(code):
    return [XNLI_LABELS[row["label"]] for row in xnli_rows(code)]


# ---------------------------------------------------------------------- formats


def test_json_lines_with_ids(run, files, tmp_path, lm_data):
    status, out, err = run(
        "--train", files["en"], "--valid", files["de"], "--test", files["zh"], "--labels", *XNLI_LABELS
    )
    dest = tmp_path / "data"
    assert (status, err) == (0, "")
    assert "train_en: 6 examples (entailment 2, neutral 2, contradiction 2), 0 left out" in out
    for code, split in zip(CODES, ("train_en", "valid_de", "test_zh")):
        rows = xnli_rows(code)
        assert texts(dest, "input0", split) == [row["premise"] for row in rows]
        assert texts(dest, "input1", split) == [row["hypothesis"] for row in rows]
        assert labels(dest, split) == words_of(code)
    for name in ("dict.txt", "sentencepiece.model"):
        assert (dest / name).read_bytes() == (lm_data / name).read_bytes()
    manifest = read_json(dest / "manifest.json")
    assert manifest["classes"] == list(XNLI_LABELS) and manifest["fields"] == ["premise", "hypothesis"]
    assert manifest["splits"]["valid_de"]["classes"] == {"entailment": 2, "neutral": 2, "contradiction": 2}
    assert manifest["settings"]["train"]["en"]["name"] == "en.jsonl" and "input1/test_zh.bin" in manifest["files"]


def test_the_official_files_hold_all_languages(run, tmp_path):
    tsv = write_official_tsv(tmp_path / "xnli.dev.tsv", *CODES)
    train = write_jsonl(tmp_path / "multinli.jsonl", [
        {"gold_label": {"contradiction": "contradictory"}.get(word, word),
         "sentence1": row["premise"], "sentence2": row["hypothesis"]}
        for row, word in [*zip(xnli_rows("en"), words_of("en")), (xnli_rows("en")[0], "-")]
    ])  # fmt: skip
    status, out, err = run(
        "--train", f"en={train}", "--valid", *(f"{code}={tsv}" for code in CODES), "--text-fields", "sentence1",
        "sentence2", "--label-field", "gold_label", "--language-field", "language",
        "--labels", "entailment", "neutral", "contradiction=contradictory", "--skip-labels", "-",
    )  # fmt: skip
    dest = tmp_path / "data"
    assert (status, err) == (0, "") and "contradiction 2), 1 left out" in out
    assert len(labels(dest, "train_en")) == 6, "rows without the field are of their file's language"
    for code in CODES:
        assert texts(dest, "input1", f"valid_{code}") == [row["hypothesis"] for row in xnli_rows(code)]
        assert labels(dest, f"valid_{code}") == words_of(code)
    assert labels(dest, "train_en") == words_of("en")


def test_single_sentences_and_labels_from_the_training_file(run, tmp_path):
    kinds = {"  the\u00a0river \n opens ": 2, "a garden": 10, "a": -1}
    rows = [{"text": text, "kind": kind} for text, kind in kinds.items()]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    status, out, err = run(
        "--train", f"en={train}", "--text-fields", "text", "--label-field", "kind", "--skip-labels=-1"
    )
    dest = tmp_path / "data"
    assert (status, err) == (0, "") and "classes: 2, 10" in out and "1 left out" in out
    assert texts(dest, "input0", "train_en") == ["the river opens", "a garden"]
    assert labels(dest, "train_en") == ["2", "10"]
    assert not (dest / "input1").exists()


@pytest.mark.parametrize(
    "train, test, message",
    [
        (["entailment", "neutral"], [0, 1], "de.jsonl:1: field 'label' is '0', a number, and the classes are names"),
        ([0, 1], ["entailment", "neutral"], "de.jsonl:1: field 'label' is 'entailment', must be one of 0, 1"),
        (["entailment", 0, 1], [1, 0], "en.jsonl:2 has '0' in 'label' and {0}/en.jsonl:1 has 'entailment', which"),
        (["Neutral", "neutral"], ["neutral"], "en.jsonl:1 has 'Neutral' in 'label' and {0}/en.jsonl:2 has 'neutral'"),
        (["yes", "no"], [-1], "de.jsonl:1: field 'label' is '-1', a number, and the classes are names (no, yes)"),
    ],
)
def test_a_coding_that_nobody_gave_is_refused_not_guessed(run, tmp_path, train, test, message):
    files = {
        code: write_jsonl(tmp_path / f"{code}.jsonl", [{"text": "a b", "label": label} for label in labels_of])
        for code, labels_of in (("en", train), ("de", test))
    }
    status, _, err = run("--train", f"en={files['en']}", "--test", f"de={files['de']}", "--text-fields", "text")
    assert status == 2 and message.format(tmp_path) in err and err.count("\n") == 1, err
    assert not list((tmp_path / "data").glob("*.txt"))


def test_numbers_are_ids_where_the_order_was_given(run, tmp_path):
    words = write_jsonl(tmp_path / "en.jsonl", [{"text": "a b", "label": word} for word in ("yes", "no", "yes")])
    numbers = write_jsonl(tmp_path / "de.jsonl", [{"text": "a b", "label": number} for number in (0, 1, 1)])
    status, _, err = run(
        "--train", f"en={words}", "--test", f"de={numbers}", "--text-fields", "text", "--labels", "yes", "no"
    )
    assert (status, err) == (0, "")
    assert labels(tmp_path / "data", "test_de") == ["yes", "no", "no"]


def test_done_once_and_again_with_other_settings(run, files, tmp_path):
    arguments = ("--train", files["en"], "--valid", files["de"])
    assert run(*arguments)[0] == 0
    assert "already prepared with these settings, nothing to do" in run(*arguments)[1]
    status, _, err = run("--train", files["en"], "--valid", files["zh"])
    assert status == 2 and "holds data made with another --valid" in err
    status, _, _ = run("--train", files["en"], "--text-fields", "premise", "--overwrite")
    assert status == 0 and not list((tmp_path / "data" / "input1").glob("*"))


def test_a_killed_run_is_continued(run, files, tmp_path, monkeypatch):
    real, calls = ClassificationPreparation._binarise_file, []

    def killed_at_the_second(self, file, *rest):
        calls.append(file.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, file, *rest)

    monkeypatch.setattr(ClassificationPreparation, "_binarise_file", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run("--train", files["en"], "--valid", files["de"])
    assert not (tmp_path / "data" / "manifest.json").exists()
    assert run("--train", files["en"], "--valid", files["de"])[0] == 0
    assert calls == ["train_en", "valid_de", "valid_de"]
    assert labels(tmp_path / "data", "valid_de") == [str(row["label"]) for row in xnli_rows("de")]


# ---------------------------------------------------------------------- bad input


def changed(code, number, **changes):
    """The rows of a language, one of them changed; a field that becomes None goes."""
    rows = xnli_rows(code)
    rows[number] = {key: value for key, value in {**rows[number], **changes}.items() if value is not None}
    return rows


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hypothesis": None}, "de.jsonl:3: no field 'hypothesis'; it has premise, label"),
        ({"label": None}, "de.jsonl:3: no field 'label'; it has premise, hypothesis"),
        ({"label": "maybe"}, "de.jsonl:3: field 'label' is 'maybe', must be one of entailment, neutral, contradiction"),
        ({"label": 3}, "de.jsonl:3: field 'label' is '3', must be one of entailment, neutral, contradiction"),
        ({"label": 0.5}, "de.jsonl:3: field 'label' is 0.5, must be a string or a whole number"),
        ({"premise": 7}, "de.jsonl:3: field 'premise' is 7, must be a text"),
        ({"premise": " \n "}, "de.jsonl:3: field 'premise' has no text"),
        ({"premise": "half \ud83d"}, "de.jsonl:3: field 'premise' has half a surrogate pair"),
    ],
)
def test_a_bad_row(run, files, tmp_path, changes, message):
    (tmp_path / "de.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed("de", 2, **changes)))
    status, out, err = run("--train", files["en"], "--valid", files["de"], "--labels", *XNLI_LABELS)
    assert status == 2 and message in err and err.count("\n") == 1
    assert not list((tmp_path / "data").glob("*.txt")), "bad input is noticed before anything is made"


def test_bad_files(run, files, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"premise": "a", \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"premise": "caf\xe9"}\n')
    (tmp_path / "other.tsv").write_text("premise\thypothesis\tgold\na\tb\tneutral\n")
    (tmp_path / "short.tsv").write_text("premise\thypothesis\tlabel\na\tb\t0\na\tb\n")
    (tmp_path / "rows.csv").write_text("a,b\n")
    for name, message in (
        ("broken.jsonl", "broken.jsonl:1: not valid JSON"),
        ("list.jsonl", "list.jsonl:1: needs a JSON object"),
        ("empty.jsonl", "--valid de={0}/empty.jsonl: no example in it"),
        ("latin.jsonl", "latin.jsonl: invalid UTF-8 at byte 16"),
        ("other.tsv", "other.tsv:1: no field 'label'; the first line names premise, hypothesis, gold"),
        ("short.tsv", "short.tsv:3: 2 fields, but the first line names 3"),
        ("rows.csv", "rows.csv: must end in .jsonl, .json, .tsv"),
        ("none.jsonl", "--valid: no such file: {0}/none.jsonl"),
    ):
        status, out, err = run("--train", files["en"], "--valid", f"de={tmp_path / name}", "--labels", *XNLI_LABELS)
        assert status == 2 and message.format(tmp_path) in err and err.count("\n") == 1, err


def test_bad_flags(run, files, tmp_path):
    en, de = files["en"], files["de"]
    same = f"de={en.partition('=')[2]}"
    tsv = write_official_tsv(tmp_path / "xnli.tsv", "en")
    twice = ("--train", en, "--valid", f"de={tmp_path / 'zh.jsonl'}", files["zh"], "--language-field", "language")
    official = ("--text-fields", "sentence1", "--label-field", "gold_label", "--language-field", "language")
    for arguments, message in (
        (("--train", "en.jsonl"), "--train en.jsonl: must be LANG=FILE, such as en=en.jsonl"),
        (("--train", en.replace("en=", "xx=")), "--train xx: no such language; known are ar, bg, de"),
        (("--train", en, "--valid", de, de), "--valid has a file for de already"),
        (("--train", en, "--valid", same), "en.jsonl: is the file of --train en"),
        (("--train", en, "--labels", "yes"), "--labels: needs at least two classes, not yes"),
        (("--train", en, "--labels", "yes", "no=yes"), "--labels: 'yes' stands for two things"),
        (("--train", en, "--labels", "yes", "</s>"), "--labels: '</s>' is no name of a class"),
        (("--train", en, "--labels", *XNLI_LABELS, "often"), "--train: no example of class 'often'"),
        (("--train", en, "--text-fields", "a", "b", "c"), "--text-fields a b c: must be one field or two"),
        (("--train", en, "--text-fields", "a", "a"), "--text-fields a a: must be one field or two different ones"),
        (
            ("--train", f"en={tsv}", "--valid", f"de={tsv}", *official),
            f"--valid de={tsv}: no example of language de in it",
        ),
        (twice, "zh.jsonl:1: no field 'language'; it has premise, hypothesis, label"),
    ):
        status, out, err = run(*arguments)
        assert status == 2 and message in err and err.count("\n") == 1, err


def test_a_dictionary_of_another_model(run, files, tmp_path, lm_data, capsys):
    other = tmp_path / "other"
    shutil.copytree(lm_data, other)
    lines = (other / "dict.txt").read_text(encoding="utf-8").splitlines()
    (other / "dict.txt").write_text("\n".join([*lines[:9], lines[10], lines[9], *lines[11:]]) + "\n", encoding="utf-8")
    arguments = ("--train", files["en"], "--dest", tmp_path / "data")
    for data, message in (
        (other, f"{other}/dict.txt:10: "),
        (tmp_path / "none", f"--data ({tmp_path}/none) does not exist"),
    ):
        assert prepare("--data", data, *arguments) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    (other / "sentencepiece.model").unlink()
    assert prepare("--data", other, *arguments) == 2
    assert "no sentencepiece.model in it, of whose pieces its dict.txt is" in capsys.readouterr().err
