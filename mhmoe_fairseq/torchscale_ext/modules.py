"""Small parts shared by decoder and encoder layers: norms, bias removal and the dense SwiGLU network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchscale.component.feedforward_network import FeedForwardNetwork

from .settings import DecoderSettings, EncoderSettings

Settings = DecoderSettings | EncoderSettings


def build_norm(settings: Settings, dim: int) -> nn.Module:
    """RMSNorm or LayerNorm over ``dim`` features, as the settings say."""
    kind = nn.RMSNorm if settings.rms_norm else nn.LayerNorm
    return kind(dim, eps=settings.layernorm_eps)


def drop_biases(module: nn.Module) -> None:
    """Remove the bias of every linear map inside ``module`` (``--no-bias``); norms keep theirs."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            child.register_parameter("bias", None)


class SwiGLUNetwork(nn.Module):
    """The dense feed-forward network behind ``--activation-fn silu``: ``fc2(silu(fc1(x)) * gate(x))``.

    TorchScale's ``swish`` network has no gate. ``fc1`` and ``fc2`` carry its names, so that its sub-LN and deepnorm
    rescaling of the initial weights finds them; the gate is left alone.
    """

    def __init__(self, settings: Settings, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.gate = nn.Linear(dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, dim)
        self.ffn_layernorm = build_norm(settings, ffn_dim) if settings.subln else None
        self.activation_dropout_module = nn.Dropout(settings.activation_dropout)
        self.dropout_module = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D) -> (..., D)``."""
        hidden = self.activation_dropout_module(F.silu(self.fc1(x)) * self.gate(x))
        if self.ffn_layernorm is not None:
            hidden = self.ffn_layernorm(hidden)
        return self.dropout_module(self.fc2(hidden))


def build_dense_ffn(settings: Settings, dim: int, ffn_dim: int) -> nn.Module:
    """TorchScale's feed-forward network, or the SwiGLU one for ``activation_fn="silu"``."""
    if settings.activation_fn == "silu":
        ffn: nn.Module = SwiGLUNetwork(settings, dim, ffn_dim)
    else:
        ffn = FeedForwardNetwork(
            dim,
            ffn_dim,
            settings.activation_fn,
            settings.dropout,
            settings.activation_dropout,
            settings.layernorm_eps,
            settings.subln,
        )
        if settings.subln and settings.rms_norm:
            ffn.ffn_layernorm = build_norm(settings, ffn_dim)
    if settings.no_bias:
        drop_biases(ffn)
    return ffn
