"""Language modelling on binarised data, with nothing lost and nothing read unchecked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq import utils
from fairseq.data import FairseqDataset
from fairseq.models import BaseFairseqModel
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

from ..compat import refuse_tpu
from ..training import GuardedTask, ResumableEpochBatchIterator, TrainingFlags, prepare_sharded_model
from ._batching import WholeMonolingualDataset
from ._binarised import check_folder, check_split


@dataclass
class MHMoELanguageModelingConfig(TrainingFlags, LanguageModelingConfig):
    """fairseq's own options: shards ``a:b:c``, ``--sample-break-mode complete_doc`` for document boundaries, ..."""


@register_task("mhmoe_language_modeling", dataclass=MHMoELanguageModelingConfig)
class MHMoELanguageModelingTask(GuardedTask, LanguageModelingTask):
    """fairseq's ``language_modeling`` with checks before training and complete batches.

    Data are one folder or several shards ``a:b:c``, one per epoch in turn, each with ``train.{bin,idx}``; the first
    has ``dict.txt`` and the validation and test splits.

    Attributes:
        spreads_experts: whether the model that is being built shares its experts out over the ranks: in training only.
    """

    spreads_experts = False

    @classmethod
    def setup_task(cls, args: Any, **kwargs: Any) -> MHMoELanguageModelingTask:
        """Load the dictionary.

        Raises:
            FileNotFoundError: if the data folder or its dictionary is missing.
            ValueError: if no data are given, shards disagree on the dictionary, or a TPU is asked for.
        """
        refuse_tpu(args.tpu)
        if not args.data:
            raise ValueError("no data folder given: name one, or several shards as a:b:c")
        folders = _folders(args)
        check_folder(folders[0])
        words = (folders[0] / "dict.txt").read_bytes()
        for shard in folders[1:]:
            if (shard / "dict.txt").is_file() and (shard / "dict.txt").read_bytes() != words:
                raise ValueError(f"{shard}/dict.txt differs from {folders[0]}/dict.txt: shards share one dictionary")
        return super().setup_task(args, **kwargs)

    def build_model(self, args: Any, from_checkpoint: bool = False) -> BaseFairseqModel:
        """Build the model: for training with its experts shared out over the ranks, from a checkpoint with all.

        Raises:
            ValueError: naming the flag, its value and the rule.
        """
        self.spreads_experts = not from_checkpoint
        model = super().build_model(args, from_checkpoint)
        prepare_sharded_model(model, self.args)
        return model

    def get_batch_iterator(self, dataset: FairseqDataset, *args: Any, epoch: int = 1, **kwargs: Any) -> Any:
        """fairseq's ``EpochBatchIterator``, resumable in any epoch and on any number of ranks.

        fairseq-fixed 0.12.3.1 forms the batches by the epoch in which the iterator is made, and a run that goes on for
        several epochs keeps those of its first. A resumed run must not form others.
        """
        iterator = super().get_batch_iterator(dataset, *args, epoch=1, **kwargs)
        if not isinstance(iterator, ResumableEpochBatchIterator):  # else it has served an epoch before
            dataset.set_epoch(epoch)
            iterator.epoch = max(epoch, 1)
        return ResumableEpochBatchIterator.of(iterator)

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """Check and load a split; the training split of all shards is checked at once, before training starts.

        Raises:
            FileNotFoundError, ValueError: naming the file that is missing, truncated or of another dictionary.
        """
        folders = _folders(self.args)
        current = folders[(epoch - 1) % len(folders)]
        for folder in folders if split == "train" else [current]:
            check_split(folder / split, len(self.dictionary))
        super().load_dataset(split, epoch=epoch, combine=combine, **kwargs)
        self.datasets[split] = WholeMonolingualDataset.of(self.datasets[split])


def _folders(args: Any) -> list[Path]:
    return [Path(path) for path in utils.split_paths(args.data)]
