"""The small models whose figures are kept: one of every kind, how it is trained and how it is evaluated.

Every training is a real ``fairseq-train`` in float32, on data that the tests' own helpers write. What an update gave is
read from the checkpoint saved after it: fairseq rounds what it logs, but keeps there what it rounded. Batches are as
large as they are so that one sub-token that another processor routes otherwise, at a tie, changes next to nothing.
"""

import gzip
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import torch
from console import USER_DIR, run_console, write_corpus
from images_and_words import SHAPES, write_images_and_words
from multilingual_data import write_languages

from mhmoe_fairseq.checkpoints.open import open_model, open_text_model
from mhmoe_fairseq.evaluation.evaluate import evaluate as evaluate_split
from mhmoe_fairseq.evaluation.scoring import TextScorer

REFERENCES = Path(__file__).resolve().parent / "references"
RELEASE = packages_distributions()["fairseq"][0]  # their batches come in different orders
UPDATES, SAVED = 20, 10  # of a training, and after which the checkpoint that is kept was saved
Figures = dict[str, list[float]]  # by name, of one update after the other
_NAMES = ("loss", "image_loss", "text_loss", "pair_image_loss", "pair_text_loss", "gate_loss", "z_loss", "gnorm")
_SCORED_TOKENS = 40


@dataclass(frozen=True)
class Kind:
    """A kind of model: the folder of its data, and the words of ``fairseq-train`` that are its own."""

    data: str
    words: tuple[object, ...]

    @property
    def is_language_model(self) -> bool:
        return self.data != "images"


def _language_model(arch: str, *flags: object, data: str = "text") -> Kind:
    task = "mhmoe_language_modeling" if data == "text" else "mhmoe_multilingual_language_modeling"
    return Kind(data, (
        "--task", task, "--arch", arch, "--criterion", "moe_cross_entropy", "--decoder-layers", 2,
        "--decoder-embed-dim", 8, "--decoder-attention-heads", 2, "--tokens-per-sample", 16, "--batch-size", 32, *flags,
    ))  # fmt: skip


_EXPERTS = ("--moe-expert-count", 4, "--moe-top-k", 2)
_HEADS = (*_EXPERTS, "--mhmoe-heads-number", 2)
_NARROW = ("--decoder-ffn-embed-dim", 16)
_SWIGLU = (
    "--activation-fn", "silu", "--rms-norm", "--rotary-embed", "--no-bias", "--no-token-positional-embeddings",
)  # fmt: skip
KINDS = {
    "dense": _language_model("dense_lm_tiny", "--decoder-ffn-embed-dim", 32),
    "smoe": _language_model("smoe_lm_tiny", *_EXPERTS, *_NARROW),
    "xmoe": _language_model("xmoe_lm_tiny", *_EXPERTS, *_NARROW),
    "mhmoe_params": _language_model("mhmoe_lm_tiny", *_HEADS, "--decoder-ffn-embed-dim", 20),
    "mhmoe_flops": _language_model("mhmoe_lm_tiny", *_HEADS, *_NARROW, "--mhmoe-budget", "flops"),
    "mhmoe_capacity": _language_model(
        "mhmoe_lm_tiny", *_HEADS, *_NARROW, "--moe-ffn-dim", 16, "--mhmoe-routing", "capacity"
    ),
    "mhmoe_swiglu": _language_model("mhmoe_lm_tiny", *_HEADS, *_NARROW, "--moe-ffn-dim", 16, *_SWIGLU),
    "multilingual": _language_model(
        "mhmoe_lm_tiny", *_HEADS, *_NARROW, "--moe-ffn-dim", 16, "--tokens-per-sample", 32, "--batch-size", 64,
        "--multilang-sampling-alpha", 0.5, data="languages",
    ),
    "beit3": Kind("images", (
        "--task", "mhmoe_masked_multimodal", "--arch", "mhmoe_beit3_tiny", "--criterion", "mhmoe_masked_multimodal",
        *SHAPES, "--encoder-layers", 2, "--encoder-embed-dim", 8, "--encoder-attention-heads", 2,
        "--encoder-ffn-embed-dim", 16, "--moe-ffn-dim", 16, *_HEADS, "--batch-size", 8,
    )),
}  # fmt: skip


def write_data(root: Path) -> None:
    """The data folders of all kinds below ``root``, and the plugin.

    The visual tokenizer is a kept one: a checkpoint names the digest of its numbers, which are fitted.
    """
    (root / "corpus").mkdir()
    write_corpus(root / "corpus", words=24).rename(root / "text")
    write_languages(root / "languages")
    write_images_and_words(root / "images")
    shutil.copy(REFERENCES / "visual_tokenizer.pt", root / "images")
    (root / USER_DIR.name).symlink_to(USER_DIR)


def train(kind: Kind, root: Path, save_dir: Path, dropout: float = 0.0, start: Path | None = None) -> Figures:
    """Train from the first update, or from the checkpoint ``start``, to the last; the figures of every update.

    Paths are given as they look from ``root``: a checkpoint that is kept names no folder of a machine.
    """
    names = ["--dropout", "--attention-dropout", "--activation-dropout"]
    if not kind.is_language_model:
        names.append("--drop-path-rate")
    run_console(
        "fairseq-train", kind.data, "--user-dir", USER_DIR.name, *kind.words,
        *(word for name in names for word in (name, dropout)),
        "--optimizer", "mhmoe_adam", "--adam-betas", "(0.9, 0.98)", "--weight-decay", 0.01, "--clip-norm", 1,
        "--lr", 0.003, "--lr-scheduler", "inverse_sqrt", "--warmup-updates", 5, "--max-update", UPDATES,
        "--save-dir", os.path.relpath(save_dir, root), "--save-interval-updates", 1, "--no-last-checkpoints",
        "--disable-validation", "--cpu", "--num-workers", 0, *(() if start is None else ("--restore-file", start)),
        cwd=root,
    )  # fmt: skip
    return _figures(save_dir, first=1 if start is None else SAVED + 1)


def _figures(save_dir: Path, first: int) -> Figures:
    by_update: dict[int, dict[str, float]] = {}
    for path in save_dir.glob("checkpoint*.pt"):
        state = torch.load(path, weights_only=True)
        meters = {name: meter for _, name, _, meter in state["extra_state"]["metrics"]["train"]}
        by_update[state["optimizer_history"][-1]["num_updates"]] = {
            name: _digits(meters[name]["val"]) for name in _NAMES if "val" in meters.get(name, {})
        }
    assert sorted(by_update) == list(range(first, UPDATES + 1))
    return {name: [by_update[update][name] for update in sorted(by_update)] for name in by_update[UPDATES]}


def evaluate(kind: Kind, root: Path, checkpoint: Path) -> dict[str, Any]:
    """Bits of the test split and, of a language model, the natural log-probability of every token of one text.

    Block by block: experts with limited slots refuse tokens by what else is in a batch, and batches of the two fairseq
    releases differ.
    """
    opened = open_model(checkpoint, root / kind.data)
    if not kind.is_language_model:
        record = evaluate_split(opened, "test", batch_size=4)
        return {"bits": {name: _digits(value) for name, value in record.values("loss").items()}}
    record = evaluate_split(opened, "test", max_tokens=None, batch_size=1)
    bits = {name: _digits(value) for name, value in record.values("loss").items()}
    bits["total"] = _digits(record.metrics["loss"].value)
    scorer = TextScorer(open_text_model(checkpoint, root / kind.data))
    words = len(scorer.dictionary) - scorer.dictionary.nspecial
    tokens = [scorer.dictionary.nspecial + place**2 % words for place in range(_SCORED_TOKENS)]
    pairs = [(tokens[:place], tokens[place : place + 1]) for place in range(_SCORED_TOKENS)]
    return {"bits": bits, "log_probs": [_digits(score.log_prob) for score in scorer.score_all(pairs)]}


def mask_kind() -> str:
    """Which dropout masks this machine draws from a seed: on some processors torch takes MKL's generator."""
    drawn = torch.empty(4096).bernoulli_(0.9, generator=torch.Generator().manual_seed(1))
    return hashlib.sha256(bytes(drawn.to(torch.uint8).tolist())).hexdigest()[:12]


# ---------------------------------------------------------------------- files


def read_references(name: str) -> dict[str, Any]:
    """What is kept of a kind; nothing if nothing is."""
    path = REFERENCES / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def add_references(name: str, root: Path, again: bool) -> None:
    """Run what has no references of a kind yet, or everything ``again``, and keep what it gives.

    The checkpoint, and with it the figures of evaluation, come from fairseq-fixed.
    """
    kind, kept = KINDS[name], read_references(name)
    own = kept[RELEASE] = {} if again else kept.get(RELEASE, {})
    if "dropout 0" not in own:
        own["dropout 0"] = train(kind, root, root / name)
        if RELEASE == "fairseq-fixed":
            (checkpoint,) = (root / name).glob(f"checkpoint_*_{SAVED}.pt")
            _packed(name).write_bytes(gzip.compress(checkpoint.read_bytes(), mtime=0))
            kept["evaluation"] = evaluate(kind, root, checkpoint)
        own["resumed"] = train(kind, root, root / f"{name}-resumed", start=unpack_checkpoint(name, root))
    by_masks = own.setdefault("dropout 0.1", {})
    if mask_kind() not in by_masks:
        by_masks[mask_kind()] = train(kind, root, root / f"{name}-dropout", dropout=0.1)
    text = json.dumps(kept, indent=1, sort_keys=True)
    text = re.sub(r"\[[^]]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # a line for every list
    (REFERENCES / f"{name}.json").write_text(text + "\n")


def unpack_checkpoint(name: str, folder: Path) -> Path:
    """The kept checkpoint of a kind as a file in ``folder``."""
    path = folder / f"{name}.pt"
    path.write_bytes(gzip.decompress(_packed(name).read_bytes()))
    return path


def _packed(name: str) -> Path:
    return REFERENCES / f"{name}.pt.gz"


def _digits(value: Any) -> float:
    """As many digits as tell every float32 from its neighbours."""
    return float(f"{float(value):.9g}")
