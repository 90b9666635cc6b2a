"""Visual tokenizers: images to ids, behind one interface (:class:`VisualTokenizer`).

Kinds: ``patch_kmeans`` (codes are mean patches, fitted in seconds, nothing to download), ``vqvae`` (a small network
trained by ``mhmoe visual-tokenizer fit``), and ``vqkd`` (BEiT v2's, read from its own checkpoint files).
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from ...common.errors import UserError
from ..tensor_files import load_tensors
from .base import FORMAT, SIZES, VisualTokenizer
from .fitted import VQVAE, PatchKMeans
from .vqkd import VQKD, as_saved, is_vqkd_checkpoint

__all__ = ["VQKD", "VQVAE", "PatchKMeans", "VisualTokenizer", "load_visual_tokenizer"]

KINDS: dict[str, type[VisualTokenizer]] = {kind.kind: kind for kind in (PatchKMeans, VQVAE, VQKD)}


def load_visual_tokenizer(path: Path) -> VisualTokenizer:
    """Return the tokenizer in ``path``, one of ours or a VQ-KD checkpoint of BEiT v2; nothing in the file is run.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    if not Path(path).is_file():
        raise UserError(f"--visual-tokenizer {path}: no such file; `mhmoe visual-tokenizer fit` makes one")
    content = load_tensors(Path(path), what="visual tokenizer", classes=[argparse.Namespace])
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a visual tokenizer")
    is_vqkd = is_vqkd_checkpoint(content)
    kind = VQKD.kind if is_vqkd else content.get("kind")
    if kind not in KINDS:
        raise UserError(f"{path}: no visual tokenizer ('kind' is {kind!r}, must be one of {', '.join(KINDS)})")
    if not is_vqkd and content.get("format") != FORMAT:
        raise UserError(f"{path}: format {content.get('format')!r}, this version reads {FORMAT}")
    try:
        found = as_saved(content) if is_vqkd else content
        sizes = [found[name] for name in SIZES]
        with torch.random.fork_rng(devices=[]):  # weights that are replaced at once must not cost anyone's draws
            tokenizer = KINDS[kind](*sizes, provenance=found["provenance"], **found["settings"])
        tokenizer.load_state_dict(found["state"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        fault = "not the layout of BEiT v2's VQ-KD checkpoints" if is_vqkd else "damaged visual tokenizer"
        raise UserError(f"{path}: {fault} ({' '.join(str(error).split())[:300]})") from error
    return tokenizer.eval()
