"""Multi-Head Mixture-of-Experts language models (Wu et al., NeurIPS 2024) for transformers 5.10 and later.

Also the models that MH-MoE is compared with: dense, sparse MoE, X-MoE. The experts go through transformers' experts
interface (``experts_implementation="eager"``, ``"batched_mm"``, ``"grouped_mm"``), attention through its attention
interface (``attn_implementation``). Letters: B batch, S sequence, T = B S tokens, D width, H MH-MoE heads, d = D / H,
N = T H sub-tokens, E experts, K experts of a sub-token, F inner width.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_mhmoe import MHMoEConfig
from .routing_mhmoe import MHMoEHeadRouters, MHMoERouter, balance_loss, build_router, gate

# Transformers 5.24 calls "cache" what was "past_key_values".
_CACHE = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"gelu": F.gelu, "relu": F.relu}
_FIRST_POSITION = 2  # fairseq's sinusoidal positions count from here
_XPOS_BASE = 512


def swiglu7(gate: Tensor, up: Tensor) -> Tensor:
    """The clamped SwiGLU of MAGI-2 and gpt-oss."""
    gate = gate.clamp(max=7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1)


_GATED: dict[str, Callable[..., Tensor]] = {"silu": lambda gate, up: F.silu(gate) * up, "swiglu7": swiglu7}


def build_norm(config: MHMoEConfig, dim: int) -> nn.Module:
    """RMSNorm or LayerNorm over ``dim`` features."""
    return (nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm)(dim, eps=config.norm_eps)


def sinusoidal_positions(position_ids: Tensor, dim: int) -> Tensor:
    """fairseq's sinusoidal embedding, ``(B, S) -> (B, S, D)`` in float32."""
    half = dim // 2
    step = math.log(10000) / (half - 1)
    frequency = torch.exp(torch.arange(half, device=position_ids.device, dtype=torch.float32) * -step)
    angle = (position_ids + _FIRST_POSITION).float().unsqueeze(-1) * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


def rotations(position_ids: Tensor, dim: int, kind: str, length: int) -> tuple[Tensor, ...]:
    """Cosines and sines for queries, then for keys, ``(B, 1, S, dim / 2)``; xPos scales them.

    Only differences of positions count: scales are 1 in the middle of ``length``, so that they fit into float16.
    """
    device = position_ids.device
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    position = position_ids.float()[:, None, :, None]
    cos, sin, scale = (position * frequency).cos(), (position * frequency).sin(), torch.ones_like(frequency)
    if kind == "xpos":
        base = (torch.arange(0, dim, 2, device=device, dtype=torch.float32) + 0.4 * dim) / (1.4 * dim)
        scale = base ** ((position - length // 2) / _XPOS_BASE)
    return cos * scale, sin * scale, cos / scale, sin / scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs of the features of ``(B, heads, S, dim)``."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention as it is written, ``(B, heads, S, dim) -> (B, S, heads, dim)``, and its weights."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class MHMoEAttention(nn.Module):
    """Causal self-attention; with ``sub_norm`` a norm over all attention heads before the output projection."""

    def __init__(self, config: MHMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx, self.is_causal, self.num_key_value_groups = layer_idx, True, 1
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        dim, bias = config.hidden_size, config.use_bias
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))
        self.inner_norm = build_norm(config, dim) if config.sub_norm else None

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, cache: Cache | None,
        rotations: tuple[Tensor, ...] | None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """``(B, S, D) -> (B, S, D)``."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        maps = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (project(hidden_states).view(shape).transpose(1, 2) for project in maps)
        if rotations is not None:
            query, key = rotate(query, *rotations[:2]), rotate(key, *rotations[2:])
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        p = self.config.attention_dropout if self.training else 0.0
        attended, _ = attention(self, query, key, value, attention_mask, dropout=p, scaling=self.scaling, **kwargs)
        attended = attended.reshape(hidden_states.shape).contiguous()
        return self.o_proj(attended if self.inner_norm is None else self.inner_norm(attended))


class MHMoENetwork(nn.Module):
    """A dense feed-forward network, or the shared expert of an MoE layer."""

    def __init__(self, config: MHMoEConfig, inner: int, is_shared: bool = False) -> None:
        super().__init__()
        dim, bias = config.hidden_size, config.use_bias
        self.act_fn = (_ACTIVATIONS | _GATED)[config.hidden_act]
        self.gate_proj = nn.Linear(dim, inner, bias=bias) if config.hidden_act in _GATED else None
        self.up_proj = nn.Linear(dim, inner, bias=bias)
        self.down_proj = nn.Linear(inner, dim, bias=bias)
        self.inner_norm = build_norm(config, inner) if config.sub_norm and not is_shared else None
        self.dropout = nn.Dropout(0.0 if is_shared else config.activation_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D) -> (..., D)``."""
        maps = [self.up_proj] if self.gate_proj is None else [self.gate_proj, self.up_proj]
        inner = self.dropout(self.act_fn(*(linear(x) for linear in maps)))
        return self.down_proj(inner if self.inner_norm is None else self.inner_norm(inner))


@use_experts_implementation
class MHMoEExperts(nn.Module):
    """E networks ``d -> F -> d`` with stacked weights, of which each sub-token uses K."""

    has_gate: bool
    has_bias: bool

    def __init__(self, config: MHMoEConfig) -> None:
        super().__init__()
        self.num_experts = config.banks * config.mhmoe_experts
        self.norm = config.mhmoe_expert_norm
        self.activation = (_ACTIVATIONS | _GATED)[config.hidden_act]
        self.dropout = config.activation_dropout
        self.gated, self.biased = config.hidden_act in _GATED, config.expert_bias
        e, f, d = self.num_experts, config.mhmoe_expert_size, config.subtoken_size
        self.first, rows = ("gate_up_proj", 2 * f) if self.gated else ("up_proj", f)
        self.register_parameter(self.first, nn.Parameter(torch.empty(e, rows, d)))
        self.down_proj = nn.Parameter(torch.empty(e, d, f))
        if self.biased:
            self.register_parameter(f"{self.first}_bias", nn.Parameter(torch.zeros(e, rows)))
            self.down_proj_bias = nn.Parameter(torch.zeros(e, d))

    def act_fn(self, inner: Tensor) -> Tensor:
        """What stands between the two products, ``(..., F) -> (..., F)``."""
        return self._behind(self.activation(inner))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        """The same with a gate, ``(..., 2 F) -> (..., F)``."""
        return self._behind(self.activation(*gate_up.chunk(2, dim=-1)))

    def _behind(self, inner: Tensor) -> Tensor:
        inner = F.dropout(inner, self.dropout, self.training)
        # Each expert's own scale and shift are in down_proj and its bias.
        return F.layer_norm(inner, inner.shape[-1:]) if self.norm else inner

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sums of the chosen experts, ``(N, d), (N, K), (N, K) -> (N, d)``: ``eager``, one by one."""
        summed = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)
        first, first_bias = getattr(self, self.first), getattr(self, f"{self.first}_bias", None)
        for expert in range(self.num_experts):
            rows, choices = torch.where((top_k_index == expert) & (top_k_weights != 0))
            inner = F.linear(hidden_states[rows], first[expert], None if first_bias is None else first_bias[expert])
            inner = self._apply_gate(inner) if self.gated else self.act_fn(inner)
            y = F.linear(inner, self.down_proj[expert], self.down_proj_bias[expert] if self.biased else None)
            summed = summed.index_add(0, rows, (y * top_k_weights[rows, choices, None]).to(summed.dtype))
        return summed.to(hidden_states.dtype)


class MHMoEProjection(nn.ModuleList):
    """Linear maps with ReLU between them, from the first of ``widths`` to the last."""

    def __init__(self, config: MHMoEConfig, widths: list[int]) -> None:
        super().__init__(nn.Linear(*of, bias=config.mhmoe_projection_bias) for of in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., first) -> (..., last)``."""
        for index, linear in enumerate(self):
            x = linear(F.relu(x) if index else x)
        return x


class MHMoELayer(nn.Module):
    """Split tokens into sub-tokens, send each to K experts, merge the results."""

    def __init__(self, config: MHMoEConfig) -> None:
        super().__init__()
        self.config = config
        dim, inner = config.hidden_size, config.inner_size
        self.head_projection = MHMoEProjection(config, [dim] + [inner] * config.mhmoe_head_projections)
        self.router = build_router(config)
        self.experts = MHMoEExperts(config)
        # The decorator knows one kind of experts for a class.
        self.experts.has_gate, self.experts.has_bias = self.experts.gated, self.experts.biased
        self.merge_norm = nn.RMSNorm(inner, eps=1e-5) if config.mhmoe_merge_norm else nn.Identity()
        self.merge_projection = MHMoEProjection(config, [inner] * config.mhmoe_merge_projections + [dim])
        self.shared_expert = MHMoENetwork(config, config.mhmoe_shared_size, True) if config.mhmoe_shared_size else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, S, D) -> (B, S, D)``, and the router's logits, ``(N, E)``."""
        config = self.config
        subtokens = self.head_projection(x).reshape(-1, config.subtoken_size)
        routed = x.reshape(-1, x.size(-1)) if config.mhmoe_router_input == "token" else subtokens
        logits = self.router(routed)
        index, weights = gate(logits, config, self.router.selection_bias)
        y = self.experts(subtokens, index, weights.to(x.dtype))
        if config.mhmoe_subtoken_residual:
            y = y + subtokens
        y = self.merge_projection(self.merge_norm(y.reshape(*x.shape[:-1], config.inner_size)))
        return y if self.shared_expert is None else y + self.shared_expert(x), logits


class MHMoEDecoderLayer(GradientCheckpointingLayer):
    """Attention, then a dense network or experts."""

    def __init__(self, config: MHMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.self_attn = MHMoEAttention(config, layer_idx)
        self.attention_norm = build_norm(config, config.hidden_size)
        self.is_moe = config.mhmoe_freq > 0 and (layer_idx + 1) % config.mhmoe_freq == 0
        self.mlp = MHMoELayer(config) if self.is_moe else MHMoENetwork(config, config.intermediate_size)
        self.mlp_norm = build_norm(config, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """``(B, S, D) -> (B, S, D)``, and the router's logits of experts."""
        attended = self.self_attn(self._before(self.attention_norm, hidden_states), **kwargs)
        hidden_states = self._after(self.attention_norm, hidden_states, attended)
        y = self.mlp(self._before(self.mlp_norm, hidden_states))
        y, logits = y if self.is_moe else (y, None)
        return self._after(self.mlp_norm, hidden_states, y), logits

    def _before(self, norm: nn.Module, x: Tensor) -> Tensor:
        return x if self.config.post_norm else norm(x)

    def _after(self, norm: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x * self.config.residual_scale + self.dropout(y)
        return norm(x) if self.config.post_norm else x


class MHMoEPreTrainedModel(PreTrainedModel):
    """What transformers has to know of the models."""

    config_class = MHMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MHMoEDecoderLayer"]
    _keep_in_fp32_modules_strict = ["router"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        first = {"temperature": self.config.mhmoe_router_temperature, "regularizer": 1e-8}
        if isinstance(module, (MHMoEExperts, MHMoERouter, MHMoEHeadRouters)):
            for name, parameter in module.named_parameters(recurse=False):
                if name in first:
                    nn.init.constant_(parameter, first[name])
                elif name.endswith("_bias"):
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, std=self.config.initializer_range)


class MHMoEModel(MHMoEPreTrainedModel):
    """The decoder without its output layer."""

    def __init__(self, config: MHMoEConfig) -> None:
        super().__init__(config)
        dim = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, dim, config.pad_token_id)
        learned = config.absolute_positions == "learned"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, dim) if learned else None
        self.embedding_norm = build_norm(config, dim) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(MHMoEDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = None if config.post_norm else build_norm(config, dim)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, use_cache: bool | None = None,
        output_hidden_states: bool | None = None, output_router_logits: bool | None = None,
        cache: Cache | None = None, **kwargs: Any,
    ) -> MoeModelOutputWithPast:  # fmt: skip
        """Hidden states ``(B, S, D)`` of ids or embeddings.

        Args:
            attention_mask: ``(B, keys)``, 0 where padded, on the left or right.
            position_ids: ``(B, S)``; by default counted over what is not padded.
            past_key_values, cache: the earlier positions' keys and values, under the name of either release.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        is_recomputed = self.training and self.is_gradient_checkpointing
        if is_recomputed and cache is not None:
            raise ValueError("gradient checkpointing computes layers twice and would fill the cache twice: give none")
        if use_cache and cache is None and not is_recomputed:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(past, past + x.size(1), device=x.device)[None]
            if attention_mask is not None and attention_mask.dim() == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -x.size(1) :]
        mask = create_causal_mask(self.config, x, attention_mask, cache, position_ids=position_ids)

        x, kind = self._embed(x, position_ids), self.config.relative_positions
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        turns = None if kind == "none" else rotations(position_ids, head_dim, kind, self.config.max_position_embeddings)
        states, router_logits = [x], []
        for layer in self.layers:
            x, logits = layer(x, attention_mask=mask, cache=cache, rotations=turns, **kwargs)
            states.append(x)
            router_logits += [] if logits is None else [logits]
        x = states[-1] = x if self.norm is None else self.norm(x)
        return MoeModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=tuple(states) if output_hidden_states else None,
            router_logits=tuple(router_logits) if output_router_logits else None,
            **{_CACHE: cache if use_cache else None},
        )

    def _embed(self, x: Tensor, position_ids: Tensor) -> Tensor:
        x = x * self.config.embedding_scale
        if self.embed_positions is not None:
            x = x + self.embed_positions(position_ids)
        elif self.config.absolute_positions == "sinusoidal":
            x = x + sinusoidal_positions(position_ids, x.size(-1)).to(x.dtype)
        return self.dropout(x if self.embedding_norm is None else self.embedding_norm(x))


class MHMoEForCausalLM(MHMoEPreTrainedModel, GenerationMixin):
    """The decoder with its output layer, by default the embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MHMoEConfig) -> None:
        super().__init__(config)
        self.model = MHMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None, logits_to_keep: int | Tensor = 0, cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:  # fmt: skip
        """Logits ``(B, S, vocabulary)`` of the next tokens; arguments as ``MHMoEModel``'s.

        Args:
            labels: ``(B, S)``, ``input_ids`` with -100 where nothing is to be predicted: gives ``loss``, in nats.
            output_router_logits: give ``router_logits`` and their mean balance loss ``aux_loss``, which is added to
                the loss with ``mhmoe_balance_weight``.
            logits_to_keep: only so many positions, the last, or those of an index.
        """
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states,
            wanted, cache, return_dict=True, **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        balance = None
        if outputs.router_logits:
            real, (sequences, length, _) = None, outputs.last_hidden_state.shape
            if attention_mask is not None and attention_mask.dim() == 2:
                real = attention_mask[:, -length:].reshape(-1).repeat_interleave(self.config.mhmoe_heads)
            routers = [layer.router for layer in self.model.modules() if isinstance(layer, MHMoELayer)]
            of_layers = zip(outputs.router_logits, routers, strict=True)
            losses = [balance_loss(*of, real, self.config, sequences) for of in of_layers]
            balance = torch.stack(losses).mean()
            loss = None if loss is None else loss + self.config.mhmoe_balance_weight * balance.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss, aux_loss=balance, logits=logits, hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits, **{_CACHE: getattr(outputs, _CACHE)},
        )  # fmt: skip
