"""Language modelling on binarised data, with nothing lost and nothing read unchecked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fairseq import utils
from fairseq.data import FairseqDataset, LMContextWindowDataset, MonolingualDataset
from fairseq.models import BaseFairseqModel
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

from ..common.errors import UserError
from ..data.binarised import check_folder, check_split, domain_splits, line_sizes
from ..data.datasets.batching import WholeBatches, WholeMonolingualDataset, require_fitting_blocks
from ..data.datasets.domains import DomainBlocks, of_one_domain
from ..data.domains import divided_split, domain_names, domain_tokens, domains_of_lines
from ..models.flags import routes_by_domain
from ..training import ParallelTask, TrainingFlags


@dataclass
class MHMoELanguageModelingConfig(TrainingFlags, LanguageModelingConfig):
    """fairseq's own options: shards ``a:b:c``, ``--sample-break-mode complete_doc`` for document boundaries, ..."""


@register_task("mhmoe_language_modeling", dataclass=MHMoELanguageModelingConfig)
class MHMoELanguageModelingTask(ParallelTask, LanguageModelingTask):
    """fairseq's ``language_modeling`` with checks before training and complete batches.

    Data are one folder or several shards ``a:b:c``, one per epoch in turn, each with ``train.{bin,idx}``; the first
    has ``dict.txt`` and the validation and test splits.

    Attributes:
        context_type: the class of a data set whose blocks are each read with some tokens before them.
        domains: what the model's experts are of, in their order; None without ``--mhmoe-routing domain``.
        names_domains: whether batches then tell each token's domain; False where the caller of the model does.
    """

    context_type: type[FairseqDataset] = LMContextWindowDataset
    domains: list[str] | None = None
    names_domains = True

    @classmethod
    def check_args(cls, args: Any) -> None:
        """Refuse flags before anything is loaded, and shards that have other dictionaries than the first.

        Raises:
            FileNotFoundError: if the first shard's folder or its dictionary is missing.
            UserError: naming the flag or file, its value and the rule.
        """
        if args.tokens_per_sample < 1:
            raise UserError(
                f"--tokens-per-sample ({args.tokens_per_sample}) must be at least 1; fairseq-eval-lm takes "
                "--context-window off what is given, so that must be less"
            )
        super().check_args(args)
        if not args.data:
            raise UserError("no data folder given: name one, or several shards as a:b:c")
        first, *others = data_folders(args)
        check_folder(first)
        words = (first / "dict.txt").read_bytes()
        for shard in others:
            if (shard / "dict.txt").is_file() and (shard / "dict.txt").read_bytes() != words:
                raise UserError(f"{shard}/dict.txt differs from {first}/dict.txt: shards share one dictionary")

    def build_model(self, args: Any, from_checkpoint: bool = False) -> BaseFairseqModel:
        """Build the model; for training with experts of domains, see first that there are as many of both."""
        if routes_by_domain(args) and not from_checkpoint:
            self.domains = self.domains_of_data()
            if args.moe_expert_count != len(self.domains):
                raise UserError(
                    f"--moe-expert-count ({args.moe_expert_count}) must be {len(self.domains)} with --mhmoe-routing "
                    f"domain, one for each of the data's domains: {', '.join(self.domains)}"
                )
        return super().build_model(args, from_checkpoint)

    def domains_of_data(self) -> list[str]:
        """Return the domains that the data name; a ``UserError`` if they name none."""
        return domain_names(data_folders(self.args)[0])

    def domain_tokens(self) -> dict[str, int]:
        """Return how many training tokens each domain of the data has, of several shards in the first."""
        folder = data_folders(self.args)[0]
        return domain_tokens(folder, line_sizes(folder / "train"))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint says of the task."""
        return {**super().state_dict(), **({} if self.domains is None else {"domains": self.domains})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the order of the domains from a checkpoint, whatever that of the data."""
        self.domains = state_dict.get("domains")
        super().load_state_dict(state_dict)

    def expert_of_domain(self, name: str) -> int:
        """Return the number of a domain's expert; a ``UserError`` if the model has none."""
        domains = self.domains or []
        if name not in domains:
            raise UserError(f"the model has no expert for domain {name}, only for {', '.join(domains)}")
        return domains.index(name)

    def parts_of(self, split: str) -> dict[str, str]:
        """Return the domains of a split, each with the name of its own split; empty where it has none."""
        return domain_splits(data_folders(self.args)[0], split)

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """Check and load a split; the training split of all shards is checked at once, before training starts.

        Of data that name their documents' domains, ``train_DOMAIN`` is the training documents of one.
        An error names the file that is missing, truncated or of another dictionary.
        """
        folders = data_folders(self.args)
        current = folders[(epoch - 1) % len(folders)]
        whole, domain = divided_split(current, split)
        for folder in folders if whole == "train" else [current]:
            check_split(folder / whole, len(self.dictionary))
        super().load_dataset(whole, epoch=epoch, combine=combine, **kwargs)
        dataset = self.datasets.pop(whole)
        if domain is not None:
            lines = domains_of_lines(current, whole, dataset.dataset.dataset.sizes)
            chosen = lines == domain_names(current).index(domain)
            if not chosen.any():
                raise UserError(f"{split}: no document in {current / whole} is of domain {domain}")
            dataset = of_one_domain(dataset, chosen, self.args.tokens_per_sample, self.args.sample_break_mode)
        self.datasets[split] = self._whole(dataset, split, current)

    def _whole(self, dataset: MonolingualDataset, split: str, folder: Path) -> WholeMonolingualDataset:
        """The same blocks in whole batches, each token with its domain where the model wants it."""
        if self.domains is None or not self.names_domains:
            return WholeMonolingualDataset.of(dataset)
        experts = np.array([self.expert_of_domain(name) for name in domain_names(folder)])
        lines = domains_of_lines(folder, split, dataset.dataset.dataset.sizes)
        return DomainBlocks.labelled(dataset, experts[lines])

    def filter_indices_by_size(
        self,
        indices: np.ndarray,
        dataset: FairseqDataset,
        max_positions: Any = None,
        ignore_invalid_inputs: bool = False,
    ) -> np.ndarray:
        """fairseq's choice of the blocks, where some may be left out; else all, or a ``UserError`` for a long one."""
        is_split = isinstance(dataset, WholeBatches)  # and no prompt
        if is_split and not ignore_invalid_inputs and isinstance(max_positions, (int, float)):
            require_fitting_blocks(dataset.sizes, int(max_positions))
        return super().filter_indices_by_size(indices, dataset, max_positions, ignore_invalid_inputs)

    def eval_lm_dataloader(
        self,
        dataset: MonolingualDataset,
        max_tokens: int | None = 36000,
        batch_size: int | None = None,
        max_positions: int | None = None,
        context_window: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Batches for ``fairseq-eval-lm`` with all of the blocks, or a ``UserError`` that names what does not fit."""
        require_fitting_blocks(dataset.sizes, max_positions, max_tokens, context_window)
        if context_window > 0 and self.domains is not None:
            raise UserError("--context-window: has no meaning with --mhmoe-routing domain, whose blocks name domains")
        if context_window > 0:
            pad = self.source_dictionary.pad()
            dataset = self.context_type(dataset, self.args.tokens_per_sample, context_window, pad)
        return super().eval_lm_dataloader(dataset, max_tokens, batch_size, max_positions, **kwargs)


def data_folders(args: Any) -> list[Path]:
    """Return the shards' folders of ``data``, one at least."""
    return [Path(path) for path in utils.split_paths(args.data)]
