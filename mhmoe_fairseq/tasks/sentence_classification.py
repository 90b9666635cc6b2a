"""Fine-tuning a language model to classify sentences and pairs of sentences, in several languages."""

import logging
from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from pathlib import Path
from typing import Any, Optional

import numpy as np
from fairseq.data import ConcatDataset, Dictionary, FairseqDataset, data_utils
from fairseq.models import BaseFairseqModel
from fairseq.tasks import LegacyFairseqTask, register_task
from omegaconf import MISSING

from ..common.errors import UserError
from ..data.binarised import check_split
from ..data.datasets.sentence_pairs import LabelledSentences
from ..data.languages import language_symbol
from ..data.vocabularies import NUM_SPECIALS
from ..training import ParallelTask, TrainingFlags
from .base import check_starting_checkpoint
from .finetuning import NamesClasses

logger = logging.getLogger(__name__)

HEAD_NAME = "sentence_classification_head"
FIRST, SECOND, LABELS = "input0", "input1", "label"  # fairseq's names of the folders


@dataclass
class SentenceClassificationTaskConfig(TrainingFlags):
    """Flags of the task."""

    data: str = field(
        default=MISSING,
        metadata={"help": "folder with dict.txt, input0/, label/ and, for pairs, input1/: see mhmoe prepare"},
    )
    num_classes: Optional[int] = field(
        default=None, metadata={"help": "number of classes (default: as many as label/dict.txt has)"}
    )
    classification_head_name: str = field(
        default=HEAD_NAME, metadata={"help": "the head's name in the model and in checkpoints"}
    )
    mhmoe_head_dropout: float = field(
        default=0.1, metadata={"help": "dropout on the features that the classification head reads"}
    )
    tokens_per_sample: int = field(
        default=512,
        metadata={"help": "longest input in tokens, all counted; of a longer one the longer sentence loses its end"},
    )
    max_target_positions: Optional[int] = field(
        default=None,
        metadata={"help": "positions of the model: of learned ones as many as in pre-training (default: as above)"},
    )
    mhmoe_language_token: bool = field(
        default=False,
        metadata={"help": "start an input of train_de, valid_de, ... with __de__ in place of </s>, as in pre-training"},
    )


@register_task("mhmoe_sentence_classification", dataclass=SentenceClassificationTaskConfig)
class SentenceClassificationTask(NamesClasses, ParallelTask, LegacyFairseqTask):
    """Classification of sentences or pairs, with a head on the last token of a causal language model.

    The data have the layout of fairseq's ``sentence_prediction``: ``input0/``, ``input1/`` for pairs, ``label/``, each
    with ``SPLIT.{bin,idx}``, and ``dict.txt`` (or ``input0/dict.txt``) and ``label/dict.txt``. A split of that name,
    such as ``valid_de``, is one file; ``valid`` is the file of that name or else all of ``valid_*`` together.

    ``--finetune-from-model`` starts from a language model's checkpoint, to which the head is new.
    """

    classes: list[str]

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        name, folder = args.classification_head_name, Path(args.data)
        if not name or "." in name:  # it becomes a part of the weights' names
            raise UserError(f"--classification-head-name ({name}) must be a name without a dot")
        if not folder.is_dir():
            raise FileNotFoundError(f"data folder {folder} does not exist")
        self.dictionary = Dictionary.load(str(_first_of(folder / "dict.txt", folder / FIRST / "dict.txt")))
        self.classes_source = _first_of(folder / LABELS / "dict.txt")
        labels = Dictionary.load(str(self.classes_source))
        self.classes = [name for name in labels.symbols[labels.nspecial :] if not name.startswith("madeupword")]
        if len(self.classes) < 2:
            raise UserError(f"{self.classes_source} has {len(self.classes)} classes, and there must be at least two")
        if args.num_classes not in (None, len(self.classes)):
            raise UserError(
                f"--num-classes ({args.num_classes}): {self.classes_source} has {len(self.classes)} classes"
            )

    def build_model(self, args: Any, from_checkpoint: bool = False) -> BaseFairseqModel:
        """Build the model with its head; for training, check the checkpoint that it will start from.

        A ``UserError`` names a model that is none of ours, a bad flag, or a checkpoint that does not fit.
        """
        model = super().build_model(args, from_checkpoint)
        if not hasattr(model, "register_classification_head"):
            raise UserError(
                "--arch: mhmoe_sentence_classification needs a language model of ours, such as mhmoe_lm_tiny"
            )
        name, dropout = self.args.classification_head_name, self.args.mhmoe_head_dropout
        model.register_classification_head(name, len(self.classes), dropout=dropout, may_be_new=not from_checkpoint)
        if not from_checkpoint:
            check_starting_checkpoint(model, self.args)
        return model

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """Check and load a split; see ``read_split``."""
        dataset = self.read_split(split)
        if dataset.num_cut:
            logger.info(f"{split}: {dataset.num_cut} of {len(dataset)} inputs are cut to {self.max_positions()} tokens")
        self.datasets[split] = dataset

    def read_split(self, split: str) -> LabelledSentences:
        """Return the examples of a split; an error names the file that is missing, broken or of another dictionary."""
        parts = {part: self._read(part) for part in self._parts(split)}
        columns = zip(*(sentences for sentences, _ in parts.values()))
        return LabelledSentences(
            [ConcatDataset(column) for column in columns],
            np.concatenate([classes for _, classes in parts.values()]),
            np.concatenate([np.full(len(classes), self.first_token(part)) for part, (_, classes) in parts.items()]),
            longest=self.max_positions(),
            pad=self.dictionary.pad(),
            seed=self.args.seed if split.partition("_")[0] == "train" else None,
        )

    def sentence_folders(self) -> list[str]:
        """Return ``input0``, and ``input1`` if the data are pairs."""
        return [FIRST, SECOND] if any(Path(self.args.data, SECOND).glob("*.idx")) else [FIRST]

    def build_dataset_for_inference(self, *args: Any, **kwargs: Any) -> FairseqDataset:
        """Refuse prompts: what a fine-tuned model would write after them means nothing."""
        raise UserError("the model was fine-tuned to classify: continue text with the language model that it came from")

    def first_token(self, split: str) -> int:
        """Return the first token of every input: ``</s>``, as in pre-training's lines, or a language's symbol.

        With ``--mhmoe-language-token`` a ``UserError`` says that the split is not called such as ``valid_de``, or that
        the dictionary has no symbol for the language.
        """
        if not self.args.mhmoe_language_token:
            return self.dictionary.eos()
        code = split.partition("_")[2] or "xx"
        symbol = language_symbol(code)
        if symbol not in self.dictionary:
            raise UserError(
                f"--mhmoe-language-token: split {split} must be called {split.partition('_')[0]}_LANGUAGE, and the "
                f"dictionary have the language's symbol, such as {symbol}"
            )
        return self.dictionary.index(symbol)

    def max_positions(self) -> int:
        """Return the most tokens of an input; longer ones are cut."""
        return min(self.args.tokens_per_sample, self.args.max_target_positions or self.args.tokens_per_sample)

    # fairseq's names; the classes are ``classes``.
    source_dictionary = target_dictionary = property(lambda self: self.dictionary)

    def _parts(self, split: str) -> list[str]:
        """``[split]``, or the splits that it stands for: ``valid`` for ``valid_de`` and ``valid_en``."""
        folder = Path(self.args.data, FIRST)
        if (folder / f"{split}.idx").is_file():
            return [split]
        return sorted(file.stem for file in folder.glob(f"{split}_*.idx")) or [split]

    def _read(self, part: str) -> tuple[list[Any], np.ndarray]:
        """Data sets of the sentences and ``(examples,)`` classes of a split, its files complete and equally long."""
        folder, read = Path(self.args.data), {}
        sizes = dict.fromkeys(self.sentence_folders(), len(self.dictionary))
        for name, size in {**sizes, LABELS: NUM_SPECIALS + len(self.classes)}.items():
            check_split(folder / name / part, size)
            read[name] = data_utils.load_indexed_dataset(str(folder / name / part), self.dictionary)
        if len({len(rows) for rows in read.values()}) > 1:
            listed = ", ".join(f"{name} {len(rows):,}" for name, rows in read.items())
            raise UserError(f"{folder}: {part} has different numbers of examples ({listed})")
        classes = np.array([int(item[0]) for item in read.pop(LABELS)]) - NUM_SPECIALS
        wrong = np.flatnonzero(classes < 0)
        if len(wrong):
            raise UserError(f"{folder / LABELS / part}.bin: example {wrong[0] + 1:,} has no class of label/dict.txt")
        return list(read.values()), classes


def _first_of(*files: Path) -> Path:
    for file in files:
        if file.is_file():
            return file
    raise FileNotFoundError(f"{files[0]} is missing: make the data with mhmoe prepare classification")
