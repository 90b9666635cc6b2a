"""Checkpoints of dense language models, as a training that begins would find them."""

from pathlib import Path

import torch
from language_models import SMALL, small_dictionary

from mhmoe_fairseq.checkpoints.official.importing import stored_checkpoint
from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.language_model import build_language_model


def write_dense(path: Path, seed: int = 0, arch: str = "dense_lm_tiny", words: int = 40, **flags) -> Path:
    """A dense model's checkpoint, with every weight drawn, norms and biases included."""
    options = architecture_options(arch, **{**SMALL, "dropout": 0.0, **flags})
    options._name = arch
    torch.manual_seed(seed)
    model = build_language_model(options, small_dictionary(words))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    state = model.state_dict()
    torch.save(stored_checkpoint(state, options, {"_name": "mhmoe_language_modeling", "data": "d"}), path)
    return path
