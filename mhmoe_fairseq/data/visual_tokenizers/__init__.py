"""Visual tokenizers: images to ids, behind one interface (:class:`VisualTokenizer`).

Kinds: ``patch_kmeans`` (codes are mean patches, fitted in seconds, nothing to download), ``vqvae`` (a small network
trained by ``mhmoe visual-tokenizer fit``), and ``vqkd`` (BEiT v2's, read from its own checkpoint files).
"""

from __future__ import annotations

from .base import VisualTokenizer
from .files import load_visual_tokenizer
from .patch_kmeans import PatchKMeans, fit_patch_kmeans
from .vqkd import VQKD
from .vqvae import VQVAE

__all__ = ["VQKD", "VQVAE", "PatchKMeans", "VisualTokenizer", "fit_patch_kmeans", "load_visual_tokenizer"]
