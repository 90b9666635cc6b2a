"""What stands behind attention in a layer: a dense network, or experts, which are chosen by name."""

import torch
from torch import Tensor, nn
from torchscale.component.feedforward_network import FeedForwardNetwork

from ..moe import ConfigError, LayerCounts, LoryLayer, MergedConfig, MHMoELayer, MHMoEOutput, RoutingStats, SMEARLayer
from ..moe.parallelism import Traffic
from .settings import Settings
from .static_xmoe import StaticXMoE


class GatedNetwork(nn.Module):
    """The dense feed-forward network of a gated activation; for ``silu``: ``fc2(silu(fc1(x)) * gate(x))``.

    TorchScale's ``swish`` network has no gate. ``fc1`` and ``fc2`` carry its names, so that its sub-LN and deepnorm
    rescaling of the initial weights finds them; the gate is left alone.
    """

    def __init__(self, settings: Settings, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.activation = settings.activation
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.gate = nn.Linear(dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, dim)
        self.ffn_layernorm = settings.build_norm(ffn_dim) if settings.subln else None
        self.activation_dropout_module = nn.Dropout(settings.activation_dropout)
        self.dropout_module = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D) -> (..., D)``."""
        hidden = self.activation_dropout_module(self.activation.of(self.fc1(x), self.gate(x)))
        if self.ffn_layernorm is not None:
            hidden = self.ffn_layernorm(hidden)
        return self.dropout_module(self.fc2(hidden))


class DenseNetwork(FeedForwardNetwork):
    """TorchScale's, but half precision's activations are not widened beforehand: each kernel does so for itself.

    The same numbers, without a copy of the activation's input in float32 that waits for the backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D) -> (..., D)``."""
        hidden = self.activation_dropout_module(self.activation_fn(self.fc1(x.reshape(-1, x.size(-1)))))
        if self.ffn_layernorm is not None:
            hidden = self.ffn_layernorm(hidden)
        return self.dropout_module(self.fc2(hidden).view(x.shape))


def build_dense_ffn(settings: Settings, dim: int, ffn_dim: int) -> nn.Module:
    """TorchScale's feed-forward network, or that of a gated activation."""
    if settings.activation.is_gated:
        return settings.fit_maps(GatedNetwork(settings, dim, ffn_dim))
    dropouts = settings.dropout, settings.activation_dropout
    ffn = DenseNetwork(dim, ffn_dim, settings.activation_fn, *dropouts, settings.layernorm_eps, settings.subln)
    if settings.subln and settings.rms_norm:
        ffn.ffn_layernorm = settings.build_norm(ffn_dim)
    return settings.fit_maps(ffn)


class SharedExperts(MHMoELayer):
    """One MH-MoE layer for all positions, the image's and the text's."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.experts, parallel=settings.parallel)

    def forward(  # type: ignore[override]  # image_length comes third wherever it may be given
        self,
        x: Tensor,
        padding_mask: Tensor | None = None,
        image_length: int = 0,
        domain: Tensor | None = None,
    ) -> MHMoEOutput:
        """Apply the layer to ``(B, L, D)``; ``padding_mask`` bool, True where padded, and ``domain`` are ``(B, L)``."""
        return super().forward(x, padding_mask, domain)


def _merged(settings: Settings) -> MergedConfig:
    config = settings.experts
    assert isinstance(config, MergedConfig), f"routing {config.routing} merges no experts"
    return config


class SegmentedExperts(LoryLayer):
    """Experts merged for each segment of a text (``--mhmoe-routing lory``)."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(_merged(settings))


class SoftlyMergedExperts(SMEARLayer):
    """Experts merged for each example, its image's and its text's positions together (``--mhmoe-routing smear``)."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(_merged(settings))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, image_length: int = 0) -> MHMoEOutput:
        """Apply the layer to ``(B, L, D)``; ``padding_mask`` bool ``(B, L)``, True where padded."""
        return super().forward(x, padding_mask)


class SeparateExperts(nn.Module):
    """Two MH-MoE layers: ``A`` routes the image's positions, ``B`` the text's (``--mhmoe-modality-experts separate``).

    Both are always called, with no positions too: experts on other processes wait for every process's rows, whatever
    its batch holds.

    Attributes:
        pools: what ``A`` and ``B`` route.
    """

    pools = ("image", "text")

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.config = settings.experts
        self.parallel = settings.parallel
        self.A = MHMoELayer(self.config, parallel=self.parallel)
        self.B = MHMoELayer(self.config, parallel=self.parallel)

    @property
    def drops_tokens(self) -> bool:
        """Whether experts may refuse tokens."""
        return self.A.drops_tokens

    def counts(self) -> LayerCounts:
        """Both layers' parameters; a position uses the experts of one, and everything else of both."""
        one = self.config.counts()
        active = one.params - one.expert_params + one.active_params
        return LayerCounts(2 * one.params, 2 * one.expert_params, active, one.flops_per_token)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, image_length: int = 0) -> MHMoEOutput:
        """Apply the pools.

        Args:
            x: ``(B, L, D)``, of which the first ``image_length`` positions are the image's.
            padding_mask: bool ``(B, L)``, True where padded.

        Returns:
            hidden ``(B, L, D)``; losses weighted by the pools' sub-tokens; statistics of the images' pool and of
            the text's, ``(2, E)`` and ``(2,)``.
        """
        image = self.A(x[:, :image_length], None if padding_mask is None else padding_mask[:, :image_length])
        text = self.B(x[:, image_length:], None if padding_mask is None else padding_mask[:, image_length:])
        counts = torch.stack([image.stats.num_subtokens, text.stats.num_subtokens])
        if self.parallel is not None and self.config.balance_scope == "global":
            counts = self.parallel.sum(counts)
        of_image, of_text = counts / counts.sum().clamp(min=1)
        return MHMoEOutput(
            torch.cat([image.hidden, text.hidden], dim=1),
            of_image * image.balance_loss + of_text * text.balance_loss,
            of_image * image.z_loss + of_text * text.z_loss,
            RoutingStats(*(torch.stack(counts) for counts in zip(image.stats, text.stats))),
            None if image.traffic is None else Traffic(*map(sum, zip(image.traffic, text.traffic))),
        )


# Each is built from settings, called as (x, padding_mask[, image_length][, domain=...]), returns an MHMoEOutput, and
# has ``counts`` (a LayerCounts) and ``drops_tokens`` (whether experts may refuse tokens). One with ``new_memory``
# depends on a text's earlier positions and, in incremental decoding, takes what that gave for it as third argument.
FEED_FORWARDS: dict[str, type[nn.Module]] = {
    "moe": SharedExperts,
    "separate": SeparateExperts,
    "lory": SegmentedExperts,
    "smear": SoftlyMergedExperts,
    "torchscale": StaticXMoE,
}


def build_feed_forward(settings: Settings) -> nn.Module:
    """The experts that ``settings.feed_forward`` names.

    Raises:
        ConfigError: for a name that is not registered.
    """
    if settings.feed_forward not in FEED_FORWARDS:
        raise ConfigError("feed_forward", settings.feed_forward, f"must be one of {', '.join(FEED_FORWARDS)}")
    return FEED_FORWARDS[settings.feed_forward](settings)
