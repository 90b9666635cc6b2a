"""Checkpoints of every kind of model that is exported, none of whose parameters has a special value."""

from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from language_models import SMALL, small_dictionary
from torch import Tensor

from mhmoe_fairseq.checkpoints.official.importing import stored_checkpoint
from mhmoe_fairseq.checkpoints.open import open_model
from mhmoe_fairseq.commands.main import main as mhmoe
from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.language_model import build_language_model

WORDS = 60
SWIGLU = {"activation_fn": "silu", "rms_norm": True, "no_bias": True, "rotary_embed": True}

# Every option that changes what is computed is in at least one of them.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mhmoe": ("mhmoe_lm_tiny", {}),
    "dense": ("dense_lm_tiny", {"decoder_learned_pos": True}),
    "dense swiglu": ("dense_lm_tiny", {**SWIGLU, "subln": True, "no_scale_embedding": True}),
    "smoe": ("smoe_lm_tiny", {"xpos_rel_pos": True, "moe_freq": 1, "no_share_decoder_input_output_embed": True}),
    "xmoe": ("xmoe_lm_tiny", {"rotary_embed": True, "no_subln": True, "moe_top_k": 1, "layernorm_embedding": True}),
    "swiglu": ("mhmoe_lm_tiny", {**SWIGLU, "mhmoe_shared_expert_dim": 24, "moe_top_k": 3}),
    "swiglu sub-LN": ("mhmoe_lm_tiny", {**SWIGLU, "subln": True, "mhmoe_projection_bias": "on"}),
    "swiglu biases": ("mhmoe_lm_tiny", {"activation_fn": "silu", "subln": True, "mhmoe_projection_layers": 3}),
    "no bias": ("mhmoe_lm_tiny", {"no_bias": True, "activation_fn": "relu", "mhmoe_shared_expert_dim": 8}),
    "no projections": ("mhmoe_lm_tiny", {"mhmoe_projection_layers": 0, "mhmoe_subtoken_residual": True}),
    "p1": ("mhmoe_lm_tiny", {"mhmoe_router_preset": "p1", "mhmoe_projection_layers": 2}),
    "gates": (
        "smoe_lm_tiny",
        {"no_token_positional_embeddings": True, "mhmoe_normalize_gates": "off", "mhmoe_granularity": 2},
    ),
    "sigmoid": ("mhmoe_lm_tiny", {"mhmoe_gate_score": "sigmoid", "mhmoe_gate_scale": 2.5}),
    "balanced": ("smoe_lm_tiny", {"mhmoe_gate_score": "sigmoid", "mhmoe_balancing": "bias-sign"}),
    "balanced softmax": ("mhmoe_lm_tiny", {"mhmoe_balancing": "quantile", "mhmoe_normalize_gates": "off"}),
    "balanced logits": ("mhmoe_lm_tiny", {"mhmoe_gate_score": "logit", "mhmoe_balancing": "bias-sign"}),
    "deepseekmoe": ("deepseekmoe_lm_tiny", {"mhmoe_shared_experts": 2}),
    "groups": (
        "smoe_lm_tiny",
        {"mhmoe_gate_score": "sigmoid", "mhmoe_balancing": "bias-sign", "mhmoe_expert_groups": 4,
         "mhmoe_kept_groups": 2, "mhmoe_group_score": "top2", "moe_top_k": 3, "mhmoe_balance_scope": "sequence",
         "mhmoe_balance_assignment": "topk"},
    ),
    "banks": (
        "mhmoe_lm_tiny",
        {"mhmoe_expert_banks": "per-head", "mhmoe_latent_dim": 48, "mhmoe_gate_score": "sigmoid",
         "mhmoe_balancing": "bias-proportional", "mhmoe_router_preset": "p1", "activation_fn": "swiglu7",
         "mhmoe_shared_expert_dim": 8},
    ),
    "latent": (
        "mhmoe_lm_tiny",
        {"mhmoe_heads_number": 1, "mhmoe_latent_dim": 16, "mhmoe_router_input": "token", "mhmoe_projection_layers": 2,
         "mhmoe_merge_norm": True, "mhmoe_expert_groups": 2},
    ),
    "remoe": ("remoe_lm_tiny", {"mhmoe_gate_scale": 1.5}),
    "remoe heads": ("mhmoe_lm_tiny", {"mhmoe_routing": "relu", "mhmoe_expert_banks": "per-head"}),
    "deepnorm": ("mhmoe_lm_tiny", {"deepnorm": True, "mhmoe_no_split": True, "mhmoe_balance_assignment": "gates"}),
}  # fmt: skip


def write_model(
    folder: Path, arch: str, task: dict[str, Any] | None = None, dictionary: Dictionary | None = None, **flags: Any
) -> Path:
    """A checkpoint with its dictionary, whose parameters are all drawn, norms and biases, too."""
    torch.manual_seed(0)
    if arch.startswith("mhmoe"):
        flags.setdefault("mhmoe_budget", "none")
    lengths = {"tokens_per_sample": 24, "max_target_positions": 24}
    options = architecture_options(arch, **{**SMALL, "dropout": 0.0, **lengths, **flags})
    options._name = arch
    dictionary = dictionary or small_dictionary(WORDS)
    model = build_language_model(options, dictionary)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.2 * torch.randn_like(value) * (value.std(correction=0) or 1)
        for name, value in model.named_buffers():
            if name.endswith("balancing.bias"):
                value += 0.1 * torch.randn_like(value)
            if name.endswith("adaptive.weight"):  # one for all layers
                value.fill_(0.3)
    folder.mkdir(parents=True)
    dictionary.save(str(folder / "dict.txt"))
    task = {"_name": "mhmoe_language_modeling", "data": str(folder), **(task or {})}
    torch.save(stored_checkpoint(model.state_dict(), options, task), folder / "model.pt")
    return folder / "model.pt"


@torch.no_grad()
def logits_of(checkpoint: Path, ids: Tensor) -> Tensor:
    return open_model(checkpoint, checkpoint.parent, "cpu").model(ids)[0]


def export(checkpoint: Path, out: Path, *flags: str) -> int:
    return mhmoe(["checkpoint", "export", "--format", "hf", *flags, str(checkpoint), str(out)])
