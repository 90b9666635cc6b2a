"""Labelled sentences, and fine-tuning of the tiny trained model on them through fairseq-train."""

import json
import random
from pathlib import Path
from typing import Any

from console import USER_DIR
from trained_model import TrainedModel, sentences

from mhmoe_fairseq.commands.main import main as mhmoe

# Hand-written, in the fields and labels of XNLI; one row is one example in all three languages.
_XNLI = (
    ("entailment", "The cat sleeps on the old sofa.", "An animal is asleep.",
     "Die Katze schläft auf dem alten Sofa.", "Ein Tier schläft.", "猫睡在旧沙发上。", "一只动物睡着了。"),
    ("contradiction", "Nobody came to the meeting.", "The hall was full of guests.",
     "Niemand kam zu dem Treffen.", "Der Saal war voller Gäste.", "没有人来开会。", "大厅里坐满了客人。"),
    ("neutral", "She bought three apples.", "The apples were for her brother.",
     "Sie kaufte drei Äpfel.", "Die Äpfel waren für ihren Bruder.", "她买了三个苹果。", "苹果是给她弟弟的。"),
    ("entailment", "It rained the whole night.", "The night was not dry.",
     "Es regnete die ganze Nacht.", "Die Nacht war nicht trocken.", "整夜都在下雨。", "那一夜并不干燥。"),
    ("neutral", "The train left at noon.", "The train was full.",
     "Der Zug fuhr mittags ab.", "Der Zug war voll.", "火车中午开走了。", "火车很满。"),
    ("contradiction", "The shop is closed today.", "You can buy bread there now.",
     "Der Laden ist heute zu.", "Man kann dort jetzt Brot kaufen.", "商店今天关门。", "你现在可以在那里买面包。"),
)  # fmt: skip
XNLI_LABELS = ("entailment", "neutral", "contradiction")
_PLACE = {"en": 1, "de": 3, "zh": 5}


def xnli_rows(code: str, **changes: Any) -> list[dict[str, Any]]:
    """The rows of one language as Hugging Face's copy of XNLI has them: premise, hypothesis, label 0, 1 or 2."""
    place = _PLACE[code]
    return [
        {"premise": row[place], "hypothesis": row[place + 1], "label": XNLI_LABELS.index(row[0]), **changes}
        for row in _XNLI
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_official_tsv(path: Path, *codes: str) -> Path:
    """XNLI's own layout: all languages in one file, labels as words."""
    lines = ["language\tgold_label\tsentence1\tsentence2\tpairID"]
    for code in codes:
        place = _PLACE[code]
        lines += [f"{code}\t{row[0]}\t{row[place]}\t{row[place + 1]}\t{n}" for n, row in enumerate(_XNLI)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def prepare(*arguments: object) -> int:
    """``mhmoe prepare classification``; its exit status."""
    return mhmoe(["prepare", "classification", *map(str, arguments)])


def write_task(root: Path, model: TrainedModel, examples: int = 256, held_out: int = 48) -> Path:
    """Prepared data of a question that is easy to learn: at what time and place does the sentence play?

    All sentences are English; the held-out ones are in two files under two codes, as for two languages.
    """
    lines = sentences(examples + 2 * held_out)
    random.Random(1).shuffle(lines)
    rows = [{"text": line, "label": "time" if "before dawn" in line or "clouds" in line else "place"} for line in lines]
    write_jsonl(root / "train.jsonl", rows[:examples])
    write_jsonl(root / "one.jsonl", rows[examples : examples + held_out])
    write_jsonl(root / "two.jsonl", rows[examples + held_out :])
    arguments = ("--text-fields", "text", "--data", model.data, "--dest", root / "data")
    held_out_files = (f"en={root / 'one.jsonl'}", f"fr={root / 'two.jsonl'}")
    assert prepare("--train", f"en={root / 'train.jsonl'}", "--valid", *held_out_files, *arguments) == 0
    return root / "data"


def training_words(data: Path, save_dir: Path, *flags: object, updates: int) -> list[object]:
    """The words of ``fairseq-train`` for a model of ``trained_model``'s shape."""
    return [
        data, "--user-dir", USER_DIR, "--task", "mhmoe_sentence_classification",
        "--criterion", "mhmoe_sentence_classification", "--arch", "mhmoe_lm_tiny", "--decoder-layers", 2,
        "--decoder-embed-dim", 64, "--tokens-per-sample", 64, "--batch-size", 16, "--optimizer", "mhmoe_adam",
        "--lr", 0.002, "--lr-scheduler", "fixed", "--clip-norm", 1, "--max-update", updates, "--save-dir", save_dir,
        "--valid-subset", "valid_en,valid_fr", "--best-checkpoint-metric", "accuracy",
        "--maximize-best-checkpoint-metric", "--cpu", "--num-workers", 0, "--log-format", "json", "--log-interval", 1,
        "--no-epoch-checkpoints", *flags,
    ]  # fmt: skip
