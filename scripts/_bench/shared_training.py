"""One rank's part of a training, done by fairseq's own trainer."""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.trainer import Trainer

import mhmoe_fairseq  # noqa: F401  (registers models, tasks and criterions)
from mhmoe_fairseq.moe import MHMoELayer
from mhmoe_fairseq.parallel import TrafficCounter

from .team import Sent
from .training import SEED, TrainingSetting, dictionary_folder, synthetic_batches


def connect(rank: int, size: int, threads: int, url: str) -> None:
    """Set threads, and start a gloo process group if there is more than one process."""
    logging.getLogger().setLevel(logging.WARNING)
    os.environ["MHMOE_WATCH_SECONDS"] = "0"  # the controller watches
    torch.set_num_threads(threads)
    if size > 1:
        dist.init_process_group("gloo", init_method=url, rank=rank, world_size=size)


class SharedTraining:
    """A model in training with ``Trainer.train_step``: forward, backward, sums over ranks, clipping, Adam, logs.

    Args:
        name: the model.
        setting: its batch is the whole update's; rank r of W takes sentences r, r + W, r + 2W, ...
    """

    def __init__(self, name: str, setting: TrainingSetting) -> None:
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        torch.manual_seed(SEED)
        with tempfile.TemporaryDirectory() as folder:
            argv = [str(dictionary_folder(Path(folder), setting.vocab_size)), *shared_flags(name, setting, self.size)]
            args = options.parse_args_and_arch(options.get_training_parser(), input_args=argv)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # fairseq composes with hydra's older calls
                config = convert_namespace_to_omegaconf(args)
            config.distributed_training.distributed_rank = self.rank
            task = tasks.setup_task(config.task)
        model = task.build_model(config.model)
        self.trainer = Trainer(config, task, model, task.build_criterion(config.criterion))
        self._batches = synthetic_batches(task.dictionary, setting)
        self._layers = [module for module in model.modules() if isinstance(module, MHMoELayer)]

    def update(self) -> float:
        """One update; the mean cross entropy over all ranks, in bits."""
        for layer in self._layers:
            if layer.parallel is not None:
                layer.parallel.counter = TrafficCounter()
        with metrics.aggregate(new_root=True):
            return float(self.trainer.train_step([self._own(next(self._batches))])["loss"])

    def sent(self) -> Sent:
        """What this rank sent in the latest update."""
        experts = {id(layer.parallel): layer.parallel for layer in self._layers if layer.parallel is not None}
        counters = [parallel.counter for parallel in experts.values()]
        rows, calls = sum(counter.rows for counter in counters), sum(counter.calls for counter in counters)
        sent = sum(counter.bytes for counter in counters)
        return Sent(rows, calls, sent, sum(counter.count_bytes for counter in counters))

    def profile(self) -> dict[str, float]:
        """One update's seconds by what this rank did; waiting for the others counts where it waits."""
        seconds: dict[str, float] = {}
        optimizer = self.trainer.optimizer
        parts: dict[str, tuple[object, str]] = {
            "forward and backward": (self.trainer.task, "train_step"),
            "sum of gradients": (optimizer, "all_reduce_grads"),
            "norm and clipping": (optimizer, "clip_grad_norm"),
            "Adam": (optimizer, "step"),
            "of forward and backward: all-to-all": (dist, "all_to_all_single"),
        }
        started = time.perf_counter()
        with _timed(parts, seconds):
            self.update()
        seconds["whole update"] = time.perf_counter() - started
        return seconds

    def shape(self) -> dict:
        """Numbers for the report and for the plan."""
        moe = self._layers[0].config if self._layers else None
        parallel = self._layers[0].parallel if self._layers else None
        return {
            "params": sum(parameter.numel() for parameter in self.trainer.model.parameters()),
            "layers": len(self._layers),
            "moe": moe,
            "expert_parallel_size": 1 if parallel is None else parallel.size,
        }

    def _own(self, batch: dict) -> dict:
        mine = slice(self.rank, None, self.size)
        source = batch["net_input"]
        own = {key: value[mine].contiguous() for key, value in source.items()}
        ntokens, nsentences = own["src_tokens"].numel(), own["src_tokens"].size(0)
        target = batch["target"][mine].contiguous()
        return {"net_input": own, "target": target, "ntokens": ntokens, "nsentences": nsentences}


def shared_flags(name: str, setting: TrainingSetting, size: int) -> list[str]:
    """The flags one would give to ``fairseq-train`` on ``size`` ranks, without the data folder."""
    together = ["--ddp-backend", "legacy_ddp", "--distributed-backend", "gloo"] if size > 1 else []
    return [
        *setting.common_flags(),
        *setting.flags(name),
        *("--optimizer", "mhmoe_adam", "--lr-scheduler", "fixed", "--dropout", "0"),
        *("--distributed-world-size", str(size), "--distributed-no-spawn", *together),
    ]


@contextmanager
def _timed(parts: dict[str, tuple[object, str]], seconds: dict[str, float]) -> Iterator[None]:
    """Add up the time that some functions take."""
    stock = {label: getattr(owner, name) for label, (owner, name) in parts.items()}

    def timed(label: str, function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - started

        return call

    for label, (owner, name) in parts.items():
        setattr(owner, name, timed(label, stock[label]))
    try:
        yield
    finally:
        for label, (owner, name) in parts.items():
            setattr(owner, name, stock[label])
