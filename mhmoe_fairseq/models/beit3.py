"""The masked multimodal model ``mhmoe_beit3``: BEiT-3 with dense, sparse MoE, X-MoE or MH-MoE layers by its options."""

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from fairseq.data import Dictionary
from fairseq.models import BaseFairseqModel, register_model
from torch import Tensor, nn

from ..common.errors import UserError
from ..compat import refuse_tpu
from ..data.multimodal.masking import mask_index
from ..moe.parallelism import ExpertParallelism
from ..torchscale_ext.attention import KeyValueCache
from ..torchscale_ext.beit3 import INITIAL_DEVIATION, MultiwayBEiT3
from ..torchscale_ext.settings import UNUSED_POSITIONS, EncoderSettings
from .bases import RemembersVocabulary, spread_experts
from .captions import CaptionState
from .cross_entropy import Prediction, predict
from .flags import encoder_settings
from .heads import TaskHeads
from .options import BEIT3_NAME, BEiT3Options
from .precision import ComputePrecision, round_linear_maps

logger = logging.getLogger(__name__)

IMAGE_POSITIONS = "beit3.encoder.embed_positions.A.weight"
TEXT_POSITIONS = "beit3.encoder.embed_positions.B.weight"
# Before the patches: the unused rows and the class token's.
_FIRST_PATCH = UNUSED_POSITIONS + 1


@register_model(BEIT3_NAME, dataclass=BEiT3Options)
class MHMoEBEiT3(ComputePrecision, RemembersVocabulary, BaseFairseqModel):
    """Images, texts, and images with a text; ``--arch`` names one of ``models.architectures``.

    Its parameters have the names of unilm's BEiT-3 (``beit3.*``), and the heads: ``text_head``, the vocabulary's scores
    with weights of their own as in BEiT-3, ``image_head``, the visual tokens', and ``heads.*``.

    Args:
        options: ``BEiT3Options``.
        settings: what ``encoder_settings`` makes of the options.
        dictionary: of the texts, with ``<mask>``.
        num_visual_tokens: scores for a masked patch; 0 without them, as in fine-tuning.

    Attributes:
        beit3: everything but heads.
        image_head: None without visual tokens.
        heads: of fine-tuning.
    """

    def __init__(
        self, options: Any, settings: EncoderSettings, dictionary: Dictionary, num_visual_tokens: int = 0
    ) -> None:
        super().__init__()
        width = settings.encoder_embed_dim
        self.dictionary = dictionary
        self.beit3 = MultiwayBEiT3(settings, dictionary.pad())
        self.text_head = build_output_layer(width, len(dictionary))
        self.image_head = build_output_layer(width, num_visual_tokens) if num_visual_tokens else None
        self.heads = TaskHeads()
        self.set_precision(options)
        self.remember_vocabulary(dictionary, "beit3.text_embed.weight")

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "MHMoEBEiT3":
        """Build from filled options, in training with the experts spread over the processes.

        Args:
            args: ``BEiT3Options``.
            task: with ``source_dictionary`` and ``num_visual_tokens``.

        Raises:
            UserError: naming the flag, its value and the rule.
        """
        if args.encoder_layers is None:
            raise UserError(
                f"model {BEIT3_NAME} needs an architecture, such as mhmoe_beit3_tiny: --arch or model._name"
            )
        refuse_tpu(args.tpu)
        mask_index(task.source_dictionary)
        settings = encoder_settings(args, len(task.source_dictionary))
        spread_experts(settings, args, task)
        return cls(args, settings, task.source_dictionary, task.num_visual_tokens)

    def forward(
        self,
        text_tokens: Tensor | None = None,
        images: Tensor | None = None,
        masked_patches: Tensor | None = None,
        attention: str = "full",
        head: str | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Features of every position, or what a head makes of them.

        Args:
            text_tokens, masked_patches, attention: as in ``MultiwayBEiT3``.
            images: ``(B, 3, H, W)``, normalised.
            head: a registered head; it reads the features before the final norm if its ``normalize_output`` is False.

        Returns:
            features ``(B, L, D)`` of ``[cls | patches, row by row | text]``, or the head's result; and ``extra``:
            ``moe`` with one entry per layer as a decoder's, ``padding_mask`` (bool ``(B, L)``, True where padded; None
            without a text) and ``image_positions``, how many of L are the image's.

        Raises:
            ValueError: if neither text nor images are given, or their sizes are not the model's; when training in fp16
                without loss scaling.
        """
        given = images if text_tokens is None else text_tokens
        with self.autocast("cpu" if given is None else given.device.type):
            normalize = head is None or getattr(self.heads[head], "normalize_output", True)
            features, extra = self.beit3(text_tokens, images, masked_patches, attention, normalize_output=normalize)
            return (features if head is None else self.heads[head](features, extra)), extra

    def round_weights(self, dtype: torch.dtype) -> None:
        """As the base, and the heads'."""
        for module in (self.beit3.encoder.layers, self.text_head, self.image_head):
            if module is not None:
                round_linear_maps(module, dtype)

    def text_logits(self, features: Tensor) -> Tensor:
        """``(..., D) -> (..., vocabulary)``."""
        with self.autocast(features.device.type):
            return self.text_head(features)

    def image_logits(self, features: Tensor) -> Tensor:
        """``(..., D) -> (..., visual tokens)``; ``ValueError`` if the model was built without visual tokens."""
        with self.autocast(features.device.type):
            return self._image_head()(features)

    def predict_words(self, features: Tensor, targets: Tensor) -> Prediction:
        """Losses of words, and whether they are best, from features: as of ``text_logits``."""
        with self.autocast(features.device.type):
            return predict(features, self.text_head, targets, with_best=True)

    def predict_patches(self, features: Tensor, targets: Tensor) -> Prediction:
        """As ``predict_words``, of visual tokens; ``ValueError`` if the model was built without them."""
        with self.autocast(features.device.type):
            return predict(features, self._image_head(), targets, with_best=True)

    def _image_head(self) -> nn.Linear:
        if self.image_head is None:
            raise ValueError("the model has no head for masked patches: its task has no visual tokens")
        return self.image_head

    def register_head(self, name: str, module: nn.Module, may_be_new: bool = True) -> None:
        """Add a head, called with features and ``extra``; it is saved and loaded with the model.

        Args:
            name: for ``forward(head=name)``.
            may_be_new: see ``TaskHeads``.
        """
        self.heads.register(name, module, may_be_new)

    @torch.no_grad()
    def start_captions(self, images: Tensor) -> CaptionState:
        """Read ``(B, 3, H, W)`` images; no token has been written.

        Each token is predicted from a trailing mask token. What an earlier position computes never changes with later
        ones, since the image sees itself alone and a token the image and the text up to itself: keys and values are
        computed once.
        """
        state = CaptionState([KeyValueCache() for _ in self.beit3.encoder.layers])
        with self.autocast(images.device.type):
            self.beit3(images=images, caches=state.caches)
        return state

    @torch.no_grad()
    def next_token_logits(self, state: CaptionState, tokens: Tensor) -> Tensor:
        """Append a token to every caption, and score the next one.

        Args:
            state: updated.
            tokens: ``(B,)``, the first time the beginning-of-sentence symbol.

        Returns:
            ``(B, vocabulary)``: the scores of a ``<mask>`` that stands next.

        Raises:
            UserError: if the next token would be longer than ``--max-text-length``.
        """
        pairs = torch.stack([tokens, torch.full_like(tokens, mask_index(self.dictionary))], dim=1)
        keys = 1 + self.beit3.vision_embed.num_patches + state.num_tokens + 2
        visible = torch.ones(2, keys, dtype=torch.bool, device=tokens.device)
        visible[0, -1] = False  # the token does not see the mask, which is not of the caption
        with self.autocast(tokens.device.type):
            embedded = self.beit3.embed_text(pairs, state.num_tokens)
            features, _ = self.beit3.encoder(embedded, 0, None, visible, state.caches)
        for cache in state.caches:
            cache.drop_last()
        state.num_tokens += 1
        return self.text_logits(features[:, -1])

    def fitted_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's parameters as this model would load them.

        The image's position table is resized to the model's grid of patches, the text's cut to the model's length; the
        head of masked patches is left out if the model has none; other heads as in ``TaskHeads``.

        Raises:
            UserError: if the checkpoint's texts were shorter than the model's.
        """
        fitted = dict(state)
        self._fit(fitted)
        self.heads.fit(fitted, "heads.")
        return fitted

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        self._fit(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _fit(self, state: dict[str, Any], prefix: str = "") -> None:
        for name, fit in ((IMAGE_POSITIONS, resize_image_positions), (TEXT_POSITIONS, cut_text_positions)):
            if prefix + name in state:
                state[prefix + name] = fit(state[prefix + name], self.get_parameter(name).size(0))
        if self.image_head is None:
            for name in [name for name in state if name.startswith(f"{prefix}image_head.")]:
                del state[name]

    def resized_tables(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, str, int, int]]:
        """The position tables of a state dictionary that are not of the model's size.

        Yields:
            the flag that sets the size, what it counts, how many the dictionary has and how many the model.
        """
        for name, flag, unit, others in (
            (IMAGE_POSITIONS, "--img-size", "patches", _FIRST_PATCH),
            (TEXT_POSITIONS, "--max-text-length", "tokens", UNUSED_POSITIONS),
        ):
            rows = self.get_parameter(name).size(0)
            if name in state and state[name].size(0) != rows:
                yield flag, unit, state[name].size(0) - others, rows - others


def build_beit3(
    options: Any, dictionary: Dictionary, num_visual_tokens: int = 0, parallel: ExpertParallelism | None = None
) -> MHMoEBEiT3:
    """The model of filled options (see ``architectures.architecture_options``); allocates nothing on ``meta``."""
    settings = encoder_settings(options, len(dictionary), parallel)
    return MHMoEBEiT3(options, settings, dictionary, num_visual_tokens)


def build_output_layer(width: int, size: int) -> nn.Linear:
    """A linear map to scores, with BEiT's initial values."""
    layer = nn.Linear(width, size)
    nn.init.normal_(layer.weight, std=INITIAL_DEVIATION)
    nn.init.zeros_(layer.bias)
    return layer


def resize_image_positions(table: Tensor, rows: int) -> Tensor:
    """Bicubically, as BEiT does; the class token's row is kept. ``(rows', D) -> (rows, D)``.

    Raises:
        UserError: if the table's rows do not fit a square of patches.
    """
    if table.size(0) == rows:
        return table
    before, after = (math.isqrt(size - _FIRST_PATCH) for size in (table.size(0), rows))
    if before**2 != table.size(0) - _FIRST_PATCH:
        raise UserError(f"{IMAGE_POSITIONS}: {table.size(0)} rows are not the positions of a square of patches")
    logger.info(f"positions of {before}x{before} patches are resized to {after}x{after} (--img-size)")
    grid = table[_FIRST_PATCH:].float().t().reshape(1, -1, before, before)
    resized = F.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
    return torch.cat([table[:_FIRST_PATCH], resized.flatten(2)[0].t().to(table.dtype)])


def cut_text_positions(table: Tensor, rows: int) -> Tensor:
    """The first ``rows`` of a longer table; ``UserError`` if it is shorter: nothing has been learnt for the rest."""
    if table.size(0) < rows:
        raise UserError(
            f"--max-text-length ({rows - UNUSED_POSITIONS}): the checkpoint has positions for "
            f"{table.size(0) - UNUSED_POSITIONS} tokens only"
        )
    return table[:rows]
