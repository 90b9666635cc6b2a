"""What a forward pass keeps for the backward pass, per token, from the model's shape alone.

Counted term by term from the layers' code: every tensor that autograd holds on to, once, without parameters. The terms
are exact for single tensors; ``tests/analysis/plan/test_activation_memory.py`` holds their sum against what autograd
really keeps, and allows 2 % for fp32 and 5 % for mixed precision. Not counted: buffers of single operators, gradients
of activations, memory that an allocator wastes. Running a layer on fake tensors instead would not do: the CPU's loop
reads values on the host, experts on several ranks need their processes, and ``blocked`` is planned at its worst.

Letters as in :mod:`mhmoe_fairseq.moe.config`; per token there are H sub-tokens and H K routed rows of d = D / H, so
K D numbers go to the experts whatever H is, but the experts' inner activations are H K F.
"""

from dataclasses import dataclass
from typing import Any

from ...moe import MergedConfig, MHMoEConfig
from ...moe.activations import ACTIVATIONS
from ...moe.quantize import TernaryLinear
from ...moe.router import ROUTERS
from ...moe.scores import SCORES
from ...torchscale_ext.attention import SHORT
from ...torchscale_ext.settings import DecoderSettings

_FP32 = 4
_INDEX = 8  # int64
_NORM = 8  # mean and inverse deviation of a row, float32


@dataclass(frozen=True)
class ModelShape:
    """A decoder in numbers.

    Attributes:
        settings: what its layers were built from.
        moe_layers: how many of the layers have experts.
        half: the model computes under autocast in a type of two bytes.
        recompute: activations of a layer are computed again in the backward pass.
        moe: the MoE layers; None for a dense model.
        ternary: weights of ternary linear maps outside experts.
    """

    settings: DecoderSettings
    layers: int
    moe_layers: int
    half: bool
    recompute: bool
    moe: MHMoEConfig | None
    ternary: int = 0

    @property
    def element(self) -> int:
        """Bytes of a number that is computed."""
        return 2 if self.half else _FP32


def shape_of(model: Any) -> ModelShape:
    """The shape of a model that ``build_language_model`` made, on any device, ``meta`` too."""
    decoder = model.decoder
    moe_layers = sum(layer.is_moe_layer for layer in decoder.layers)
    return ModelShape(
        decoder.args,
        layers=len(decoder.layers),
        moe_layers=moe_layers,
        half=decoder.precision != "fp32",
        recompute=bool(decoder.args.checkpoint_activations),
        moe=decoder.args.moe if moe_layers else None,
        ternary=sum(part.weight.numel() for part in decoder.modules() if isinstance(part, TernaryLinear)),
    )


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes that a model keeps per token.

    Attributes:
        shape: the model.
        backend: of ``moe.experts``: loop (CPU), grouped (an accelerator in bf16) or blocked (elsewhere).
        exchanged: the experts are on several ranks, so rows travel.
        cpu: dropout masks are as wide as the values, as on a CPU; else one byte.
    """

    shape: ModelShape
    backend: str
    exchanged: bool
    cpu: bool

    def kept(self) -> int:
        """What is kept at the end of the forward pass and the loss, without recomputation."""
        return sum(self._layers()) + self._ends()

    def peak(self, *, recompute: bool) -> int:
        """The largest sum in a forward and backward pass.

        Either at the end of the forward pass, or in the first layer's backward pass that follows; recomputation keeps
        the layers' inputs and one layer more.
        """
        layers, row = self._layers(), self.shape.settings.decoder_embed_dim * _FP32
        kept, again = (len(layers) * row, max(layers)) if recompute else (sum(layers), 0)
        return kept + max(self._ends(), again + row + self._gradients())

    def moe_layer(self) -> int:
        """What one MoE layer keeps, its attention included; 0 of a dense model."""
        moe, settings, a, padding = self.shape.moe, self.shape.settings, self.shape.element, 1
        if moe is None:
            return 0
        d, activation = settings.decoder_embed_dim, ACTIVATIONS[moe.activation]
        projections = moe.projection_inputs() * a + (moe.inner_dim + 1) * _FP32 * moe.merge_norm
        shared = 0
        if moe.shared_expert_dim:
            maps = 1 + activation.is_gated  # each rounds its own input
            inputs = maps if moe.quantize_experts else int(self.shape.half)
            shared = moe.shared_expert_dim * a * activation.num_kept + inputs * d * a
        routed = self._merged(moe) if isinstance(moe, MergedConfig) else self._router(moe) + self._experts(moe)
        return self._attention() + padding + projections + routed + shared + self._mask(settings.dropout, d, a)

    def _layers(self) -> list[int]:
        dense = self.shape.layers - self.shape.moe_layers
        return [self._dense_layer()] * dense + [self.moe_layer()] * self.shape.moe_layers

    def _ends(self) -> int:
        """The embedding, the last norm, and the output projection's input and its gradient."""
        settings = self.shape.settings
        d = settings.decoder_embed_dim
        return _INDEX + self._mask(settings.dropout, d, _FP32) + d * _FP32 + _NORM + 2 * d * _FP32

    def _gradients(self) -> int:
        """Gradients inside a layer, at the fullest moment of any one's backward pass."""
        shape, moe = self.shape, self.shape.moe
        dense = 2 * shape.settings.decoder_ffn_embed_dim * shape.element if shape.layers > shape.moe_layers else 0
        if moe is None:
            return dense
        # A loop over pieces needs no more than the rows': autograd holds those of two inner activations.
        width = moe.subtoken_dim + (0 if self.backend == "loop" else moe.expert_ffn_dim)
        return max(dense, 2 * moe.subtokens_per_token * moe.top_k * width * shape.element)

    def _mask(self, probability: float, count: int, element: int) -> int:
        """A dropout mask of ``count`` values of ``element`` bytes."""
        return count * (element if self.cpu else 1) if probability else 0

    def _attention(self) -> int:
        """Norm, attention, dropout, and the next norm."""
        settings, a = self.shape.settings, self.shape.element
        d = settings.decoder_embed_dim
        norms = 2 * (d * _FP32 + _NORM)
        inputs = (3 if settings.quantize_maps else 1) * d * a  # one for each map that rounds it
        # Queries, keys, values and what becomes of them; of a row of weights the sum, or on a CPU all of a short one.
        positions = settings.max_target_positions
        weights = positions * a if self.cpu and self.shape.half and positions <= SHORT else _FP32
        attended = 4 * d * a + settings.decoder_attention_heads * weights
        output = d * a if settings.subln or (settings.quantize_maps and not self.shape.half) else 0
        output += _NORM if settings.subln else 0
        return norms + inputs + attended + output + self._mask(settings.dropout, d, a)

    def _dense_layer(self) -> int:
        settings, a = self.shape.settings, self.shape.element
        d, f = settings.decoder_embed_dim, settings.decoder_ffn_embed_dim
        inner = settings.activation.num_kept * f * a
        norm = f * a + _NORM if settings.subln else 0
        masks = self._mask(settings.activation_dropout, f, a) + self._mask(settings.dropout, d, a)
        inputs = 2 if settings.quantize_maps and settings.activation.is_gated else 1
        return self._attention() + inputs * d * a + inner + norm + masks

    def _router(self, moe: MHMoEConfig) -> int:
        h, k, e, a = moe.subtokens_per_token, moe.top_k, moe.num_experts, self.shape.element
        gate = _FP32 if moe.gating_fp32 else a
        inputs = moe.inner_dim * a  # the experts'
        if self.shape.half and (moe.gating_fp32 or not moe.has_head_projection):
            inputs += h * moe.router_input_dim * gate
        if not ROUTERS[moe.router].learns:  # its choices have no gradient
            return moe.inner_dim * a + h * k * (_INDEX + _FP32)
        reduced = h * ROUTERS[moe.router].num_kept(moe) * gate
        probabilities = h * (e + SCORES[moe.gate_score].num_kept(e)) * _FP32  # the logits for the z-loss, and scores
        gates = h * k * (_INDEX + 1) + (h * (k + 2) * _FP32 if moe.normalize_gates and k > 1 else 0)
        z_loss = h * (_FP32 + 1)
        return inputs + reduced + probabilities + gates + z_loss

    def _experts(self, moe: MHMoEConfig) -> int:
        """Inner activations, rows in and out, weights and order of the rows; on several ranks rows as received, too.

        As many rows are taken to come as go, and a loop keeps them once more as they come back.
        """
        rows, a, is_loop = moe.subtokens_per_token * moe.top_k, self.shape.element, self.backend == "loop"
        moved = rows * moe.subtoken_dim * a
        order = rows * (_FP32 + 2 * _INDEX)
        here = 2 * moved + rows * (1 + 3 * _INDEX + a)
        if is_loop:  # autograd's, of ternary experts, keep the rows that come in, too
            here = (2 if moe.quantize_experts else 1) * moved + order
        received = (2 if is_loop else 1) * moved + order if self.exchanged else 0
        return rows * self._inner(moe) + here + received

    def _merged(self, moe: MergedConfig) -> int:
        """Merged experts: a token's input and inner activations; a segment's mean, routing and network."""
        a, f = self.shape.element, moe.expert_ffn_dim
        tensors = ACTIVATIONS[moe.activation].num_kept + (2 if moe.expert_layernorm else 0)
        norm, mask = _NORM if moe.expert_layernorm else 0, self._mask(moe.activation_dropout, f, a)
        of_token = _INDEX + 1 + moe.embed_dim * a + tensors * f * a + norm + mask
        weights = moe.matrices_per_expert * moe.embed_dim * f + (f if moe.expert_layernorm else 0)
        routing = moe.embed_dim * _FP32 + ROUTERS[moe.router].num_kept(moe) * _FP32 + moe.num_experts * (_FP32 + a)
        return of_token + (weights * a + routing) // moe.segment_length

    def _inner(self, moe: MHMoEConfig) -> int:
        """The inner activation of a row."""
        a = self.shape.element
        is_loop = self.backend == "loop"
        if is_loop and not moe.quantize_experts:  # pre-activations alone, the rest is computed again
            maps, norm = moe.matrices_per_expert - 1, _NORM if moe.expert_layernorm else 0
            return moe.expert_ffn_dim * a * maps + norm
        tensors = ACTIVATIONS[moe.activation].num_kept
        tensors += (2 if is_loop else 3) if moe.expert_layernorm else 0  # a loop's rows share their expert's scale
        mask = (a if is_loop else 1) if moe.activation_dropout else 0
        blocks = 2 if self.backend == "blocked" else 1  # padded to whole blocks: twice the rows at most
        return blocks * moe.expert_ffn_dim * (tensors * a + mask)
