"""MH-MoE BEiT-3 (Wu et al., NeurIPS 2024) for transformers 5.10 and later: images, texts, images with a text.

Attention's maps, norms and dense networks have weights for the image's positions, ``A``, and for the text's, ``B``;
experts, which are those of ``modeling_mhmoe.py``, are shared by both or a pool for each. Letters: B batch, P positions
of an image (the class token, then its patches, row by row), S tokens, L = P + S, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput, SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_mhmoe_beit3 import MHMoEBEiT3Config
from .modeling_mhmoe import MHMoELayer, MHMoENetwork, MHMoEPreTrainedModel, build_norm, eager_attention_forward


class MHMoEMultiway(nn.Module):
    """``A`` for the image's positions, ``B`` for the text's."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.A, self.B = build(), build()

    def forward(self, x: Tensor, image_length: int) -> Tensor:
        """``(B, L, ...) -> (B, L, ...)``, of which the first ``image_length`` positions go through A."""
        if image_length in (0, x.size(1)):
            return self.A(x) if image_length else self.B(x)
        return torch.cat([self.A(x[:, :image_length]), self.B(x[:, image_length:])], dim=1)


class MHMoEMultiwayAttention(nn.Module):
    """Self-attention of all positions with all; with ``sub_norm`` a norm before the output projection."""

    def __init__(self, config: MHMoEBEiT3Config) -> None:
        super().__init__()
        self.config, self.is_causal, self.num_key_value_groups = config, False, 1
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        dim, bias = config.hidden_size, config.use_bias
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            MHMoEMultiway(lambda: nn.Linear(dim, dim, bias=bias)) for _ in range(4)
        )
        self.inner_norm = MHMoEMultiway(lambda: build_norm(config, dim)) if config.sub_norm else None

    def forward(self, x: Tensor, image_length: int, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """``(B, L, D) -> (B, L, D)``."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        maps = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (project(x, image_length).view(shape).transpose(1, 2) for project in maps)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        p = self.config.attention_dropout if self.training else 0.0
        attended, _ = attention(self, query, key, value, attention_mask, dropout=p, scaling=self.scaling, **kwargs)
        attended = attended.reshape(x.shape).contiguous()
        return self.o_proj(
            attended if self.inner_norm is None else self.inner_norm(attended, image_length), image_length
        )


# Their bank has transformers' @use_experts_implementation, whose name it looks for in the file of the whole model.
class MHMoEMultiwayExperts(MHMoEMultiway):
    """Two pools of experts, one for the image's positions and one for the text's."""

    def __init__(self, config: MHMoEBEiT3Config) -> None:
        super().__init__(lambda: MHMoELayer(config))

    def forward(self, x: Tensor, image_length: int) -> Tensor:
        """``(B, L, D) -> (B, L, D)``."""
        return torch.cat([self.A(x[:, :image_length])[0], self.B(x[:, image_length:])[0]], dim=1)


class MHMoEBEiT3Layer(GradientCheckpointingLayer):
    """Attention, then dense networks or experts."""

    def __init__(self, config: MHMoEBEiT3Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.self_attn = MHMoEMultiwayAttention(config)
        self.attention_norm = MHMoEMultiway(lambda: build_norm(config, config.hidden_size))
        self.is_moe = config.mhmoe_freq > 0 and (layer_idx + 1) % config.mhmoe_freq == 0
        self.is_separate = config.mhmoe_modality_experts == "separate"
        self.mlp: nn.Module = MHMoEMultiway(lambda: MHMoENetwork(config, config.intermediate_size))
        if self.is_moe:
            self.mlp = MHMoEMultiwayExperts(config) if self.is_separate else MHMoELayer(config)
        self.mlp_norm = MHMoEMultiway(lambda: build_norm(config, config.hidden_size))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, image_length: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """``(B, L, D) -> (B, L, D)``."""
        attended = self.self_attn(
            self._before(self.attention_norm, x, image_length), image_length, attention_mask, **kwargs
        )
        x = self._after(self.attention_norm, x, attended, image_length)
        y = self._before(self.mlp_norm, x, image_length)
        is_shared = self.is_moe and not self.is_separate
        y = self.mlp(y)[0] if is_shared else self.mlp(y, image_length)
        return self._after(self.mlp_norm, x, y, image_length)

    def _before(self, norm: nn.Module, x: Tensor, image_length: int) -> Tensor:
        return x if self.config.post_norm else norm(x, image_length)

    def _after(self, norm: nn.Module, x: Tensor, y: Tensor, image_length: int) -> Tensor:
        x = x * self.config.residual_scale + self.dropout(y)
        return norm(x, image_length) if self.config.post_norm else x


class MHMoEBEiT3Head(nn.Module):
    """Logits of classes or answers from one vector of each row: what is common to all rows is taken away first."""

    center: Tensor

    def __init__(self, config: MHMoEBEiT3Config, has_pooler: bool) -> None:
        super().__init__()
        dim, labels = config.hidden_size, config.num_labels
        self.register_buffer("center", torch.zeros(dim))
        self.norm = nn.LayerNorm(dim)
        self.pooler = nn.Linear(dim, dim) if has_pooler else None
        two_layers = (nn.Linear(dim, 2 * dim), nn.LayerNorm(2 * dim), nn.GELU(), nn.Linear(2 * dim, labels))
        self.classifier = nn.Sequential(*two_layers) if has_pooler else nn.Linear(dim, labels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, D) -> (B, labels)``."""
        x = self.norm(x - self.center)
        return self.classifier(x if self.pooler is None else torch.tanh(self.pooler(x)))


class MHMoEBEiT3PreTrainedModel(MHMoEPreTrainedModel):
    """What transformers has to know of the models."""

    config_class = MHMoEBEiT3Config
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    _no_split_modules = ["MHMoEBEiT3Layer"]
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MHMoEBEiT3Head):
            nn.init.zeros_(module.center)
        elif isinstance(module, MHMoEBEiT3Model):
            for parameter in (module.cls_token, module.mask_token):
                nn.init.normal_(parameter, std=self.config.initializer_range)


class MHMoEBEiT3Model(MHMoEBEiT3PreTrainedModel):
    """The encoder without heads."""

    def __init__(self, config: MHMoEBEiT3Config) -> None:
        super().__init__(config)
        dim, size = config.hidden_size, config.patch_size
        self.text_embed = nn.Embedding(config.vocab_size, dim, config.pad_token_id)
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=size, stride=size)
        self.cls_token, self.mask_token = (nn.Parameter(torch.empty(1, 1, dim)) for _ in range(2))
        self.image_positions = nn.Embedding(config.image_positions, dim)
        self.text_positions = nn.Embedding(config.max_position_embeddings, dim)
        self.embedding_norm = MHMoEMultiway(lambda: build_norm(config, dim)) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(MHMoEBEiT3Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = None if config.post_norm else MHMoEMultiway(lambda: build_norm(config, dim))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The words' embedding."""
        return self.text_embed

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None,
        bool_masked_pos: Tensor | None = None, output_hidden_states: bool | None = None, normalize_output: bool = True,
        **kwargs: Any,
    ) -> BaseModelOutput:  # fmt: skip
        """Features ``(B, L, D)`` of ``[class token | patches | text]``, or of one modality alone.

        Args:
            input_ids: ``(B, S)``, padded on the right.
            pixel_values: ``(B, 3, image_size, image_size)``.
            attention_mask: ``(B, S)``, 0 where padded; by default where the padding symbol is.
            bool_masked_pos: ``(B, patches)``, True where the mask token replaces the patch.
            normalize_output: whether the final norm is applied, if there is one.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("give input_ids, pixel_values or both")
        parts = [] if pixel_values is None else [self._embed_images(pixel_values, bool_masked_pos)]
        image_length = parts[0].size(1) if parts else 0
        mask = None
        if input_ids is not None:
            real = input_ids.ne(self.config.pad_token_id) if attention_mask is None else attention_mask.bool()
            if input_ids.size(1) > self.config.max_position_embeddings:
                longest = self.config.max_position_embeddings
                raise ValueError(f"a text of {input_ids.size(1)} tokens; max_position_embeddings is {longest}")
            text = self.text_embed(input_ids) + self.text_positions.weight[: input_ids.size(1)]
            parts.append(text)
            hidden = ~F.pad(real, (image_length, 0), value=True)
            mask = text.new_zeros(hidden.shape).masked_fill(hidden, torch.finfo(text.dtype).min)[:, None, None]
        x = torch.cat(parts, dim=1)
        x = self.dropout(x if self.embedding_norm is None else self.embedding_norm(x, image_length))
        states = [x if mask is None else x.masked_fill(hidden[..., None], 0)]
        for layer in self.layers:
            states.append(layer(states[-1], image_length, attention_mask=mask, **kwargs))
        if self.norm is not None and normalize_output:
            states[-1] = self.norm(states[-1], image_length)
        return BaseModelOutput(
            last_hidden_state=states[-1], hidden_states=tuple(states) if output_hidden_states else None
        )

    def _embed_images(self, images: Tensor, masked: Tensor | None) -> Tensor:
        """``(B, 3, H, W) -> (B, P, D)``."""
        size = self.config.image_size
        if images.shape[-2:] != (size, size):
            raise ValueError(f"pixel_values {tuple(images.shape)} must be of {size}x{size} pixels: image_size")
        x = self.patch_embed(images.to(self.patch_embed.weight.dtype)).flatten(2).transpose(1, 2)
        if masked is not None:
            x = torch.where(masked[..., None], self.mask_token.to(x.dtype), x)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.image_positions.weight


class MHMoEBEiT3ForImageClassification(MHMoEBEiT3PreTrainedModel):
    """Classes of images, from the mean of their patches."""

    def __init__(self, config: MHMoEBEiT3Config) -> None:
        super().__init__(config)
        self.model = MHMoEBEiT3Model(config)
        self.head = MHMoEBEiT3Head(config, has_pooler=False)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Logits ``(B, classes)``; ``loss``, the cross entropy in nats, with ``labels (B,)``."""
        outputs = self.model(pixel_values=pixel_values, normalize_output=False, return_dict=True, **kwargs)
        logits = self.head(outputs.last_hidden_state[:, 1:].mean(dim=1))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class MHMoEBEiT3ForVisualQuestionAnswering(MHMoEBEiT3PreTrainedModel):
    """Answers to questions about images, from the class token."""

    def __init__(self, config: MHMoEBEiT3Config) -> None:
        super().__init__(config)
        self.model = MHMoEBEiT3Model(config)
        self.head = MHMoEBEiT3Head(config, has_pooler=True)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None,
        labels: Tensor | None = None, **kwargs: Any,
    ) -> SequenceClassifierOutput:  # fmt: skip
        """Logits ``(B, answers)``; ``loss``, binary cross entropy in nats over all answers, with ``labels``, 0 to 1."""
        outputs = self.model(
            input_ids, pixel_values, attention_mask, normalize_output=False, return_dict=True, **kwargs
        )
        logits, loss = self.head(outputs.last_hidden_state[:, 0]), None
        if labels is not None:
            losses = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
            loss = losses.sum(dim=1).mean()
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
