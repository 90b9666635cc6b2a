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

from ...moe import MHMoEConfig
from ...moe.router import ROUTERS

_FP32 = 4
_INDEX = 8  # int64
_NORM = 8  # mean and inverse deviation of a row, float32


@dataclass(frozen=True)
class ModelShape:
    """A decoder in numbers.

    Attributes:
        layers, moe_layers: all decoder layers, and how many of them have experts.
        embed_dim, ffn_dim, attention_heads: D, the dense networks' inner width, attention's heads.
        vocab_size: entries of the dictionary.
        gated, relu: the activation is SwiGLU, or ReLU; else GELU.
        subln: there is a norm on the inner activation of attention and dense networks.
        dropout, activation_dropout: probabilities; above 0 a mask is kept.
        half: the model computes under autocast in a type of two bytes.
        recompute: activations of a layer are computed again in the backward pass.
        moe: the MoE layers; None for a dense model.
    """

    layers: int
    moe_layers: int
    embed_dim: int
    ffn_dim: int
    attention_heads: int
    vocab_size: int
    gated: bool
    relu: bool
    subln: bool
    dropout: float
    activation_dropout: float
    half: bool
    recompute: bool
    moe: MHMoEConfig | None

    @property
    def element(self) -> int:
        """Bytes of a number that is computed."""
        return 2 if self.half else _FP32


def shape_of(model: Any) -> ModelShape:
    """The shape of a model that ``build_language_model`` made, on any device, ``meta`` too."""
    decoder = model.decoder
    settings = decoder.args
    moe_layers = sum(layer.is_moe_layer for layer in decoder.layers)
    return ModelShape(
        layers=len(decoder.layers),
        moe_layers=moe_layers,
        embed_dim=settings.decoder_embed_dim,
        ffn_dim=settings.decoder_ffn_embed_dim,
        attention_heads=settings.decoder_attention_heads,
        vocab_size=len(decoder.dictionary),
        gated=settings.activation_fn == "silu",
        relu=settings.activation_fn == "relu",
        subln=settings.subln,
        dropout=settings.dropout,
        activation_dropout=settings.activation_dropout,
        half=decoder.precision != "fp32",
        recompute=bool(settings.checkpoint_activations),
        moe=settings.moe if moe_layers else None,
    )


@dataclass(frozen=True)
class Computation:
    """How the experts are computed.

    Attributes:
        backend: of ``moe.experts``: loop (CPU), grouped (an accelerator in bf16) or blocked (elsewhere).
        exchanged: the experts are on several ranks, so rows travel.
        cpu: dropout masks are as wide as the values, as on a CPU; else one byte.
    """

    backend: str
    exchanged: bool
    cpu: bool

    def mask(self, probability: float, count: int, element: int) -> int:
        """Bytes of a dropout mask of ``count`` values of ``element`` bytes."""
        return count * (element if self.cpu else 1) if probability else 0


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes per token.

    Attributes:
        dense_layer, moe_layer: of one layer of the kind, its attention included; 0 if there is none.
        gradients: of activations, at the fullest moment of any one layer's backward pass.
        layer_input: what recomputation keeps of a layer.
        ends: embedding, last norm and the output projection's input.
        words: the log-probabilities of all words, gone before the layers' backward pass.
    """

    dense_layer: int
    moe_layer: int
    gradients: int
    layer_input: int
    ends: int
    words: int


def activation_bytes(shape: ModelShape, computation: Computation) -> ActivationBytes:
    """Count a model's parts."""
    d, a = shape.embed_dim, shape.element
    attention = _attention(shape, computation)
    has_dense = shape.layers > shape.moe_layers
    gradients = [2 * shape.ffn_dim * a if has_dense else 0, _moe_gradients(shape, computation)]
    return ActivationBytes(
        dense_layer=attention + _dense(shape, computation) if has_dense else 0,
        moe_layer=0 if shape.moe is None else attention + _moe(shape, shape.moe, computation),
        gradients=d * _FP32 + max(gradients),
        layer_input=d * _FP32,
        ends=_INDEX + computation.mask(shape.dropout, d, _FP32) + d * _FP32 + _NORM + d * a,
        words=shape.vocab_size * _FP32,
    )


def kept_bytes(shape: ModelShape, parts: ActivationBytes) -> int:
    """Per token: what is kept at the end of the forward pass and the loss, without recomputation."""
    return _all_layers(shape, parts) + parts.ends + parts.words


def peak_bytes(shape: ModelShape, parts: ActivationBytes, *, recompute: bool) -> int:
    """Per token: the largest sum in a forward and backward pass.

    Either when the gradients of logits and log-probabilities stand beside them, or in the first layer's backward pass
    that follows, when the words are gone; recomputation keeps the layers' inputs and one layer more.
    """
    if recompute:
        layers, largest = shape.layers * parts.layer_input, max(parts.dense_layer, parts.moe_layer)
    else:
        layers, largest = _all_layers(shape, parts), 0
    return layers + max(parts.ends + 3 * parts.words, largest + parts.gradients)


def _all_layers(shape: ModelShape, parts: ActivationBytes) -> int:
    return (shape.layers - shape.moe_layers) * parts.dense_layer + shape.moe_layers * parts.moe_layer


def _moe_gradients(shape: ModelShape, computation: Computation) -> int:
    """Rows' gradients; a loop over pieces needs no more, autograd holds those of two inner activations."""
    if shape.moe is None:
        return 0
    rows = shape.moe.subtokens_per_token * shape.moe.top_k
    width = 0 if computation.backend == "loop" else shape.moe.expert_ffn_dim
    return 2 * rows * (shape.moe.subtoken_dim + width) * shape.element


def _attention(shape: ModelShape, computation: Computation) -> int:
    """Norm, attention by ``scaled_dot_product_attention`` (no weights kept), dropout, and the next norm."""
    d, a = shape.embed_dim, shape.element
    norms = 2 * (d * _FP32 + _NORM)
    inputs = d * a * (3 if shape.half else 1)  # autocast rounds the input anew for queries, keys and values
    attended = 4 * d * a + shape.attention_heads * _FP32
    output = d * a + _NORM if shape.subln else 0
    return norms + inputs + attended + output + computation.mask(shape.dropout, d, a)


def _dense(shape: ModelShape, computation: Computation) -> int:
    d, f, a = shape.embed_dim, shape.ffn_dim, shape.element
    if shape.gated:
        inner = 4 * f * a  # both maps, silu, product
    else:
        shared = shape.relu and not shape.half  # relu keeps its output, which is the next map's input
        inner = f * _FP32 + (0 if shared else f * a)
    norm = f * a + _NORM if shape.subln else 0
    masks = computation.mask(shape.activation_dropout, f, a) + computation.mask(shape.dropout, d, a)
    return d * a + inner + norm + masks


def _moe(shape: ModelShape, moe: MHMoEConfig, computation: Computation) -> int:
    d, a = shape.embed_dim, shape.element
    padding = 1
    projections = (moe.has_head_projection + moe.has_merge_projection) * moe.num_projection_layers * d * a
    shared = 0
    if moe.shared_expert_dim:
        shared = moe.shared_expert_dim * a * (4 if shape.gated else 2) + (d * a if shape.half else 0)
    routed = _router(shape, moe) + _experts(shape, moe, computation)
    return padding + projections + routed + shared + computation.mask(shape.dropout, d, a)


def _router(shape: ModelShape, moe: MHMoEConfig) -> int:
    h, k, e, a = moe.subtokens_per_token, moe.top_k, moe.num_experts, shape.element
    gate = _FP32 if moe.gating_fp32 else a
    inputs = shape.embed_dim * a  # the experts' input, too
    if shape.half and (moe.gating_fp32 or not moe.has_head_projection):
        inputs += shape.embed_dim * gate
    reduced = h * ROUTERS[moe.router].num_kept(moe) * gate
    probabilities = h * e * 2 * _FP32  # the softmax, and the logits for the z-loss
    gates = h * k * (_INDEX + 1) + (h * (k + 2) * _FP32 if moe.normalize_gates and k > 1 else 0)
    z_loss = h * (_FP32 + 1)
    return inputs + reduced + probabilities + gates + z_loss


def _experts(shape: ModelShape, moe: MHMoEConfig, computation: Computation) -> int:
    """Inner activations, rows in and out, weights and order of the rows; on several ranks the rows as received, too.

    As many rows are taken to come as go, and a loop keeps them once more as they come back.
    """
    rows, a, is_loop = moe.subtokens_per_token * moe.top_k, shape.element, computation.backend == "loop"
    moved = rows * moe.subtoken_dim * a
    order = rows * (_FP32 + 2 * _INDEX)
    here = moved + order if is_loop else 2 * moved + rows * (1 + 3 * _INDEX + a)
    received = (2 if is_loop else 1) * moved + order if computation.exchanged else 0
    return _hidden(shape, moe, computation) + here + received


def _hidden(shape: ModelShape, moe: MHMoEConfig, computation: Computation) -> int:
    rows, a, gated = moe.subtokens_per_token * moe.top_k, shape.element, moe.activation == "swiglu"
    if computation.backend == "loop":  # pre-activations alone, the rest is computed again
        norm = _NORM * rows if moe.expert_layernorm else 0
        return rows * moe.expert_ffn_dim * a * (2 if gated else 1) + norm
    tensors = (4 if gated else 1 if shape.relu else 2) + (3 if moe.expert_layernorm else 0)
    mask = 1 if moe.activation_dropout else 0
    blocks = 2 if computation.backend == "blocked" else 1  # padded to whole blocks: twice the rows at most
    return blocks * rows * moe.expert_ffn_dim * (tensors * a + mask)
