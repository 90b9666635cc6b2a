"""A valid call of every command of ``mhmoe``, on small fixtures that all cases share."""

import shutil
from pathlib import Path
from typing import Any

import torch
from console import run_console, train
from dense_checkpoints import write_dense
from fine_tuning_data import fine_tuning_words, write_fine_tuning_data
from image_text_data import prepare_shapes
from images_and_words import training_words as pretraining_words
from labelled import training_words as classification_words
from labelled import write_jsonl, write_task, xnli_rows
from language_models import small_dictionary
from multilingual_data import SENTENCES, write_languages
from official_reference import BITNET, PUBLISHED, official_state
from trained_model import TrainedModel, sentences
from written_runs import make_record, text_metrics, write_run
from zero_shot_questions import write_tasks_folder

from mhmoe_fairseq.commands.main import main as mhmoe
from mhmoe_fairseq.common.files import write_json

Call = dict[str, list[str]]


def write_untrained_fixtures(root: Path) -> None:
    """What commands read that need no trained model: well under ten seconds."""
    root.mkdir()
    lines = sentences(300)
    documents = ["\n".join(lines[start : start + 10]) for start in range(0, len(lines), 10)]
    (root / "corpus.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    words = ["--source", "text", root / "corpus.txt", "--dest", root / "english", "--vocab-size", 340]
    assert mhmoe(["prepare", "english", *map(str, words)]) == 0
    (root / "short.txt").write_text("\n".join(lines[:5]), encoding="utf-8")
    for code in ("de", "en"):
        texts = [SENTENCES[code].replace("\n", f" {number}\n") for number in range(40)]
        (root / "texts" / f"{code}.txt").parent.mkdir(exist_ok=True)
        (root / "texts" / f"{code}.txt").write_text("\n\n".join(texts), encoding="utf-8")
    write_jsonl(root / "train.jsonl", xnli_rows("en"))
    write_jsonl(root / "valid.jsonl", xnli_rows("de"))
    prepare_shapes(root / "shapes")
    folder = root / "captioned"
    (folder / "images").mkdir(parents=True)
    images = sorted((root / "shapes" / "images").iterdir())[:20]
    for image in images:
        shutil.copy(image, folder / "images")
    _write_captions(folder, images)
    write_run(root / "run", make_record(text_metrics(20.0)))
    lines = [f"{word}%1:04:0{sense}:: 00000000 {sense} 9" for word in ("mend", "paint") for sense in range(1, 6)]
    senses = [*lines, *(f"{word}%1:04:00:: 00000000 1 9" for word in ("near", "behind", "river", "dawn", "grey"))]
    (root / "index.sense").write_text("\n".join(senses) + "\n", encoding="utf-8")
    lists = {"polysemous": ["river", "near", "dawn"], "control": ["engine", "along", "behind", "farmer", "doctor"]}
    write_json(root / "words.json", lists)
    (root / "dictionary").mkdir()
    small_dictionary(words=40).save(str(root / "dictionary" / "dict.txt"))
    write_dense(root / "dense.pt")
    for model, name, out in ((PUBLISHED, "official.pt", "imported"), (BITNET, "bitnet.pt", "ternary")):
        settings = {"model": model, "task": {"_name": "gpt"}}
        torch.save({"args": None, "cfg": settings, "model": official_state(model, 44)}, root / name)
        words = ("import-official", root / name, "--out", root / out, "--data", root / "dictionary")
        assert mhmoe(["checkpoint", *map(str, words), "--routing", "dropless"]) == 0  # which can be exported


def untrained_calls(root: Path) -> dict[tuple[str, ...], Call]:
    """Commands that need no trained model."""
    seeds = {"--seed": ["1"]}
    return {
        ("plan",): {"--arch": ["mhmoe_lm_tiny"], "--vocab-size": ["100"], "--tokens-per-sample": ["16"]},
        ("prepare", "english"): {
            "--source": ["text", f"{root}/corpus.txt"], "--dest": ["dest"], "--vocab-size": ["340"], **seeds,
        },
        ("prepare", "multilingual"): {
            "--langs": ["de,en"], "--source": ["text", f"{root}/texts"], "--dest": ["dest"], "--vocab-size": ["340"],
        },
        ("prepare", "classification"): {
            "--train": [f"en={root}/train.jsonl"], "--valid": [f"de={root}/valid.jsonl"], "--data": [f"{root}/english"],
            "--labels": ["0", "1", "2"], "--dest": ["dest"],
        },
        ("prepare", "image-text"): {
            "--source": ["folder", f"{root}/captioned"], "--dest": ["dest"], "--vocab-size": ["290"],
            "--image-size": ["32"], "--patch-size": ["16"], "--visual-vocab-size": ["8"],
        },
        ("prepare", "words"): {"--index": [f"{root}/index.sense"], "--dest": ["dest"]},
        ("visual-tokenizer", "fit"): {
            "data": [f"{root}/shapes"], "--output": ["tokenizer.pt"], "--vocab-size": ["8"], "--patch-size": ["8"],
            "--image-size": ["32"], "--iterations": ["2"], "--max-patches": ["200"],
        },
        ("visual-tokenizer", "info"): {"file": [f"{root}/shapes/visual_tokenizer.pt"]},
        ("visual-tokenizer", "encode"): {
            "file": [f"{root}/shapes/visual_tokenizer.pt"], "images": [f"{root}/shapes/images/small-red-bar.png"],
        },
        ("reproduce",): {"name": ["demo"], "--dry-run": [], "--out": ["out"]},
        ("doctor",): {"--json": []},
        ("report",): {"runs": [f"{root}/run"], "--out": ["report.md"], "--no-plots": []},
        ("checkpoint", "inspect"): {"checkpoint": [f"{root}/imported/model.pt"], "--json": ["a.json"]},
        ("checkpoint", "convert"): {"source": [f"{root}/imported/model.pt"], "target": ["model.safetensors"]},
        ("checkpoint", "average"): {
            "--inputs": [f"{root}/imported/model.pt", f"{root}/imported/model.pt"], "--output": ["mean.pt"],
        },
        ("checkpoint", "mix"): {
            "--seed": [f"{root}/dense.pt"], "--branch": [f"{root}/dense.pt"], "--include-seed": [],
            "--output": ["mixed.pt"],
        },
        ("checkpoint", "pack"): {"source": [f"{root}/ternary/model.pt"], "target": ["packed.safetensors"]},
        ("checkpoint", "import-official"): {
            "checkpoint": [f"{root}/official.pt"], "--out": ["out"], "--data": [f"{root}/dictionary"],
        },
        ("checkpoint", "export"): {
            "source": [f"{root}/imported/model.pt"], "out": ["out"], "--format": ["hf"],
            "--data": [f"{root}/dictionary"],
        },
    }  # fmt: skip


def write_trained_fixtures(root: Path) -> None:
    """Models of every kind, each after one update, beside what :func:`write_untrained_fixtures` wrote."""
    english = TrainedModel(root / "english", root / "lm")
    sizes = "--sample-break-mode eos --tokens-per-sample 64 --decoder-embed-dim 64".split()
    train(english.data, english.folder, "mhmoe_lm_tiny", *sizes, max_update=1)

    (root / "labelled").mkdir()
    labelled = write_task(root / "labelled", english, examples=32, held_out=8)
    _train(root, *classification_words(labelled, root / "classifier", updates=1))

    _write_aligned(write_languages(root / "languages"))
    task = ("--task", "mhmoe_multilingual_language_modeling", "--tokens-per-sample", 128, "--decoder-embed-dim", 32)
    train(root / "languages", root / "multilingual", "mhmoe_lm_tiny", *task, max_update=1)

    images = write_fine_tuning_data(root / "images")
    _train(root, *pretraining_words(images, root / "beit3", updates=1))
    _train(root, *fine_tuning_words("mhmoe_vqa", images, root / "vqa", updates=1))
    captioning = ("--task", "mhmoe_captioning", "--criterion", "mhmoe_captioning", "--caption-max-len", 4)
    _train(root, *pretraining_words(root / "shapes", root / "captioner", *captioning, updates=1))
    (root / "xnli").mkdir()
    write_tasks_folder(root / "questions")
    for code in ("de", "en"):
        write_jsonl(root / "xnli" / f"xnli.dev.{code}.jsonl", xnli_rows(code))


def trained_calls(root: Path) -> dict[tuple[str, ...], Call]:
    """Commands that read a trained model."""
    return {
        ("evaluate",): {
            "checkpoint": [f"{root}/lm/checkpoint_last.pt"], "--data": [f"{root}/english"], "--record": ["record.json"],
        },
        ("analyze",): {"checkpoints": [f"{root}/lm/checkpoint_last.pt"], "--data": [f"{root}/english"],
                       "--polysemy": [f"{root}/words.json"], "--split": ["train"], "--out": ["out"], "--no-plots": []},
        ("generate",): {"checkpoint": [f"{root}/lm"], "--data": [f"{root}/english"], "--prompt": ["The river"],
                        "--max-len-b": ["12"]},
        ("zero-shot", "english"): {
            "--checkpoint": [f"{root}/lm"], "--data": [f"{root}/english"], "--tasks-dir": [f"{root}/questions"],
            "--tasks": ["rte,openbookqa"], "--out": ["out"], "--record": ["record.json"],
        },
        ("zero-shot", "xnli"): {
            "--checkpoint": [f"{root}/multilingual"], "--xnli-dir": [f"{root}/xnli"], "--out": ["out"],
            "--record": ["record.json"],
        },
        ("zero-shot", "probe"): {
            "--checkpoint": [f"{root}/multilingual"], "--data": [f"{root}/languages"], "--candidates": ["2"],
            "--max-items": ["3"], "--record": ["record.json"],
        },
    }  # fmt: skip


def further_calls(root: Path) -> list[tuple[tuple[str, ...], Call]]:
    """Calls of another kind of commands that have one already; what they take in common is tried there."""
    return [
        (("prepare", "english"), {
            "--source": ["domains", f"first={root}/corpus.txt", f"second={root}/texts"], "--dest": ["dest"],
            "--vocab-size": ["340"], "--document-separator": ["blank-line"], "--jsonl-field": ["text"],
        }),
        (("analyze",), {
            "checkpoints": [f"{root}/lm/checkpoint_last.pt"], "--data": [f"{root}/english"], "--view": [],
            "--text": [f"{root}/short.txt"], "--out": ["out"],
        }),
        (("analyze",), {
            "checkpoints": [f"{root}/beit3/checkpoint_last.pt"], "--data": [f"{root}/images"], "--view": [],
            "--words": ["red"], "--image": [f"{root}/shapes/images/small-red-bar.png"], "--out": ["out"],
        }),
    ]  # fmt: skip


def _train(root: Path, *words: Any) -> None:
    run_console("fairseq-train", *words, cwd=root)


def _write_captions(folder: Path, images: list[Path]) -> None:
    rows = [{"image": f"images/{path.name}", "caption": [path.stem.replace("-", " ")]} for path in images]
    write_jsonl(folder / "captions.jsonl", rows)


def _write_aligned(folder: Path) -> None:
    """Aligned test sentences; the dictionary has single characters, so there is a space after each."""
    (folder / "aligned").mkdir()
    pairs = zip(SENTENCES["en"].splitlines(), SENTENCES["de"].splitlines())
    rows = [
        {"key": str(number), "text": {code: " ".join(line.replace(" ", "")) for code, line in zip(("en", "de"), pair)}}
        for number, pair in enumerate(pairs)
    ]
    write_jsonl(folder / "aligned" / "test.jsonl", rows)
