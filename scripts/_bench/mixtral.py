"""Hugging Face's Mixtral block on the sub-tokens, between the same two projections.

Its experts are SwiGLU (three matrices, no biases), so they get the inner width at which the FLOPs
equal those of the GELU experts, and its router is one linear map.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from .setting import Setting


def has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


class MixtralBetweenProjections(nn.Module):
    """``MixtralSparseMoeBlock`` with one of its expert implementations (``grouped_mm`` or ``eager``)."""

    def __init__(self, setting: Setting, implementation: str) -> None:
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(
            hidden_size=setting.sub_dim,
            intermediate_size=setting.swiglu_dim,
            num_local_experts=setting.num_experts,
            num_experts_per_tok=setting.top_k,
            experts_implementation=implementation,
        )
        self.sub_dim = setting.sub_dim
        self.head_projection = nn.Linear(setting.embed_dim, setting.embed_dim)
        self.block = MixtralSparseMoeBlock(config)
        self.merge_projection = nn.Linear(setting.embed_dim, setting.embed_dim)
        for parameter in self.block.parameters():  # the block leaves them unwritten, for a checkpoint to fill
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        sub_tokens = self.head_projection(x).view(1, -1, self.sub_dim)
        return self.merge_projection(self.block(sub_tokens).view_as(x)), None

    @torch.no_grad()
    def copy_from(self, ours: nn.Module) -> None:
        """Take the weights of our layer built with :meth:`Setting.swiglu_config`."""
        source = dict(ours.named_parameters())
        for projection in ("head_projection", "merge_projection"):
            for part in ("weight", "bias"):
                getattr(getattr(self, projection), part).copy_(source[f"{projection}.0.{part}"])
        self.block.gate.weight.copy_(source["router.weight"])
        gate_up = torch.cat(
            [source["experts.fc1_weight"], source["experts.gate_weight"]], dim=1
        )  # SiLU on the first half
        self.block.experts.gate_up_proj.copy_(gate_up)
        self.block.experts.down_proj.copy_(source["experts.fc2_weight"])


def build_mixtral(setting: Setting, implementation: str) -> nn.Module:
    """The block with the chosen implementation; check that transformers really runs that one."""
    module = MixtralBetweenProjections(setting, implementation)
    chosen = module.block.experts.config._experts_implementation
    if chosen != implementation:
        raise RuntimeError(f"transformers would run experts_implementation={chosen}, not {implementation}")
    return module
