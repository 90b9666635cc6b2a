"""scripts/experiment.py: the same search and study for text and for images and text."""

import json
import sys
from pathlib import Path

import pytest
from fairseq_arguments import parse_words

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import experiment

MANIFESTS = {
    "lm": {"source": {"name": "web-bible"}},
    "languages": {"languages": {"de": {}, "fr": {}}},
    "beit3": {"kind": "image-text"},
}
TASKS = {
    "lm": ("mhmoe_language_modeling", "moe_cross_entropy"),
    "languages": ("mhmoe_multilingual_language_modeling", "moe_cross_entropy"),
    "beit3": ("mhmoe_masked_multimodal", "mhmoe_masked_multimodal"),
}


@pytest.mark.parametrize("model", ["dense", "xmoe", "mhmoe-flops-h2"])
@pytest.mark.parametrize("kind", MANIFESTS)
def test_the_data_tell_what_is_learnt(kind: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFESTS[kind]))
    monkeypatch.setattr(sys, "argv", ["experiment.py", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    args = parse_words(experiment.train_command(experiment.parse_arguments(), model, 2e-3, 7, 40, tmp_path / "run"))
    assert (args.task, args.criterion) == TASKS[kind]
    family = "beit3" if kind == "beit3" else "lm"
    assert args.arch == f"{model.split('-')[0]}_{family}_tiny"
    assert (args.lr, args.seed, args.max_update, args.warmup_updates) == ([2e-3], 7, 40, 4)
    if model == "mhmoe-flops-h2":
        assert (args.mhmoe_heads_number, str(args.mhmoe_budget)) == (2, "flops")


@pytest.mark.parametrize("kind, figures", [("lm", False), ("languages", True), ("beit3", True)])
def test_evaluation_has_a_figure_for_each_language_or_modality(kind: str, figures: bool, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFESTS[kind]))
    assert experiment.has_several_figures(tmp_path) is figures
