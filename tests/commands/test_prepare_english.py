"""``mhmoe prepare english`` from the command line to data that fairseq loads."""

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from preparing import hashes, prepare_interrupted

from mhmoe_fairseq.common.files import read_json
from mhmoe_fairseq.prepare.english import EnglishPreparation, EnglishSettings
from mhmoe_fairseq.prepare.sources.own_text import text_documents, text_source

SMALL = ["--vocab-size", "300", "--valid-fraction", "0.1", "--test-fraction", "0.1"]


@pytest.fixture
def run(mhmoe_prepare):
    """``mhmoe prepare english``, see ``mhmoe_prepare``."""
    return functools.partial(mhmoe_prepare, "english")


def command(*arguments):
    return [sys.executable, "-m", "mhmoe_fairseq", "prepare", "english", *map(str, arguments)]


def test_text_to_data_once(run, tmp_path, text_corpus):
    dest = tmp_path / "data"
    status, out, err = run("--source", "text", text_corpus, "--dest", dest, *SMALL)
    assert (status, err) == (0, "")
    assert "split: train 32, valid 4, test 4 documents (seed 1)" in out
    assert sorted(path.name for path in dest.iterdir() if not path.name.startswith(".")) == [
        "dict.txt", "manifest.json", "sentencepiece.model", "test.bin", "test.idx", "text",
        "train.bin", "train.idx", "valid.bin", "valid.idx",
    ]  # fmt: skip
    manifest = read_json(dest / "manifest.json")
    assert [split["documents"] for split in manifest["splits"].values()] == [32, 4, 4]
    assert manifest["splits"]["train"]["unknown_tokens"] == 0
    assert manifest["source"]["inputs"][0]["name"] == "corpus.txt"
    assert {"python", "numpy", "torch", "sentencepiece"} <= manifest["tools"].keys()
    before = hashes(dest)
    status, out, _ = run("--source", "text", text_corpus, "--dest", dest, *SMALL)
    assert status == 0 and f"{dest}: already prepared with these settings, nothing to do" in out
    assert hashes(dest) == before


def test_no_line_is_in_two_parts_and_none_is_lost(run, tmp_path, sentences):
    lines = sentences(200)
    documents = ["\n".join(lines[start : start + 20]) for start in range(0, 200, 5)]  # neighbours share lines
    (tmp_path / "a.txt").write_text("\n\n".join(documents))
    assert run("--source", "text", tmp_path / "a.txt", "--dest", tmp_path / "d", *SMALL)[0] == 0
    parts = {
        split: [line for line in (tmp_path / "d" / "text" / f"{split}.txt").read_text().splitlines() if line]
        for split in ("train", "valid", "test")
    }
    everything = [line for part in parts.values() for line in part]
    assert sorted(everything) == sorted(lines)
    assert min(map(len, parts.values())) > 0


def test_the_vocabulary_sees_the_training_part_only(run, tmp_path, sentences):
    rows = [{"text": "\n".join(sentences(6, seed=number))} for number in range(40)]
    rows += [{"text": "\n".join(f"zyxwv{number} zyxwvut zyxwvut zyxwvut" for number in range(9))}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pieces, larger = {}, [*SMALL, "--vocab-size", "360"]
    for seed in range(12):
        dest = tmp_path / str(seed)
        assert run("--source", "jsonl", tmp_path / "a.jsonl", "--dest", dest, "--seed", seed, *larger)[0] == 0
        held_out = "zyxwvut" not in (dest / "text" / "train.txt").read_text()
        pieces[held_out] = [line for line in (dest / "dict.txt").read_text().splitlines() if "zyx" in line]
        if len(pieces) == 2:
            break
    assert pieces[False] and not pieces[True]


def test_equal_settings_give_equal_bytes_and_another_seed_does_not(run, tmp_path, text_corpus):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("--source", "text", text_corpus, "--dest", tmp_path / name, "--seed", seed, *SMALL)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert hashes(tmp_path / "a")["text/valid.txt"] != hashes(tmp_path / "c")["text/valid.txt"]


def test_other_settings_are_refused_until_overwrite(run, tmp_path, text_corpus):
    base = ["--source", "text", text_corpus, "--dest", tmp_path / "d"]
    run(*base, *SMALL)
    before = hashes(tmp_path / "d")
    status, _, err = run(*base, *SMALL, "--seed", 3)
    assert status == 2 and "holds data made with another --seed (1, now 3)" in err and err.count("\n") == 1
    text_corpus.write_text(text_corpus.read_text() + "\nOne more line.\n")
    status, _, err = run(*base, *SMALL)
    assert status == 2 and "another --source inputs" in err
    assert hashes(tmp_path / "d") == before
    assert run(*base, *SMALL, "--seed", 3, "--overwrite")[0] == 0
    assert hashes(tmp_path / "d") != before


def test_own_domains_are_held_out_each_for_itself(run, tmp_path, text_corpus):
    documents = text_corpus.read_text().split("\n\n")
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "a.jsonl").write_text("".join(json.dumps({"text": of}) + "\n" for of in documents[20:]))
    text_corpus.write_text("\n\n".join(documents[:20]))
    words = ["--source", "domains", f"first={text_corpus}", f"second={tmp_path / 'second'}", "--dest", tmp_path / "d"]
    assert run(*words, *SMALL)[0] == 0
    splits = read_json(tmp_path / "d" / "manifest.json")["splits"]
    assert {name: of["documents"] for name, of in splits.items()} == {
        "train": 32, "valid": 4, "valid_first": 2, "valid_second": 2, "test": 4, "test_first": 2, "test_second": 2,
    }  # fmt: skip
    assert "already prepared" in run(*words, *SMALL)[1]
    status, _, err = run("--source", "domains", "--dest", tmp_path / "d", *SMALL)
    assert status == 2 and "--source domains: needs NAME=PATH of each domain after it, got none" in err
    text_corpus.write_text(documents[0])
    status, _, err = run(*words, *SMALL, "--overwrite")
    assert status == 2 and "1 document(s) of first cannot be split by document" in err


def test_without_held_out_parts(run, tmp_path, text_corpus):
    arguments = ["--vocab-size", "300", "--valid-fraction", "0", "--test-fraction", "0", "--tokenizer-model", "bpe"]
    status, out, _ = run("--source", "text", text_corpus, "--dest", tmp_path / "d", *arguments)
    assert status == 0 and "split: train 40 documents" in out
    assert list(read_json(tmp_path / "d" / "manifest.json")["splits"]) == ["train"]


def test_torchscale_shards_keep_their_parts(run, tmp_path, sentences):
    lines = sentences(120)
    (tmp_path / "json").mkdir()
    (tmp_path / "shard").mkdir()
    (tmp_path / "shard" / "t.txt").write_text("\n".join(lines[:60]) + "\n\n" + "\n".join(lines[40:110]) + "\n")
    (tmp_path / "shard" / "v.txt").write_text("\n".join(lines[100:]) + "\n")
    for split, shard in (("train", "shard/t.txt"), ("valid", "shard/v.txt")):
        (tmp_path / "json" / f"{split}.json").write_text(json.dumps([{"source": [shard], "weight": 1.0}]))
    dest = tmp_path / "d"
    status, out, err = run("--source", "torchscale-shards", tmp_path, "--dest", dest, "--vocab-size", 300)
    assert status == 0, err
    assert "split: train 2, valid 1 documents (as the source has them)" in out
    assert (dest / "text" / "valid.txt").read_text().splitlines() == lines[100:]
    assert (dest / "text" / "train.txt").read_text().replace("\n\n", "\n").splitlines() == lines[:100]


def test_tiktoken_ranks_become_the_dictionary(run, tmp_path, text_corpus, byte_ranks):
    pytest.importorskip("tiktoken", reason="tiktoken is an extra")
    from exported_models import write_model
    from fairseq.data import Dictionary, data_utils

    from mhmoe_fairseq.data.vocabularies import TiktokenVocabulary
    from mhmoe_fairseq.evaluation.scoring import TextScorer
    from mhmoe_fairseq.models.language_model import MHMoELanguageModel

    dest = tmp_path / "d"
    arguments = ["--tokenizer", "tiktoken", "--tiktoken-ranks", byte_ranks]
    assert run("--source", "text", text_corpus, "--dest", dest, *arguments)[0] == 0
    dictionary = Dictionary.load(str(dest / "dict.txt"))
    dataset = data_utils.load_indexed_dataset(str(dest / "valid"), dictionary, "mmap")
    words = dictionary.string(dataset[0]).split()
    first = (dest / "text" / "valid.txt").read_text().splitlines()[0]
    assert TiktokenVocabulary(byte_ranks).decode(map(int, words)) == first
    assert words[0] == "257" and len(dictionary) == 264
    assert not (dest / "sentencepiece.model").exists()
    assert (dest / "ranks.tiktoken").read_bytes() == byte_ranks.read_bytes()
    hub = MHMoELanguageModel.from_pretrained(
        write_model(tmp_path / "run", "dense_lm_tiny", dictionary=dictionary), data_name_or_path=dest
    )
    assert dictionary.string(hub.encode(first)).split() == words and hub.decode(hub.encode(first)) == first
    assert TextScorer(hub).encode(first) == [dictionary.index(word) for word in words]


@pytest.mark.parametrize(
    "content, arguments, message",
    [
        (b"", [], "--source: the corpus is empty after cleaning"),
        (b" \n\t\n", [], "--source: the corpus is empty after cleaning"),
        (b"one\ntwo\n", [], "1 document(s) cannot be split by document"),
        (b"one\n\ntw\xffo\n", [], "a.txt: invalid UTF-8 at byte 7"),
        (b"one\n\ntwo\n\nthree words here\n\nfour\n", [], "--vocab-size 8000: too large for this corpus"),
    ],
)
def test_bad_text_is_one_line_and_leaves_earlier_data_usable(run, tmp_path, text_corpus, content, arguments, message):
    dest, bad = tmp_path / "d", tmp_path / "a.txt"
    run("--source", "text", text_corpus, "--dest", dest, *SMALL)
    before = hashes(dest)
    bad.write_bytes(content)
    status, _, err = run("--source", "text", bad, "--dest", dest, "--overwrite", *arguments)
    assert status == 2 and message in err and err.count("\n") == 1
    assert hashes(dest) == before
    assert "nothing to do" in run("--source", "text", text_corpus, "--dest", dest, *SMALL)[1]


@pytest.mark.parametrize("stop_at", ["clean:", "split:", "vocabulary:", "train:", "test:"])
def test_an_interrupted_preparation_continues_and_ends_the_same(tmp_path, text_corpus, stop_at):
    read = []

    def counted(path):
        read.append(path)
        return text_documents(path, "blank-line")

    source = replace(text_source((text_corpus,)), read=counted)
    settings = EnglishSettings(vocab_size=300, valid_fraction=0.1, test_fraction=0.1)

    preparation = EnglishPreparation(source, settings, tmp_path, print)
    prepare_interrupted(preparation, tmp_path / "d", stop_at)
    assert len(read) == (3 if stop_at == "clean:" else 2)


def test_a_full_disk_is_one_line_and_the_next_run_continues(tmp_path, text_corpus, run):
    dest = tmp_path / "d"
    arguments = ["--source", "text", text_corpus, "--dest", dest, *SMALL]
    limit = text_corpus.stat().st_size * 3 // 4  # the kernel refuses to let any file grow beyond this

    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    done = subprocess.run(command(*arguments), capture_output=True, text=True, preexec_fn=limit_file_size)
    assert done.returncode == 2
    assert "cannot be written (file too large): free some space" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert [path.name for path in dest.iterdir() if not path.name.startswith(".")] == []
    assert run(*arguments)[0] == 0


@pytest.mark.slow
def test_a_killed_process_continues(tmp_path, sentences, run):
    corpus = tmp_path / "a.txt"
    lines = sentences(20_000)
    corpus.write_text("\n\n".join("\n".join(lines[start : start + 50]) for start in range(0, len(lines), 50)))
    arguments = ["--source", "text", corpus, "--dest", tmp_path / "d", "--vocab-size", "400"]
    process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    progress = tmp_path / "d" / ".partial" / "progress.json"
    deadline = time.monotonic() + 120
    while not (progress.exists() and '"corpus"' in progress.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "d" / "manifest.json").exists()
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    assert "continuing an unfinished preparation" in out and "clean:" not in out
    straight = ["--source", "text", corpus, "--dest", tmp_path / "e", "--vocab-size", "400"]
    assert run(*straight)[0] == 0
    assert hashes(tmp_path / "d") == hashes(tmp_path / "e")
