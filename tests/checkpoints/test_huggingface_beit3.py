"""Exported BEiT-3 encoders and their heads compute the same elsewhere; transformers' pipelines run on them."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from beit3_models import IMAGES, SMALL, beit3_batch, beit3_dictionary
from exported_models import export
from PIL import Image

from mhmoe_fairseq.checkpoints.huggingface import export as export_module
from mhmoe_fairseq.commands.main import main as mhmoe
from mhmoe_fairseq.data.images.reading import read_image
from mhmoe_fairseq.data.images.transforms import IMAGENET, EvaluationTransform
from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.beit3 import build_beit3
from mhmoe_fairseq.models.heads import ImageClassificationHead, NLVR2Head, VQAHead

pytest.importorskip("tokenizers", reason="needs pip install tokenizers")
PROBE = Path(__file__).parents[1] / "support" / "beit3_probe.py"
ORIENTATION = 0x0112  # EXIF's tag
CLASSES = ["red", "green", "blue", "grey"]
HEADS = {"vqa": VQAHead, "image_classification": ImageClassificationHead}
SWIGLU = {"activation_fn": "silu", "no_bias": True}

# Architecture, head and whether its features are centred, flags.
MODELS: dict[str, tuple[str, str | None, bool, dict[str, Any]]] = {
    "mhmoe": ("mhmoe_beit3_tiny", "vqa", True, {}),
    "separate": (
        "mhmoe_beit3_tiny", "image_classification", False,
        {"mhmoe_modality_experts": "separate", "mhmoe_expert_banks": "per-head", "mhmoe_balancing": "quantile"},
    ),
    "dense": ("dense_beit3_tiny", "vqa", False, {**SWIGLU, "rms_norm": True, "subln": True}),
    "xmoe": ("xmoe_beit3_tiny", "image_classification", True, {"no_subln": True, "layernorm_embedding": True}),
    "deepnorm": ("smoe_beit3_tiny", None, False, {**SWIGLU, "deepnorm": True, "moe_freq": 1}),
}  # fmt: skip


def write_beit3(folder: Path, name: str, **more: Any) -> Any:
    """A checkpoint with its dictionary, whose parameters are all drawn; the model."""
    torch.manual_seed(0)
    arch, head, center, flags = MODELS[name]
    budget = {"mhmoe_budget": "none"} if arch.startswith("mhmoe") else {}
    options = architecture_options(arch, **{**SMALL, **IMAGES, "dropout": 0.0, **budget, **flags, **more})
    model = build_beit3(options, beit3_dictionary(), num_visual_tokens=6)
    if head is not None:
        model.register_head(head, HEADS[head](SMALL["encoder_embed_dim"], len(CLASSES), center=center))
    model.register_head("nlvr2", NLVR2Head(SMALL["encoder_embed_dim"]))
    means = [value for value in model.heads.buffers() if value.is_floating_point()]
    with torch.no_grad():
        for value in (*model.parameters(), *means):
            value += 0.2 * torch.randn_like(value) * (value.std(correction=0) or 1)
    folder.mkdir(parents=True)
    beit3_dictionary().save(str(folder / "dict.txt"))
    plain = (bool, int, float, type(None))
    stored = {key: value if isinstance(value, plain) else str(value) for key, value in vars(options).items()}
    task = {"_name": f"mhmoe_{head or 'masked_multimodal'}", "data": str(folder), "imagenet_views": name == "xmoe"}
    checkpoint = {
        "cfg": {"model": {**stored, "_name": arch}, "task": task, "criterion": {}}, "model": model.state_dict(),
        "task_state": {"classes": CLASSES} if head else {}, "optimizer_history": [], "extra_state": {},
    }  # fmt: skip
    torch.save(checkpoint, folder / "model.pt")
    return model.eval()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """For every model what this package computes and what one process without it does."""
    pytest.importorskip("transformers", reason="needs pip install transformers", minversion="5.10")
    root, found = tmp_path_factory.mktemp("models"), {}
    file = root / "image.png"
    pixels = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    turned, exif = root / "turned.png", Image.Exif()
    exif[ORIENTATION] = 6  # a quarter turn, which nobody makes but transformers' own pipelines
    Image.fromarray(pixels).save(turned, exif=exif)
    batch = {name: value.float() if name == "images" else value for name, value in beit3_batch("pair", [7, 4]).items()}
    for name in MODELS:
        model, out = write_beit3(root / name, name), root / name / "exported"
        assert export(root / name / "model.pt", out) == 0
        shown = turned if MODELS[name][1] == "vqa" else file
        given = {"ids": batch["text_tokens"], "images": batch["images"], "file": str(shown), "question": "w3 w17  w5"}
        torch.save(given, out / "probe.pt")
        found[name] = {"folder": out, **computed(model, MODELS[name][1], batch, file, name == "xmoe")}
    environment = {**os.environ, "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"}
    folders = [str(entry["folder"]) for entry in found.values()]
    subprocess.run([sys.executable, str(PROBE), *folders], env=environment, check=True)
    return {name: {**entry, "there": torch.load(entry["folder"] / "found.pt")} for name, entry in found.items()}


@torch.no_grad()
def computed(model: Any, head: str | None, batch: dict[str, Any], file: Path, of_imagenet: bool) -> dict[str, Any]:
    """This package's features by modality, logits of the head, and probabilities for the file and the question."""
    images, tokens = {"images": batch["images"]}, {"text_tokens": batch["text_tokens"]}
    found = {kind: model(**words)[0] for kind, words in (("image", images), ("text", tokens), ("pair", batch))}
    if head is None:
        return found
    view = EvaluationTransform(8, **({"crop_fraction": 0.875, "by": IMAGENET} if of_imagenet else {}))
    seen = {"images": view(Image.open(file))[None]}
    if head == "vqa":
        words = ("<s>", "w3", "w17", "w5", "</s>")
        seen["text_tokens"] = torch.tensor([[model.dictionary.index(word) for word in words]])
        return {**found, "logits": model(**batch, head=head)[0], "scores": model(**seen, head=head)[0][0].sigmoid()}
    return {**found, "logits": model(**images, head=head)[0], "scores": model(**seen, head=head)[0][0].softmax(-1)}


@pytest.mark.parametrize("name", MODELS)
def test_features_and_logits_elsewhere_are_ours(opened: dict[str, dict[str, Any]], name: str) -> None:
    found = opened[name]
    there = found["there"]
    real = torch.ones_like(found["pair"][..., 0], dtype=torch.bool)
    real[1, -3:] = False  # what stands behind a text is nobody's
    for kind in ("image", "text", "pair", "eager", "grouped", "logits"):
        if kind in there:
            ours, theirs = found.get(kind, found["pair"]), there[kind]
            if kind != "logits":
                kept = real[:, -ours.size(1) :] if kind != "image" else real[:, : ours.size(1)]
                ours, theirs = ours[kept], theirs[kept]
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert ("logits" in there) == (MODELS[name][1] is not None) and ("grouped" in there) == (name != "dense")


@pytest.mark.parametrize("name", [name for name, (_, head, *_) in MODELS.items() if head])
def test_pipelines_answer_as_our_evaluation(opened: dict[str, dict[str, Any]], name: str) -> None:
    found = opened[name]
    best = found["scores"].argsort(descending=True).tolist()[:3]
    key = "answer" if MODELS[name][1] == "vqa" else "label"
    answers = found["there"]["answers"]
    assert [answer[key] for answer in answers] == [CLASSES[label] for label in best]
    assert [answer["score"] for answer in answers] == pytest.approx(found["scores"][best].tolist(), abs=1e-5)
    assert found["there"]["saved again"]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_images_of_every_kind_are_seen_as_in_training(tmp_path: Path, mode: str) -> None:
    pytest.importorskip("transformers", reason="needs pip install transformers", minversion="5.10")
    sys.path.insert(0, str(Path(export_module.__file__).parent / "remote"))
    try:
        as_rgb = importlib.import_module("image_processing_mhmoe_beit3").as_rgb
    finally:
        sys.path.pop(0)
    generator, file = np.random.default_rng(0), tmp_path / "image.png"
    if mode == "I;16":
        image = Image.fromarray(generator.integers(0, 65536, (5, 7), dtype=np.uint16))
    else:
        pixels = generator.integers(0, 256, (5, 7, 4), dtype=np.uint8)
        image = Image.fromarray(pixels).convert("RGB").convert("P") if mode == "P" else Image.fromarray(pixels)
        image = image if mode == "P" else image.convert(mode)
    image.save(file, **({"transparency": image.getpixel((3, 2))} if mode == "P" else {}))
    with Image.open(file) as opened:
        seen = as_rgb(opened)
    assert np.array_equal(np.array(seen), np.array(read_image(file)))


def test_the_folder_tells_what_it_is_and_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_beit3(tmp_path / "run", "mhmoe")
    assert export(tmp_path / "run" / "model.pt", tmp_path / "hf") == 0
    shown = capsys.readouterr().out
    assert "left out: heads.nlvr2, image_head, text_head\n" in shown
    assert "to open: AutoModelForVisualQuestionAnswering" in shown
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: visual-question-answering" in card and "A BEiT-3 encoder of images and texts with 8" in card
    assert mhmoe(["checkpoint", "export", "--format", "fairseq", str(tmp_path / "hf"), str(tmp_path / "back")]) == 2
    assert "is BEiT-3: only language models come back" in capsys.readouterr().err
    write_beit3(tmp_path / "capacity", "mhmoe", mhmoe_routing="capacity")
    assert export(tmp_path / "capacity" / "model.pt", tmp_path / "none") == 2
    assert "--mhmoe-routing capacity cannot be exported" in capsys.readouterr().err and not (tmp_path / "none").exists()
