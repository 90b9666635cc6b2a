"""A tiny MH-MoE language model, really trained, shared by the tests of using one."""

import random
from dataclasses import dataclass
from pathlib import Path

from console import train

from mhmoe_fairseq.commands.main import main as mhmoe

_SUBJECTS = "river farmer teacher engine garden letter winter captain window market forest doctor".split()
_VERBS = "finds follows carries remembers crosses leaves watches mends paints opens".split()
_PLACES = "near the old bridge;behind a quiet house;under grey clouds;along the northern road;before dawn".split(";")


@dataclass(frozen=True)
class TrainedModel:
    """Folders of the data (dict.txt, sentencepiece.model, test.bin, text/test.txt) and of the checkpoints."""

    data: Path
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint_last.pt"

    def held_out_lines(self, count: int) -> list[str]:
        lines = (self.data / "text" / "test.txt").read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line][:count]


def sentences(count: int) -> list[str]:
    """Different sentences of a tiny English."""
    generator = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < count:
        one, two = generator.sample(_SUBJECTS, 2)
        number = generator.randrange(100)
        found[f"The {one} {generator.choice(_VERBS)} the {two} {generator.choice(_PLACES)} {number}."] = None
    return list(found)


def train_tiny_model(root: Path) -> TrainedModel:
    """Prepare a corpus with SentencePiece through ``mhmoe prepare`` and train 60 updates through ``fairseq-train``."""
    lines = sentences(800)
    documents = ["\n".join(lines[start : start + 10]) for start in range(0, len(lines), 10)]
    (root / "corpus.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    arguments = ["--source", "text", root / "corpus.txt", "--dest", root / "data", "--vocab-size", 340]
    assert mhmoe(["prepare", "english", *map(str, arguments)]) == 0
    flags = "--sample-break-mode eos --tokens-per-sample 64 --batch-size 16 --decoder-embed-dim 64 --lr 0.005".split()
    train(root / "data", root / "saved", "mhmoe_lm_tiny", *flags, max_update=60)
    return TrainedModel(root / "data", root / "saved")
