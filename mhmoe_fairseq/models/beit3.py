"""The masked multimodal model ``mhmoe_beit3``: BEiT-3 with dense, sparse MoE, X-MoE or MH-MoE layers by its options."""

from typing import Any

from fairseq.data import Dictionary
from fairseq.models import BaseFairseqModel, register_model
from torch import Tensor, nn

from ..common.errors import UserError
from ..compat import refuse_tpu
from ..moe.parallelism import ExpertParallelism
from ..torchscale_ext.beit3 import INITIAL_DEVIATION, MultiwayBEiT3
from ..torchscale_ext.settings import EncoderSettings
from .bases import ComputePrecision, RemembersVocabulary, spread_experts
from .beit3_checkpoints import drop_other_heads, fit_state
from .captions import MASK_SYMBOL, WritesCaptions
from .flags import encoder_settings
from .options import BEIT3_NAME, BEiT3Options


@register_model(BEIT3_NAME, dataclass=BEiT3Options)
class MHMoEBEiT3(ComputePrecision, WritesCaptions, RemembersVocabulary, BaseFairseqModel):
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
        heads: by name; empty but in fine-tuning.
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
        self.heads = nn.ModuleDict()
        self._new_heads: set[str] = set()
        self._leaves_out_other_heads = False
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
        if MASK_SYMBOL not in task.source_dictionary:
            raise UserError(f"the data's dict.txt has no {MASK_SYMBOL}: prepare it with mhmoe prepare image-text")
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
            text_tokens: ``(B, S)``, the padding symbol where padded.
            images: ``(B, 3, H, W)``, normalised.
            masked_patches: bool ``(B, patches)``, True where the mask token replaces the patch.
            attention: ``full``, or ``caption``: the image sees itself, a token the image and the text up to itself.
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

    def text_logits(self, features: Tensor) -> Tensor:
        """``(..., D) -> (..., vocabulary)``."""
        with self.autocast(features.device.type):
            return self.text_head(features)

    def image_logits(self, features: Tensor) -> Tensor:
        """``(..., D) -> (..., visual tokens)``.

        Raises:
            ValueError: if the model was built without visual tokens.
        """
        if self.image_head is None:
            raise ValueError("the model has no head for masked patches: its task has no visual tokens")
        with self.autocast(features.device.type):
            return self.image_head(features)

    def register_head(self, name: str, module: nn.Module, may_be_new: bool = True) -> None:
        """Add a head, called with features and ``extra``; it is saved and loaded with the model.

        Args:
            name: for ``forward(head=name)``.
            module: the head.
            may_be_new: a checkpoint without it, a pre-trained one, leaves it as it is initialised; otherwise a missing
                head is as much an error as any other missing parameter.
        """
        self.heads[name] = module
        if may_be_new:
            self._new_heads.add(name)

    def leave_out_other_heads(self) -> None:
        """From now on a checkpoint's heads that the model has not, of another task, are left out when it is loaded."""
        self._leaves_out_other_heads = True

    def fitted_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint's parameters as this model would load them; see ``fit_state``."""
        fitted = dict(state)
        self._fit(fitted)
        return fitted

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        self._fit(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _fit(self, state: dict[str, Any], prefix: str = "") -> None:
        if self._leaves_out_other_heads:
            drop_other_heads(self, state, prefix)
        fit_state(self, state, self._new_heads, prefix)


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
