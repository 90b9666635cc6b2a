"""Fine-tuning on image captions as BEiT-3 does, with CIDEr of decoded captions at every validation."""

import functools
from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from typing import Any, Callable, Mapping, Optional, Sequence

import numpy as np
import torch
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceConfig
from fairseq.distributed import utils as distributed_utils
from fairseq.tasks import register_task
from torch import Tensor, nn

from ..common.errors import UserError
from ..data.datasets.base import DatasetSettings, Sample
from ..data.datasets.labelled import CaptionDataset, Transform
from ..data.multimodal.index import Index, read_index
from ..data.vocabularies import MODEL_FILE
from ..metrics.caption_words import tokenize
from ..metrics.captions import CiderD, read_ground_truth
from ..models.captions import CaptionSearch, Specials, search_captions
from .finetuning import ImageTextFineTuning, ImageTextFineTuningConfig
from .tokenizers import WholeSentencepieceBPE

NAME = "coco_captioning"  # of the index files
GROUND_TRUTH = {"valid": "coco_karpathy_val_gt.json", "test": "coco_karpathy_test_gt.json"}


@dataclass
class CaptioningTaskConfig(ImageTextFineTuningConfig):
    """Flags of captioning besides those of all fine-tuning tasks on images and text."""

    caption_mask_prob: float = field(
        default=0.7, metadata={"help": "share of a caption's tokens, </s> among them, that are masked in training"}
    )
    caption_beam: int = field(
        default=3, metadata={"help": "hypotheses that validation's beam search keeps; 1 is greedy and faster"}
    )
    caption_length_penalty: float = field(
        default=0.6, metadata={"help": "captions are compared by log-probability over their length to this power"}
    )
    caption_max_len: Optional[int] = field(
        default=None,
        metadata={"help": "most tokens of a decoded caption, </s> counted (default: --max-text-length less 1)"},
    )


@register_task("mhmoe_captioning", dataclass=CaptioningTaskConfig)
class CaptioningTask(ImageTextFineTuning):
    """Captions of images: masked tokens in training, each seeing the image and the text before it.

    The files are ``coco_captioning.{train,val,test}.jsonl`` and, with the reference captions in COCO's layout,
    ``coco_karpathy_{val,test}_gt.json``. Validation decodes a caption for every image and logs ``cider``, 100 times
    the mean CIDEr-D, beside the loss on the references: select with ``--best-checkpoint-metric cider
    --maximize-best-checkpoint-metric``.

    Attributes:
        search: how validation decodes.
        specials: what the search may not write, and how captions start and end.
    """

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.search = self.build_search(args.caption_beam, args.caption_length_penalty, args.caption_max_len)
        bos, eos = self.dictionary.bos(), self.dictionary.eos()
        self.specials = Specials(bos, eos, (bos, self.dictionary.pad(), self.dictionary.unk(), self.mask_index))

    def build_search(self, beam: int, length_penalty: float, max_len: int | None) -> CaptionSearch:
        """Return how to decode, by default as many tokens as the model has positions for; more are refused."""
        most = self.args.max_text_length - 1  # <s> takes a place
        if max_len is not None and max_len > most:
            raise UserError(f"a caption of {max_len} tokens is too long: --max-text-length leaves {most} after <s>")
        return CaptionSearch(beam, length_penalty, most if max_len is None else max_len)

    @functools.cached_property
    def tokenizer(self) -> WholeSentencepieceBPE:
        """The data's ``sentencepiece.model``, which must be there."""
        model = self.folder / MODEL_FILE
        if not model.is_file():
            raise FileNotFoundError(f"{model} is missing: it turns tokens into words")
        return WholeSentencepieceBPE(SentencepieceConfig(sentencepiece_model=str(model)))

    def encode(self, caption: str) -> list[int]:
        """Return a caption's ids, without specials."""
        return [self.dictionary.index(piece) for piece in self.tokenizer.encode(caption).split()]

    def decode(self, tokens: tuple[int, ...]) -> str:
        """Return the text of ids without specials."""
        return self.tokenizer.decode(" ".join(self.dictionary[token] for token in tokens))

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """Check and load a split, with its reference captions if it is not for training; an error names the file."""
        index = read_index(self.folder, "captioning", split, NAME, vocabulary_size=len(self.dictionary))
        read = index, self.dataset_settings(split), self.build_transform(split), self.args.caption_mask_prob
        if split == "train":
            self.datasets[split] = CaptionDataset(*read)
        else:
            references = read_ground_truth(self.folder / GROUND_TRUTH[split])
            self.datasets[split] = ReferencedCaptions(*read, split, references, self.encode)

    def write_captions(self, model: nn.Module, images: Tensor, search: CaptionSearch | None = None) -> list[str]:
        """Return a caption for each of ``(B, 3, H, W)`` images; by another search than validation's, if given."""
        found = search_captions(model, images, search or self.search, self.specials, self._are_all_done)
        return [self.decode(caption.tokens) for caption in found]

    def _are_all_done(self, is_done: bool) -> bool:
        """Where ranks share the experts, all of them decode until the last one is done."""
        if not self.has_spread_experts:
            return is_done
        group = distributed_utils.get_global_group()
        device = "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"
        waiting = torch.tensor([not is_done], dtype=torch.long, device=device)
        distributed_utils.all_reduce(waiting, group)
        return not waiting.any()

    def evaluate_batch(self, sample: dict, model: nn.Module, criterion: Any) -> tuple[Tensor, Any, dict]:
        """Return the loss on masked references, and log the sum of the CIDEr of decoded captions."""
        loss, sample_size, log = super().evaluate_batch(sample, model, criterion)
        captions = self.write_captions(model, sample["net_input"]["images"])
        cider = self.datasets[sample["split"]].cider
        rows = sample["id"].tolist()
        log["cider_sum"] = sum(cider.score(row, tokenize(caption)) for row, caption in zip(rows, captions))
        log["captions"] = len(captions)
        return loss, sample_size, log


class ReferencedCaptions(CaptionDataset):
    """A split's images, each once, with its first reference masked as in training, always alike.

    A batch has ``split`` besides what :class:`CaptionDataset` gives, of which the other arguments are.

    Args:
        split: its name.
        references: captions by image id.
        encode: turns a caption into the dictionary's ids, without specials.

    Attributes:
        cider: scores a caption of the image of a row, which batches have as ``id``.

    Raises:
        UserError: if an image has no reference.
    """

    def __init__(
        self,
        index: Index,
        settings: DatasetSettings,
        transform: Transform,
        fraction: float,
        split: str,
        references: Mapping[int, Sequence[str]],
        encode: Callable[[str], list[int]],
    ) -> None:
        super().__init__(index, settings, transform, fraction)
        self.split = split
        images = [int(index["image_id"][row]) for row in self._rows]
        unknown = [image for image in images if image not in references]
        if unknown:
            raise UserError(
                f"{index.files[0]}: {len(unknown)} of {len(images)} images have no reference caption, first image_id "
                f"{unknown[0]}"
            )
        self._texts = [settings.text(np.array(encode(references[image][0]))) for image in images]
        self.sizes = self.sizes + np.array([len(text) for text in self._texts], dtype=np.int32)
        self.cider = CiderD([[tokenize(caption) for caption in references[image]] for image in images])

    def make_sample(self, row: int, rng: np.random.Generator) -> Sample:
        """``image``, ``text`` and ``text_targets``."""
        sample = super().make_sample(row, rng)
        return {**sample, **self.masked(self._texts[row], self._fraction, rng, masks_end=True)}

    def add_targets(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Add the keys."""
        self.add_text_targets(batch, samples)
        batch["split"] = self.split
