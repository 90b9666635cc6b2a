"""Self-attention with TorchScale's parameters and results, by ``scaled_dot_product_attention`` where that is fast."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchscale.component.multihead_attention import MultiheadAttention

from ..moe.lory import SegmentMemory
from ..moe.modes import compute_dtype, without_autocast
from .positions import RotaryPositions
from .settings import Settings

ATTENTION_KINDS = ("full", "caption")
# Up to this many positions PyTorch's kernel trains slowly in half precision on a CPU: in bf16 both passes take 3 to 5
# times as long as plain operations at 128 positions, 1.6 to 2.2 times at 256 (torch 2.14, avx512_bf16); beyond these
# keep too much. In float16 such products are slow, and float32 is the fastest.
SHORT = 256


class KeyValueCache:
    """What a layer keeps of earlier steps: keys and values, ``(B, heads, S, d)``; empty at first.

    Attributes:
        memory: what its experts keep; None if nothing.
    """

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.memory: SegmentMemory | None = None

    def __len__(self) -> int:
        """How many positions it has."""
        return 0 if self._keys is None else self._keys.size(2)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones last."""
        if self._keys is not None and self._values is not None:
            keys, values = torch.cat([self._keys, keys], dim=2), torch.cat([self._values, values], dim=2)
        self._keys, self._values = keys, values
        return keys, values

    def drop_last(self) -> None:
        """Forget the last position."""
        assert self._keys is not None and self._values is not None, "an empty cache"
        self._keys, self._values = self._keys[:, :, :-1], self._values[:, :, :-1]

    def reorder(self, rows: Tensor) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was; there may be more rows than before, or fewer."""
        assert self._keys is not None and self._values is not None, "an empty cache"
        self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)
        if self.memory is not None:
            self.memory.reorder(rows)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, dropout: float = 0.0, is_causal: bool = False
) -> Tensor:
    """``scaled_dot_product_attention``, or the same by what trains faster; ``visible`` or ``is_causal``, not both."""
    with without_autocast(v.device.type):
        if _is_half_on_cpu(v) and v.requires_grad and v.size(2) <= SHORT:
            if v.dtype == torch.bfloat16:
                return _attend_by_products(q, k, v, visible, dropout, is_causal)
            q, k, v = q.float(), k.float(), v.float()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, is_causal=is_causal)


def _attend_by_products(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, dropout: float, is_causal: bool
) -> Tensor:
    """With weights ``(B, heads, S, keys)`` at hand, rounded where TorchScale's are under autocast."""
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)
    if is_causal:
        visible = q.new_ones(q.size(2), k.size(2), dtype=torch.bool).tril()
    if visible is not None:  # a sum with rows that repeat is faster than a masked_fill of all
        scores = scores + scores.new_zeros(visible.shape).masked_fill(~visible, -torch.inf)
    return F.dropout(scores.softmax(-1), dropout) @ v


def _is_half_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


class SelfAttention(MultiheadAttention):
    """Multi-head self-attention; parameter names and values are those of TorchScale's ``MultiheadAttention``.

    Adds rotary positions, RMSNorm as sub-LN, bias-free maps and a causal mode without a mask tensor. Attention
    weights are not materialised, but where short sequences train in bf16 on a CPU.
    """

    def __init__(self, settings: Settings, dim: int, num_heads: int) -> None:
        dropout = settings.attention_dropout
        super().__init__(settings, dim, num_heads, dropout=dropout, self_attention=True, subln=settings.subln)
        self.rotary: RotaryPositions | None = None
        if settings.rotary_embed:
            self.rotary = RotaryPositions(self.head_dim, settings.max_target_positions)
        settings.replace_norms(self, "inner_attn_ln")
        settings.fit_maps(self)

    def forward(
        self,
        x: Tensor,
        *image_length: int,
        visible: Tensor | None = None,
        cache: KeyValueCache | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend, ``(B, S, D) -> (B, S, D)``.

        Args:
            image_length: in encoders how many positions, the first, are the image's; nothing in decoders.
            visible: bool, broadcastable to ``(B, heads, S, keys)``, True where a query sees a key; every query sees
                at least one. None: all see all.
            cache: earlier steps' keys, which come before ``x``'s; extended.
            is_causal: without ``visible`` a query sees no later key; with a cache for a whole prefix only.
        """
        x = x.to(compute_dtype(x))  # once, and not by each projection
        q, k, v = (self._heads(project(x, *image_length)) for project in (self.q_proj, self.k_proj, self.v_proj))
        past = 0 if cache is None else len(cache)
        if self.rotary is not None:
            q, k = self.rotary(q, past), self.rotary(k, past)
        if cache is not None:
            if _is_half_on_cpu(v):  # for single queries float32 is four times as fast there
                k, v = k.float(), v.float()
            k, v = cache.extend(k, v)
        if self.xpos is not None:
            q, k = self._rotate_xpos(q, k, past)
        dropout = self.dropout_module.p if self.training else 0.0
        attended = _attend(q.type_as(v), k.type_as(v), v, visible, dropout, is_causal and visible is None)
        attended = attended.to(x.dtype).transpose(1, 2).reshape(x.shape)
        if self.inner_attn_ln is not None:
            attended = self.inner_attn_ln(attended, *image_length)
        return self.out_proj(attended, *image_length)

    def _heads(self, x: Tensor) -> Tensor:
        """``(B, S, D) -> (B, heads, S, d)``."""
        return x.view(x.size(0), x.size(1), self.num_heads, self.head_dim).transpose(1, 2)

    def _rotate_xpos(self, q: Tensor, k: Tensor, past: int) -> tuple[Tensor, Tensor]:
        # TorchScale's module takes (rows, S, d) and centres its scale on the keys' length, so cached keys stay
        # unrotated and all of them are rotated at every step.
        k_rotated = self.xpos(k.flatten(0, 1), offset=0, downscale=True).view_as(k)
        q_rotated = self.xpos(q.flatten(0, 1), offset=past, downscale=False).view_as(q)
        return q_rotated, k_rotated


class MultiwaySelfAttention(SelfAttention):
    """The same with maps and norm for each modality."""

    def __init__(self, settings: Settings, dim: int, num_heads: int) -> None:
        super().__init__(settings, dim, num_heads)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, settings.for_modalities(lambda: nn.Linear(dim, dim)))
        settings.fit_maps(self)
        self.xpos = None  # an image and its text are no one sequence of positions


def visible_keys(
    attention: str, image_length: int, length: int, padding_mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """Which keys a query sees, for ``SelfAttention``; None for all.

    Args:
        attention: ``full``: everything; ``caption``: the image sees the image, a text token the image and the text up
            to itself.
        image_length: the image's positions, of ``length`` altogether.
        padding_mask: bool ``(B, length)``, True where padded; such keys are not seen, but where a query would see none
            at all, it sees everything, or in a caption itself, since nobody reads its result: a softmax over nothing
            is NaN.

    Raises:
        ValueError: for any other ``attention``.
    """
    if attention not in ATTENTION_KINDS:
        raise ValueError(f"attention ({attention!r}) must be one of {', '.join(ATTENTION_KINDS)}")
    if attention == "full":
        if padding_mask is None:
            return None
        nothing_real = padding_mask.all(dim=1, keepdim=True)
        return (~padding_mask | nothing_real)[:, None, None, :]
    positions = torch.arange(length, device=device)
    in_image = positions < image_length
    visible = in_image[None, :] | (~in_image[:, None] & (positions[None, :] <= positions[:, None]))
    if padding_mask is None:
        return visible
    itself = torch.eye(length, dtype=torch.bool, device=device)
    return (visible & ~padding_mask[:, None, None, :]) | itself
