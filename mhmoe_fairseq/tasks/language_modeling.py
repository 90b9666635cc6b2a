"""Language modelling on binarised data, with nothing lost and nothing read unchecked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq import utils
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

from ..compat import refuse_tpu
from ..training import ParallelTask, TrainingFlags
from ._batching import WholeMonolingualDataset
from ._binarised import check_folder, check_split


@dataclass
class MHMoELanguageModelingConfig(TrainingFlags, LanguageModelingConfig):
    """fairseq's own options: shards ``a:b:c``, ``--sample-break-mode complete_doc`` for document boundaries, ..."""


@register_task("mhmoe_language_modeling", dataclass=MHMoELanguageModelingConfig)
class MHMoELanguageModelingTask(ParallelTask, LanguageModelingTask):
    """fairseq's ``language_modeling`` with checks before training and complete batches.

    Data are one folder or several shards ``a:b:c``, one per epoch in turn, each with ``train.{bin,idx}``; the first
    has ``dict.txt`` and the validation and test splits.
    """

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
        folders = data_folders(args)
        check_folder(folders[0])
        words = (folders[0] / "dict.txt").read_bytes()
        for shard in folders[1:]:
            if (shard / "dict.txt").is_file() and (shard / "dict.txt").read_bytes() != words:
                raise ValueError(f"{shard}/dict.txt differs from {folders[0]}/dict.txt: shards share one dictionary")
        return super().setup_task(args, **kwargs)

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """Check and load a split; the training split of all shards is checked at once, before training starts.

        Raises:
            FileNotFoundError, ValueError: naming the file that is missing, truncated or of another dictionary.
        """
        folders = data_folders(self.args)
        current = folders[(epoch - 1) % len(folders)]
        for folder in folders if split == "train" else [current]:
            check_split(folder / split, len(self.dictionary))
        super().load_dataset(split, epoch=epoch, combine=combine, **kwargs)
        self.datasets[split] = WholeMonolingualDataset.of(self.datasets[split])


def data_folders(args: Any) -> list[Path]:
    """The shards' folders of ``data``, one at least."""
    return [Path(path) for path in utils.split_paths(args.data)]
