"""A small corpus and two really trained, really evaluated runs, laid out as ``mhmoe report`` reads them."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Runs:
    """The data folder and the runs' folders by name."""

    data: Path
    dense: Path
    mhmoe: Path

    def copy(self, name: str, to: Path) -> Path:
        """A copy of a run that a test may damage."""
        return Path(shutil.copytree(getattr(self, name), to))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    from console import evaluate, train
    from trained_model import sentences

    from mhmoe_fairseq.commands.main import main

    root = tmp_path_factory.mktemp("runs")
    lines = sentences(600)
    documents = ["\n".join(lines[start : start + 10]) for start in range(0, len(lines), 10)]
    (root / "corpus.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    command = ["--source", "text", root / "corpus.txt", "--dest", root / "data", "--vocab-size", 340]
    assert main(["prepare", "english", *map(str, command)]) == 0
    flags = {
        "dense": ("dense_lm_tiny",),
        "mhmoe": ("mhmoe_lm_tiny", "--mhmoe-budget", "flops", "--mhmoe-heads-number", "2", "--moe-expert-count", "4"),
    }
    for name, (arch, *moe) in flags.items():
        run = root / name
        log = ["--log-format", "json", "--log-interval", 2, "--log-file", run / "train.log"]
        validate = ["--validate-interval-updates", 4, "--required-batch-size-multiple", 1]
        run.mkdir()
        train(root / "data", run, arch, *moe, *log, *validate, "--decoder-embed-dim", 64, max_update=8)
        for split in ("valid", "test"):
            output = evaluate(root / "data", run / "checkpoint_last.pt", "--gen-subset", split)
            (run / f"eval-{split}.log").write_text(output, encoding="utf-8")
        shutil.copy(root / "data" / "manifest.json", run)
    return Runs(root / "data", root / "dense", root / "mhmoe")
