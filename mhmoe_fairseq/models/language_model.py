"""The decoder-only language model ``mhmoe_lm``: dense, sparse MoE, X-MoE and MH-MoE by its options."""

from pathlib import Path
from typing import Any

import torch
from fairseq import utils
from fairseq.data import Dictionary
from fairseq.hub_utils import GeneratorHubInterface
from fairseq.models import FairseqIncrementalDecoder, FairseqLanguageModel, register_model
from torch import Tensor, nn

from ..common.errors import UserError
from ..compat import refuse_tpu
from ..data.tensor_files import load_tensors
from ..data.vocabularies import RANKS_FILE, find_vocabulary
from ..moe.parallelism import ExpertParallelism
from ..torchscale_ext.decoder import MHMoEDecoder
from ..torchscale_ext.positions import LearnedPositions, SinusoidalPositions
from ..torchscale_ext.settings import DecoderSettings
from .bases import RemembersVocabulary, spread_experts
from .cross_entropy import Prediction, predict
from .flags import decoder_settings
from .heads import LastTokenHead, TaskHeads
from .options import MODEL_NAME, LanguageModelOptions
from .precision import ComputePrecision, round_linear_maps

CHECKPOINT_NAMES = ("model.pt", "checkpoint_best.pt", "checkpoint_last.pt")


class LanguageModelDecoder(ComputePrecision, RemembersVocabulary, MHMoEDecoder, FairseqIncrementalDecoder):
    """The decoder as fairseq knows it, with ``settings`` made of the options by ``decoder_settings``."""

    args: DecoderSettings
    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    output_projection: nn.Linear

    def __init__(self, options: Any, settings: DecoderSettings, dictionary: Dictionary) -> None:
        embedding = build_embedding(dictionary, settings.decoder_embed_dim)
        positions = build_positions(options, settings.max_target_positions)
        super().__init__(settings, embedding, positions, dictionary=dictionary)
        self.set_precision(options)
        self.remember_vocabulary(dictionary, "embed_tokens.weight")

    def forward(  # type: ignore[override]
        self, prev_output_tokens: Tensor, targets: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """As ``MHMoEDecoder.forward``, in ``--mhmoe-precision``; ``UserError`` in training in fp16 unscaled.

        Args:
            targets: ``(B, S)`` ids, padding where nothing is predicted, whose losses take the place of logits: cross
                entropies in nats, ``(B, S)`` in float32, 0 where padded.
        """
        with self.autocast(prev_output_tokens.device.type):
            if targets is None:
                return super().forward(prev_output_tokens, **kwargs)
            features, extra = super().forward(prev_output_tokens, features_only=True, **kwargs)
            return self.predict(features, targets).losses, extra

    def predict(
        self, features: Tensor, targets: Tensor, with_best: bool = False, has_padding: bool = True
    ) -> Prediction:
        """Losses of targets as ``forward`` gives them, and whether they are best, from features of any positions.

        Args:
            has_padding: False where the padding symbol is a target like any other.
        """
        ignored = self.embed_tokens.padding_idx if has_padding else None
        with self.autocast(features.device.type):
            return predict(features, self.output_projection, targets, ignored, with_best)

    def round_weights(self, dtype: torch.dtype) -> None:
        """As the base, and the output layer's, which is the embedding, in a copy."""
        round_linear_maps(self.layers, dtype)
        weight = self.output_projection.weight
        del self.output_projection.weight
        self.output_projection.register_buffer("weight", weight.data.to(dtype), persistent=False)

    def extract_features(self, prev_output_tokens: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        """``(B, S, D)`` features and the same extras as ``forward``."""
        return self(prev_output_tokens, features_only=True, **kwargs)

    def max_positions(self) -> int:
        """Longest sequence accepted by data loading and generation."""
        return self.args.max_target_positions


@register_model(MODEL_NAME, dataclass=LanguageModelOptions)
class MHMoELanguageModel(FairseqLanguageModel):
    """Decoder-only language model; ``--arch`` names one of ``models.architectures``.

    Attributes:
        takes_targets: ``forward`` gives the losses of ``targets``, computed inside it as wrappers of parameters need.
        classification_heads: of fine-tuning.
    """

    takes_targets = True

    def __init__(self, decoder: LanguageModelDecoder) -> None:
        super().__init__(decoder)
        self.classification_heads = TaskHeads()

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "MHMoELanguageModel":
        """Build from filled options, in training with the experts spread over the processes.

        Raises:
            UserError: naming the flag, its value and the rule.
        """
        if args.decoder_layers is None:
            raise UserError(f"model {MODEL_NAME} needs an architecture, such as mhmoe_lm_tiny: --arch or model._name")
        refuse_tpu(args.tpu)
        if len(task.target_dictionary) != len(task.source_dictionary):
            raise UserError("--output-dictionary-size is not supported: input and output share one dictionary")
        settings = decoder_settings(args, len(task.source_dictionary))
        spread_experts(settings, args, task)
        return cls(LanguageModelDecoder(args, settings, task.source_dictionary))

    def register_classification_head(
        self, name: str, num_classes: int, dropout: float = 0.0, may_be_new: bool = True
    ) -> None:
        """Add a head on the last token of each row; it is saved and loaded with the model.

        Args:
            num_classes, dropout: as in ``LastTokenHead``.
            may_be_new: see ``TaskHeads``.

        Raises:
            UserError: if a number is out of range.
        """
        head = LastTokenHead(self.decoder.embed_dim, num_classes, dropout)
        self.classification_heads.register(name, head, may_be_new)

    def forward(
        self, src_tokens: Tensor, classification_head_name: str | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Logits of the next token everywhere or its losses, or logits of a head's classes.

        Args:
            src_tokens: ``(B, S)``, padded on the right.
            classification_head_name: a registered head.
            **kwargs: of the decoder.

        Returns:
            ``(B, S, vocabulary)``, ``(B, S)`` with ``targets``, or ``(B, classes)`` with a head; and the decoder's
            ``extra``.
        """
        if classification_head_name is None:
            return super().forward(src_tokens, **kwargs)
        features, extra = self.decoder.extract_features(src_tokens, **kwargs)
        padding_mask = src_tokens.eq(self.decoder.embed_tokens.padding_idx)
        return self.classification_heads[classification_head_name](features, padding_mask), extra

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        checkpoint_file: str | None = None,
        data_name_or_path: str | None = None,
        **kwargs: Any,
    ) -> GeneratorHubInterface:
        """Load a trained model with ``score`` and ``sample``.

        Args:
            model_name_or_path: the folder of the checkpoint, or the checkpoint itself.
            checkpoint_file: its name (default: ``model.pt``, ``checkpoint_best.pt`` or ``checkpoint_last.pt``).
            data_name_or_path: the folder with ``dict.txt`` and, if there is one, the vocabulary's file
                (default: the checkpoint's folder if it has a dictionary, else the data it was trained on).
            **kwargs: overrides of the stored configuration, such as ``bpe="sentencepiece"``.

        Raises:
            FileNotFoundError: naming what is missing.
        """
        checkpoint = find_checkpoint(Path(model_name_or_path), checkpoint_file)
        data = find_data(checkpoint, data_name_or_path)
        if "bpe" not in kwargs and (file := find_vocabulary(data)):
            kwargs |= (
                {"bpe": "mhmoe_tiktoken", "mhmoe_tiktoken_ranks": str(file)}
                if file.name == RANKS_FILE
                else {"bpe": "mhmoe_sentencepiece", "sentencepiece_model": str(file)}
            )
        return super().from_pretrained(str(checkpoint.parent.resolve()), checkpoint.name, str(data.resolve()), **kwargs)


def build_language_model(
    options: Any, dictionary: Dictionary, parallel: ExpertParallelism | None = None
) -> MHMoELanguageModel:
    """The model of filled options (see ``architectures.architecture_options``); allocates nothing on ``meta``.

    Example: ``with torch.device("meta"): model = build_language_model(options, dictionary)``.
    """
    settings = decoder_settings(options, len(dictionary), parallel)
    return MHMoELanguageModel(LanguageModelDecoder(options, settings, dictionary))


def build_embedding(dictionary: Dictionary, dim: int) -> nn.Embedding:
    """fairseq's initial embedding: normal with deviation ``dim ** -0.5``, zero for padding."""
    embedding = nn.Embedding(len(dictionary), dim, padding_idx=dictionary.pad())
    nn.init.normal_(embedding.weight, std=dim**-0.5)
    nn.init.zeros_(embedding.weight[dictionary.pad()])
    return embedding


def build_positions(options: Any, max_positions: int) -> nn.Module | None:
    """The positions added to the embedding, or None."""
    if options.no_token_positional_embeddings:
        return None
    kind = LearnedPositions if options.decoder_learned_pos else SinusoidalPositions
    return kind(options.decoder_embed_dim, max_positions)


def find_checkpoint(path: Path, name: str | None) -> Path:
    """The checkpoint that ``path``, a file or a folder, and ``name`` stand for."""
    if path.is_file():
        return path
    names = (name,) if name else CHECKPOINT_NAMES
    for candidate in names:
        if (path / candidate).is_file():
            return path / candidate
    raise FileNotFoundError(f"no {' or '.join(names)} in {path}")


def find_data(checkpoint: Path, given: str | None) -> Path:
    """The folder whose ``dict.txt`` belongs to ``checkpoint``."""
    if given is not None:
        candidates = [Path(given)]
    else:
        stored = load_tensors(checkpoint, mmap=True)["cfg"]["task"]["data"]
        candidates = [checkpoint.parent, *map(Path, utils.split_paths(stored)[:1])]
    for folder in candidates:
        if (folder / "dict.txt").is_file():
            return folder
    raise FileNotFoundError(f"no dict.txt in {' or '.join(map(str, candidates))}: give data_name_or_path")
