"""Configuration of MH-MoE BEiT-3, encoders of images and texts, for transformers 5.10 and later."""

from typing import Any

from .configuration_mhmoe import MHMoEConfig


class MHMoEBEiT3Config(MHMoEConfig):
    """What decides the function of an ``mhmoe_beit3`` model: the fields of encoders and language models, and these.

    Args:
        max_position_embeddings: tokens of the longest text, ``<s>`` and ``</s>`` counted.
        image_size, patch_size: sides of the square images and of a patch, in pixels.
        mhmoe_modality_experts: ``shared``, one pool of experts for images and texts, or ``separate``, two pools.

    Raises:
        ValueError: naming the field, its value and the rule.
    """

    model_type = "mhmoe_beit3"

    max_position_embeddings: int = 64
    image_size: int = 224
    patch_size: int = 16
    mhmoe_modality_experts: str = "shared"
    absolute_positions: str = "learned"
    use_cache: bool = False
    bos_token_id: int | None = 0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the fields."""
        super().__post_init__(**kwargs)
        pools = self.mhmoe_modality_experts
        self._require("mhmoe_modality_experts", pools in ("shared", "separate"), "one of shared, separate")
        fits = 0 < self.patch_size <= self.image_size and self.image_size % self.patch_size == 0
        self._require("patch_size", fits, f"a divisor of {self.image_size}")

    @property
    def image_positions(self) -> int:
        """How many positions an image has: one for the class token, and its patches."""
        return 1 + (self.image_size // self.patch_size) ** 2
