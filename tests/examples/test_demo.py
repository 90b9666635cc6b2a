"""``make demo``'s script on a small local corpus: the whole chain, a second run, a run that was cut off."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from own_scripts import ROOT, Scripts

MODELS = ("dense", "xmoe", "mhmoe-params", "mhmoe-flops")


class Demo(Scripts):
    """The demo's script on a small corpus."""

    def __init__(self, folder: Path) -> None:
        from trained_model import sentences

        self.folder = folder / "demo"
        lines = sentences(500)
        documents = ["\n".join(lines[start : start + 10]) for start in range(0, len(lines), 10)]
        (folder / "corpus.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
        source = f"text {folder / 'corpus.txt'}"
        super().__init__(folder, DEMO_DIR=str(self.folder), DEMO_SOURCE=source, DEMO_VOCAB_SIZE="340")


@pytest.mark.slow
def test_demo_from_text_to_report_then_again_then_after_a_cut(tmp_path: Path) -> None:
    demo = Demo(tmp_path)
    first = demo.run("scripts/demo.sh", DEMO_UPDATES="2")
    report = (demo.folder / "report.md").read_text(encoding="utf-8")
    for model in MODELS:
        assert f"{model}: training, 2 updates" in first and f"| {model} " in report
        assert "update 2: validation perplexity" in first
    assert len(list((demo.folder / "report-figures").glob("*.png"))) == 3

    evaluated = {path: path.stat().st_mtime_ns for path in demo.folder.glob("runs/*/eval-*.log")}
    assert len(evaluated) == 8
    second = demo.run("scripts/demo.sh", DEMO_UPDATES="2")
    assert second.count("already trained") == 4
    assert evaluated == {path: path.stat().st_mtime_ns for path in evaluated}

    # Cut off after its last checkpoint: the marker is missing, and training resumes from there.
    dense = demo.folder / "runs" / "dense"
    (dense / "finished").unlink()
    settings = {"DATA": str(demo.folder / "data"), "OUT": str(demo.folder / "runs")}
    demo.run("examples/english_lm/dense.sh", UPDATES="2", **settings)
    assert (dense / "finished").exists()
    assert f"Loaded checkpoint {dense}/checkpoint_last.pt" in (dense / "output.txt").read_text(encoding="utf-8")

    # Another setting: nothing of the old run is taken for the new one's.
    changed = demo.run("examples/english_lm/dense.sh", UPDATES="3", **settings)
    assert "starting afresh" in changed and not list(dense.glob("eval-*.log"))


def test_demo_refuses_bad_settings_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "DEMO_UPDATES": "0", "DEMO_DIR": str(tmp_path / "demo")}
    done = subprocess.run(["bash", "scripts/demo.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "UPDATES (0) must be a positive integer" in done.stderr
    assert not (tmp_path / "demo").exists()
