"""Opens exported BEiT-3 models as someone who never heard of fairseq: ``python beit3_probe.py FOLDER ...``.

Each folder has ``probe.pt``: ``ids`` and ``images`` of some pairs, texts padded on the right; ``file``, an image, and
``question``. What comes of it is written to ``found.pt`` there.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

for _name in ("mhmoe_fairseq", "fairseq", "torchscale", "fairscale", "sentencepiece"):
    sys.modules[_name] = None  # type: ignore[assignment]

import torch  # noqa: E402
import transformers  # noqa: E402

LOADERS = ("AutoModelForImageClassification", "AutoModelForVisualQuestionAnswering")


@torch.no_grad()
def use(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Features by modality, ``(B, L, D)``; the head's logits; what the pipeline answers."""
    known = {"trust_remote_code": True}
    encoder = transformers.AutoModel.from_pretrained(folder, **known).eval()
    inputs = {"image": {"pixel_values": given["images"]}, "text": {"input_ids": given["ids"]}}
    inputs["pair"] = {**inputs["image"], **inputs["text"]}
    found: dict[str, Any] = {kind: encoder(**words).last_hidden_state for kind, words in inputs.items()}
    if hasattr(encoder.config, "mhmoe_freq") and encoder.config.mhmoe_freq:
        encoder.set_experts_implementation("grouped_mm")
        found["grouped"] = encoder(**inputs["pair"]).last_hidden_state
    encoder.set_attn_implementation("eager")
    found["eager"] = encoder(**inputs["pair"]).last_hidden_state
    loader = next((name for name in LOADERS if name in encoder.config.auto_map), None)
    if loader is not None:
        model = getattr(transformers, loader).from_pretrained(folder, **known).eval()
        is_image = loader == "AutoModelForImageClassification"
        found["logits"] = model(**inputs["image" if is_image else "pair"]).logits
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch)
            again = getattr(transformers, loader).from_pretrained(scratch, **known).state_dict()
        found["saved again"] = all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
        task = "image-classification" if is_image else "visual-question-answering"
        ask = transformers.pipeline(task, str(folder), **known)
        found["answers"] = ask(given["file"], top_k=3) if is_image else ask(given["file"], given["question"], top_k=3)
    return found


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        torch.save(use(folder, torch.load(folder / "probe.pt")), folder / "found.pt")


if __name__ == "__main__":
    main()
