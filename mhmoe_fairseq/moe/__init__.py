"""MH-MoE in pure PyTorch: no fairseq, no TorchScale, no process groups.

>>> from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
>>> layer = MHMoELayer(MHMoEConfig(embed_dim=64, num_heads=4, num_experts=8, top_k=2, expert_ffn_dim=256))
>>> output = layer(torch.randn(2, 10, 64))
>>> output.hidden.shape, output.stats.expert_load.sum()
(torch.Size([2, 10, 64]), tensor(160.))
"""

from . import expert_choice, remoe  # noqa: F401  (registered)
from ._fields import ConfigError
from .config import BudgetGap, LayerCounts, MHMoEConfig
from .layer import MHMoELayer, MHMoEOutput
from .lory import LoryLayer
from .merged import MergedConfig, SMEARLayer
from .stats import RoutingStats

__all__ = [
    "BudgetGap", "ConfigError", "LayerCounts", "LoryLayer", "MHMoEConfig", "MHMoELayer", "MHMoEOutput", "MergedConfig",
    "RoutingStats", "SMEARLayer",
]  # fmt: skip
