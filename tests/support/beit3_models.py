"""Small BEiT-3 models and batches for the tests."""

from typing import Any

import torch
from fairseq.data import Dictionary
from torch import Tensor

from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.beit3 import MHMoEBEiT3, build_beit3
from mhmoe_fairseq.moe.parallelism import ExpertParallelism

SMALL = {"encoder_layers": 2, "encoder_embed_dim": 32, "encoder_attention_heads": 2, "encoder_ffn_embed_dim": 64}
IMAGES = {"img_size": 8, "patch_size": 4, "max_text_length": 12}
PATCHES = 4
IMAGE_POSITIONS = 1 + PATCHES
FAMILIES = ("dense", "smoe", "xmoe", "mhmoe")
KINDS = ("image", "text", "pair")


def beit3_dictionary(words: int = 40) -> Dictionary:
    dictionary = Dictionary()
    for number in range(words):
        dictionary.add_symbol(f"w{number}")
    dictionary.add_symbol("<mask>")
    return dictionary


def small_beit3(
    arch: str = "mhmoe_beit3_tiny",
    seed: int = 0,
    dictionary: Dictionary | None = None,
    num_visual_tokens: int = 6,
    parallel: ExpertParallelism | None = None,
    **flags: Any,
) -> MHMoEBEiT3:
    """A model of 2 layers of 32, the second an MoE layer, for images of 2x2 patches; without dropout unless given."""
    torch.manual_seed(seed)
    flags = {**SMALL, **IMAGES, "dropout": 0.0, **flags}
    if arch.startswith("mhmoe"):
        flags.setdefault("mhmoe_budget", "none")  # no expert width comes within 0.5 % of so few parameters
    options = architecture_options(arch, **flags)
    return build_beit3(options, dictionary or beit3_dictionary(), num_visual_tokens, parallel)


def beit3_batch(kind: str, lengths: list[int], seed: int = 0, size: int = 8, masked: bool = False) -> dict[str, Tensor]:
    """What the model is called with: a row for each length, texts padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    if kind != "text":
        batch["images"] = torch.randn(len(lengths), 3, size, size, generator=generator, dtype=torch.double)
        if masked:
            batch["masked_patches"] = torch.rand(len(lengths), (size // 4) ** 2, generator=generator) < 0.4
    if kind != "image":
        rows = torch.full((len(lengths), max(lengths)), Dictionary().pad())
        for row, length in zip(rows, lengths):
            row[:length] = torch.randint(4, 44, (length,), generator=generator)
        batch["text_tokens"] = rows
    return batch
