"""TorchScale's own static X-MoE on the sub-tokens, made to run in one process on a CPU."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .setting import Setting


def has_torchscale() -> bool:
    return importlib.util.find_spec("torchscale") is not None


@contextmanager
def float_histc() -> Iterator[None]:
    """TorchScale counts routed tokens with ``torch.histc`` on integers, which the CPU lacks: count floats inside."""
    original = torch.histc

    def histc(values: Tensor, *args: object, **kwargs: object) -> Tensor:
        return original(values.float(), *args, **kwargs)

    torch.histc = histc
    try:
        yield
    finally:
        torch.histc = original


def join_single_process_group() -> None:
    """TorchScale's layer needs ``torch.distributed``: a gloo group of this process alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


class StaticXMoE(nn.Module):
    """TorchScale's ``MOELayer`` (top-2, X-MoE router, capacity) between the two projections."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        from torchscale.component.feedforward_network import make_experts
        from torchscale.component.xmoe.moe_layer import MOELayer
        from torchscale.component.xmoe.routing import Top2Gate

        join_single_process_group()
        self.sub_dim = setting.sub_dim
        self.head_projection = nn.Linear(setting.embed_dim, setting.embed_dim)
        self.merge_projection = nn.Linear(setting.embed_dim, setting.embed_dim)
        # batch_size equals the batch that forward makes, so TorchScale copies nothing to pad it.
        args = Namespace(
            moe_expert_count=setting.num_experts,
            ddp_rank=0,
            batch_size=1,
            batch_size_valid=1,
            activation_fn="gelu",
            dropout=0.0,
            activation_dropout=0.0,
            layernorm_eps=1e-5,
            subln=False,
        )
        gate = Top2Gate(setting.sub_dim, setting.num_experts, True, "all", True, use_xmoe=True)
        self.moe = MOELayer(gate, make_experts(args, setting.sub_dim, setting.ffn_dim), args)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sub_tokens = self.head_projection(x).view(1, -1, self.sub_dim)
        with float_histc():
            hidden, balance = self.moe(sub_tokens)
        return self.merge_projection(hidden.view_as(x)), balance


def build_static_xmoe(setting: Setting) -> nn.Module:
    """The baseline for ``setting``.

    Raises:
        ValueError: ``top_k`` is not 2; TorchScale has gates for one and two experts only, and
            the benchmark compares the second.
    """
    if setting.top_k != 2:
        raise ValueError(f"top_k ({setting.top_k}) must be 2 for TorchScale's gate")
    return StaticXMoE(setting)
