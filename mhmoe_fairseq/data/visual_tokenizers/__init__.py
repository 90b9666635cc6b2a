"""Visual tokenizers: images to ids, behind one interface (:class:`VisualTokenizer`).

Kinds: ``patch_kmeans`` (codes are mean patches, fitted in seconds, nothing to download), ``vqvae`` (a small network
trained by ``mhmoe visual-tokenizer fit``), and ``vqkd`` (BEiT v2's, read from its own checkpoint files).
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...common.errors import UserError
from ..tensor_files import load_tensors
from .base import FORMAT, VisualTokenizer
from .patch_kmeans import PatchKMeans
from .vqkd import VQKD, is_vqkd_checkpoint, read_vqkd
from .vqvae import VQVAE

__all__ = ["VQKD", "VQVAE", "PatchKMeans", "VisualTokenizer", "load_visual_tokenizer"]

KINDS: dict[str, type[VisualTokenizer]] = {kind.kind: kind for kind in (PatchKMeans, VQVAE, VQKD)}


def load_visual_tokenizer(path: Path) -> VisualTokenizer:
    """The tokenizer in ``path``, one of ours or a VQ-KD checkpoint of BEiT v2; nothing in the file is run.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    content = _read(Path(path))
    if is_vqkd_checkpoint(content):
        return read_vqkd(content, path)
    kind = content.get("kind")
    if kind not in KINDS:
        raise UserError(f"{path}: no visual tokenizer ('kind' is {kind!r}, must be one of {', '.join(KINDS)})")
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: format {content.get('format')!r}, this version reads {FORMAT}")
    try:
        sizes = [content[name] for name in ("vocab_size", "patch_size", "image_size")]
        with torch.random.fork_rng(devices=[]):  # weights that are replaced at once must not cost anyone's draws
            tokenizer = KINDS[kind](*sizes, provenance=content["provenance"], **content["settings"])
        tokenizer.load_state_dict(content["state"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: damaged visual tokenizer ({' '.join(str(error).split())[:200]})") from error
    return tokenizer.eval()


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UserError(f"--visual-tokenizer {path}: no such file; `mhmoe visual-tokenizer fit` makes one")
    content = load_tensors(path, what="visual tokenizer", classes=[argparse.Namespace])
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a visual tokenizer")
    return content
