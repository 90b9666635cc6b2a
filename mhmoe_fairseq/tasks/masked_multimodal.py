"""Masked data modelling on images, texts and pairs of them: BEiT-3's pre-training."""

import functools
import hashlib
import logging
from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from pathlib import Path
from typing import Any, Optional

from fairseq.data import FairseqDataset, data_utils
from fairseq.models import BaseFairseqModel
from fairseq.tasks import register_task
from torch import Tensor

from ..checkpoints.files import read_trained
from ..common.errors import UserError
from ..criterions.masked_multimodal import MODALITIES
from ..data.binarised import check_split
from ..data.datasets.masked import MaskedImages, MaskedPairs, MaskedTexts
from ..data.datasets.modalities import EvaluationModalities, TrainingModalities
from ..data.images.transforms import EvaluationViews, PretrainingViews
from ..data.multimodal.index import read_index
from ..data.visual_tokenizers import VisualTokenizer, load_visual_tokenizer
from .base import ImageTextTask, ImageTextTaskConfig, resumed_checkpoint

logger = logging.getLogger(__name__)


@dataclass
class MaskedMultimodalTaskConfig(ImageTextTaskConfig):
    """Flags of pre-training besides those of all tasks on images and text."""

    modalities: str = field(
        default=",".join(MODALITIES),
        metadata={"help": "comma-separated: what every batch has a sub-batch of, image, text and pair"},
    )
    visual_tokenizer: Optional[str] = field(
        default=None,
        metadata={"help": "file of the tokenizer whose ids of masked patches are predicted (default: the data's own)"},
    )
    image_mask_prob: float = field(default=0.4, metadata={"help": "share of the patches that are masked, in blocks"})
    text_mask_prob: float = field(default=0.15, metadata={"help": "share of the tokens of a text that are masked"})
    pair_text_mask_prob: float = field(
        default=0.5, metadata={"help": "share of the tokens that are masked where the text comes with an image"}
    )


@register_task("mhmoe_masked_multimodal", dataclass=MaskedMultimodalTaskConfig)
class MaskedMultimodalTask(ImageTextTask):
    """Every batch holds images, texts and pairs, ``--batch-size`` of each, and every rank does the same with them.

    An epoch is as many samples of each modality as the largest has, see ``TrainingModalities``. A held-out split goes
    through every sample of every modality once, with masks that depend on neither ``--seed`` nor the epoch.

    The ids of masked patches come from the visual tokenizer while training, from the same crop that the model sees.
    It is no part of checkpoints, but a digest of it is: a run cannot go on with another one.
    """

    def __init__(self, args: Any) -> None:
        names = [name.strip() for name in args.modalities.split(",")]
        if not set(names) <= set(MODALITIES) or len(set(names)) < len(names):
            raise UserError(f"--modalities ({args.modalities}) must be some of {','.join(MODALITIES)}, each once")
        self.modalities = tuple(name for name in MODALITIES if name in names)
        self.has_images = self.modalities != ("text",)
        if args.visual_tokenizer and not self.has_images:
            raise UserError(
                f"--visual-tokenizer ({args.visual_tokenizer}) is for patches, and --modalities ({args.modalities}) "
                "has no images: leave one of the two flags out"
            )
        super().__init__(args)
        self._tokenizer_file = Path(args.visual_tokenizer or self.folder / "visual_tokenizer.pt")

    @property
    def num_visual_tokens(self) -> int:
        """Codes of the visual tokenizer; 0 without images."""
        return self.visual_tokenizer.vocab_size if self.has_images else 0

    @functools.cached_property
    def visual_tokenizer(self) -> VisualTokenizer:
        """That of ``--visual-tokenizer``, read when first needed; a ``UserError`` says that its grid is not ours."""
        tokenizer = load_visual_tokenizer(self._tokenizer_file)
        if tokenizer.token_shape != self.grid:
            rows, columns = tokenizer.token_shape
            raise UserError(
                f"--visual-tokenizer {self._tokenizer_file} gives {rows} x {columns} ids for an image, but --img-size "
                f"({self.args.img_size}) and --patch-size ({self.args.patch_size}) make {self.grid[0]} x "
                f"{self.grid[1]} patches: both grids must be the same"
            )
        return tokenizer

    def image_targets(self, batch: dict[str, Any]) -> Tensor:
        """Return ``(B, patches)`` ids of all patches of a sub-batch, computed where the batch is, in float32."""
        images = batch["tokenizer_images"]
        return self.visual_tokenizer.to(images.device).encode(images.float() / 255)

    def build_model(self, args: Any, from_checkpoint: bool = False) -> BaseFairseqModel:
        """Build the model; for training, check the checkpoint that it will start from or go on with."""
        model = super().build_model(args, from_checkpoint)
        resumed = None if from_checkpoint else resumed_checkpoint(self.args)
        if resumed is not None:
            self.load_state_dict(read_trained(resumed).get("task_state") or {})
        return model

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """Check and load a split of every modality; an error names the file that is missing or broken."""
        parts = {name: self._read(name, split) for name in self.modalities}
        logger.info(f"{split}: {', '.join(f'{len(part):,} of {name}' for name, part in parts.items())}")
        is_training = split == "train"
        self.datasets[split] = TrainingModalities(parts, self.args.seed) if is_training else EvaluationModalities(parts)

    def _read(self, modality: str, split: str) -> FairseqDataset:
        """One modality of a split, its files checked."""
        settings = self.dataset_settings(split)
        if modality == "text":
            prefix = self.folder / "text" / split
            check_split(prefix, len(self.dictionary))
            lines = data_utils.load_indexed_dataset(str(prefix), self.dictionary)
            return MaskedTexts(lines, settings, self.args.text_mask_prob)
        index = read_index(self.folder, modality, split, vocabulary_size=len(self.dictionary))
        kind = PretrainingViews if settings.training else EvaluationViews
        views = kind(self.args.img_size, self.visual_tokenizer.image_size)
        if modality == "image":
            return MaskedImages(index, settings, views, self.args.image_mask_prob)
        return MaskedPairs(index, settings, views, self.args.image_mask_prob, self.args.pair_text_mask_prob)

    def state_dict(self) -> dict[str, Any]:
        """Return what checkpoints keep of the task: which visual tokenizer there was."""
        return {"visual_tokenizer": self._tokenizer_digest} if self.has_images else {}

    @functools.cached_property
    def _tokenizer_digest(self) -> str:
        """SHA-256 of what decides the visual tokenizer's ids: its kind and its tensors."""
        tokenizer = self.visual_tokenizer
        digest = hashlib.sha256(f"{tokenizer.kind} {tokenizer.image_size} {tokenizer.patch_size}".encode())
        for name, tensor in sorted(tokenizer.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
        return digest.hexdigest()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse another visual tokenizer than the checkpoint's, whose ids would mean other patches."""
        saved = state_dict.get("visual_tokenizer")
        if saved is not None and self.has_images and saved != self._tokenizer_digest:
            rule = "is not the one that the checkpoint was trained with: its ids mean other patches"
            raise UserError(f"--visual-tokenizer ({self._tokenizer_file}) {rule}")
