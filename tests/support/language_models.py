"""Small language models and batches for the tests."""

from typing import Any

import torch
from fairseq.data import Dictionary
from torch import Tensor

from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.counts import ModelCounts, build_on_meta, count_built
from mhmoe_fairseq.models.flags import context_of
from mhmoe_fairseq.models.language_model import MHMoELanguageModel, build_language_model
from mhmoe_fairseq.moe.parallelism import ExpertParallelism

SMALL = {"decoder_layers": 2, "decoder_embed_dim": 32, "decoder_attention_heads": 2, "decoder_ffn_embed_dim": 64}
FAMILIES = ("dense", "smoe", "xmoe", "mhmoe")


def small_dictionary(words: int = 40) -> Dictionary:
    dictionary = Dictionary()
    for number in range(words):
        dictionary.add_symbol(f"w{number}")
    return dictionary


def small_model(
    arch: str = "mhmoe_lm_tiny",
    seed: int = 0,
    dictionary: Dictionary | None = None,
    parallel: ExpertParallelism | None = None,
    **flags: Any,
) -> MHMoELanguageModel:
    """A model of 2 layers of 32, the second an MoE layer; without dropout unless given."""
    torch.manual_seed(seed)
    flags = {**SMALL, "dropout": 0.0, **flags}
    if arch.startswith("mhmoe"):
        flags.setdefault("mhmoe_budget", "none")  # no expert width comes within 0.5 % of so few parameters
    options = architecture_options(arch, **flags)
    return build_language_model(options, dictionary or small_dictionary(), parallel)


def count_model(options: Any, dictionary: Dictionary | None = None) -> ModelCounts:
    return count_built(build_on_meta(options, dictionary or small_dictionary()), context_of(options))


def token_rows(lengths: list[int], seed: int = 0, words: int = 44) -> Tensor:
    """Rows of random words, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.full((len(lengths), max(lengths)), Dictionary().pad())
    for row, length in zip(rows, lengths):
        row[:length] = torch.randint(4, words, (length,), generator=generator)
    return rows


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()
