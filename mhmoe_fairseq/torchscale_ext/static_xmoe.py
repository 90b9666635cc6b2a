"""TorchScale 0.3.0's own static (X-)MoE layer as a baseline, in one process and on a CPU too.

Its ``MOELayer`` wants a process group and ``torch.histc`` of integers, which the CPU lacks; its X-MoE gates rescale a
parameter inside forward. This module provides the first two and undoes the third in evaluation.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchscale.component.feedforward_network import make_experts
from torchscale.component.xmoe.moe_layer import MOELayer
from torchscale.component.xmoe.routing import Top1Gate, Top2Gate

from ..common.errors import UserError
from ..moe import ConfigError, LayerCounts, MHMoEConfig, MHMoEOutput, RoutingStats
from .settings import DecoderSettings


def ensure_single_process_group() -> None:
    """Start a one-process gloo group if there is none.

    Raises:
        UserError: if this process is one of several.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if dist.get_world_size() != 1:
        raise UserError(
            f"--mhmoe-routing torchscale runs in a single process, not {dist.get_world_size()}: "
            "use --mhmoe-routing capacity, which makes the same choices"
        )


@contextlib.contextmanager
def recorded_histc() -> Iterator[list[Tensor]]:
    """While open, ``torch.histc`` accepts integers on a CPU; every result is kept in the yielded list.

    TorchScale's gates call it once per choice with the experts chosen, before capacity drops any.
    """
    original = torch.histc
    histograms: list[Tensor] = []

    def histc(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        histograms.append(original(values.float(), *args, **kwargs))
        return histograms[-1]

    torch.histc = histc  # type: ignore[assignment]
    try:
        yield histograms
    finally:
        torch.histc = original


class StaticXMoE(nn.Module):
    """TorchScale's ``MOELayer`` with its Top1Gate or Top2Gate, called and answering like ``MHMoELayer``.

    It computes what TorchScale computes, with its unlike treatment of padding: padded tokens are never dispatched,
    but they count in the balance loss's means and in the statistics. There is no z-loss: the gate hides its logits.

    Raises:
        UserError: if the configuration asks for something that TorchScale's layer cannot do.
    """

    drops_tokens = True

    def __init__(self, settings: DecoderSettings) -> None:
        super().__init__()
        moe = settings.experts
        check_supported(moe)
        ensure_single_process_group()
        names = SimpleNamespace(
            moe_expert_count=moe.num_experts,
            ddp_rank=0,
            activation_fn=moe.activation,
            dropout=moe.dropout,
            activation_dropout=moe.activation_dropout,
            layernorm_eps=settings.layernorm_eps,
            subln=moe.expert_layernorm,
        )
        gate_options = {
            "use_fp32": moe.gating_fp32,
            "moe_eval_capacity_token_fraction": moe.eval_capacity_fraction,
            "use_xmoe": moe.router == "xmoe",
        }
        if moe.top_k == 1:
            gate: nn.Module = Top1Gate(moe.embed_dim, moe.num_experts, **gate_options)
        else:
            gate = Top2Gate(
                moe.embed_dim,
                moe.num_experts,
                second_expert_policy=moe.second_expert_policy,
                normalize_gate_prob_before_dropping=moe.normalize_before_dropping,
                **gate_options,
            )
        self.config = moe
        self.layer = MOELayer(gate, make_experts(names, moe.embed_dim, moe.expert_ffn_dim), names)
        for parameter in self.layer.experts.parameters():
            # The mark keeps a parameter out of fairseq's gradient norm; in one process all models clip alike.
            del parameter.expert

    def counts(self) -> LayerCounts:
        """The counts of our layer, which has the same parameters and makes the same choices."""
        return self.config.counts()

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> MHMoEOutput:
        """Apply the layer to ``(B, S, D)``; ``padding_mask`` bool ``(B, S)``, True = padded."""
        dispatched: list[Tensor] = []
        hook = self.layer.gate.register_forward_hook(lambda gate, args, result: dispatched.append(result[2].sum()))
        try:
            with recorded_histc() as histograms, self._gate_unchanged_in_evaluation():
                hidden, balance_loss = self.layer(x, input_padding_mask=padding_mask)
        finally:
            hook.remove()
        load = torch.stack(histograms).sum(0).detach()
        stats = RoutingStats(
            expert_load=load,
            dropped=load.sum() - dispatched[0].float(),
            entropy=self.layer.metadata["entropy_gating"].float() * (x.size(0) * x.size(1)),
            num_subtokens=load.new_tensor(x.size(0) * x.size(1)),
        )
        return MHMoEOutput(hidden, balance_loss, torch.zeros_like(balance_loss), stats)

    @contextlib.contextmanager
    def _gate_unchanged_in_evaluation(self) -> Iterator[None]:
        """Undo, outside training, the in-place rescaling that the X-MoE gates do in forward."""
        if self.training or not self.layer.gate.use_xmoe:
            yield
            return
        before = self.layer.gate.wg.detach().clone()
        try:
            yield
        finally:
            with torch.no_grad():
                self.layer.gate.wg.copy_(before)


def check_supported(moe: MHMoEConfig) -> None:
    """Refuse, with a ``ConfigError``, what TorchScale's layer has no counterpart for."""
    possible: dict[str, tuple[Any, ...]] = {
        "router": ("linear", "xmoe"),
        "num_heads": (1,),
        "top_k": (1, 2),
        "activation": ("gelu", "relu"),
        "expert_bias": (True,),
        "subtoken_residual": (False,),
        "shared_expert_dim": (0,),
        "router_dim": (16,) if moe.router == "xmoe" else (moe.router_dim,),
        "router_normalize": ("expert",),
        "router_temperature": (None,),
        "capacity_factor": (1.0,),
        "balance_assignment": ("top1",),
        "balance_scope": ("rank", "global"),
        "gate_score": ("softmax",),
        "normalize_gates": (True,),
        "gate_scale": (1.0,),
        "quantize_experts": (False,),
        "balancing": ("none",),
        "expert_groups": (1,),
    }
    refused = [field for field, values in possible.items() if getattr(moe, field) not in values]
    refused += [f"{part}_projection" for part in ("head", "merge") if getattr(moe, f"has_{part}_projection")]
    if refused:
        rule = "cannot be combined with {routing} torchscale: TorchScale's own layer has no such option; use {routing} "
        raise ConfigError(refused[0], getattr(moe, refused[0]), rule + "capacity")
