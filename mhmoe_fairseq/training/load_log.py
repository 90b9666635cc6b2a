"""How much each head of each layer sends to each expert while a model trains: ``--mhmoe-load-log``.

Hooks add the counts up on the device; they travel to other ranks with what fairseq logs anyway, and come to the host
once in a log interval, where rank 0 writes them to a file and to TensorBoard.
"""

import argparse
import csv
import functools
import io
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fairseq.logging import metrics, progress_bar
from fairseq.models import BaseFairseqModel
from torch import Tensor, nn

from ..common.arguments import output_file
from ..common.errors import UserError
from ..common.files import atomic_path, explain_full_disk, json_line
from ..moe import MHMoELayer
from ..moe.stats import head_loads, load_max_over_mean
from .checks import TrainingFlags

logger = logging.getLogger(__name__)

FLAG = "--mhmoe-load-log"
_KEY = "moe_head_load"  # in a batch's log, (rows, H, E); behind an underscore the meter, which is not shown
_CSV = ("update", "updates", "layer", "pool", "head", "expert", "load")
_SPREAD = {"min": 0.0, "p50": 0.5, "p90": 0.9, "max": 1.0}

Row = tuple[int, str | None]  # a layer, and its pool of experts where images and texts have experts of their own


class LoadLog:
    """The loads of one training; without the flag, or experts, nothing is counted or written.

    Raises:
        UserError: for a name that ends in neither .jsonl nor .csv, or a file of something else.
    """

    def __init__(self, model: BaseFairseqModel, flags: TrainingFlags) -> None:
        self._rows: list[Row] = []
        if not flags.mhmoe_load_log:
            return
        self._path, self._interval = check_load_log(flags.mhmoe_load_log), flags.log_interval
        self._writes = not dist.is_initialized() or dist.get_rank() == 0
        self._tensorboard = _summary_writer(flags.tensorboard_logdir) if self._writes else None
        self._has_begun = False
        layers = [layer for layer in model.modules() if hasattr(layer, "is_moe_layer")]
        for index, layer in enumerate(layers):
            if layer.is_moe_layer:
                self._listen(index, layer.moe_layer)
        if not self._rows:
            logger.warning(f"{FLAG} has no effect: the model has no experts")
            return
        config = next(layer.moe_layer.config for layer in layers if layer.is_moe_layer)  # all layers' one
        self._sums = torch.zeros(len(self._rows), config.subtokens_per_token, config.total_experts, dtype=torch.float64)

    def _listen(self, index: int, experts: nn.Module) -> None:
        pools: list[nn.Module] = [module for module in experts.modules() if isinstance(module, MHMoELayer)]
        for pool, module in zip(getattr(experts, "pools", (None,)), pools or [experts], strict=True):
            count = functools.partial(self._count, len(self._rows))
            is_of_gate = isinstance(module, MHMoELayer) and module.config.num_banks == 1
            (module.get_submodule("gate") if is_of_gate else module).register_forward_hook(count)
            self._rows.append((index, pool))

    def _count(self, row: int, module: nn.Module, inputs: Any, output: Any) -> None:
        # Within a backward pass a layer is only computed once more, for its activations.
        if not module.training or torch._C._current_graph_task_id() != -1:
            return
        self._sums = self._sums.to(inputs[0].device)  # where the model has gone since
        if hasattr(output, "stats"):  # heads with experts of their own; of TorchScale's layer one head
            by_head = output.stats.expert_load.detach().view(len(self._sums[row]), -1)
            self._sums[row] += torch.block_diag(*by_head)
        else:
            self._sums[row] += head_loads(output, *self._sums.shape[1:])

    def add_to(self, outcome: tuple[Tensor, Any, dict[str, Any]]) -> tuple[Tensor, Any, dict[str, Any]]:
        """Return what a batch gave with its loads in the log, and count anew."""
        if not self._rows:
            return outcome
        loads, self._sums = self._sums, torch.zeros_like(self._sums)
        return *outcome[:2], {**outcome[2], _KEY: loads}

    def log(self, logging_outputs: Sequence[dict[str, Any]], update: int) -> None:
        """Log the spread over layers of one update's loads, which are of all ranks; write them at a log interval's end.

        ``update`` is the training's number of updates with this one.
        """
        loads = [log[_KEY] for log in logging_outputs if _KEY in log]
        if not loads:
            return  # a validation, or another model
        metrics.log_scalar(f"_{_KEY}", sum(loads), weight=1)
        for name, share in _SPREAD.items():
            metrics.log_derived(f"layer_load_{name}", functools.partial(_spread, share))
        meter = metrics.get_meter("train_inner", f"_{_KEY}")
        if self._writes and meter is not None and update % self._interval == 0:
            self._write(update, int(meter.count), meter.sum.long().tolist())

    def _write(self, update: int, updates: int, loads: list[list[list[int]]]) -> None:
        with explain_full_disk(self._path):
            if not self._has_begun:
                _keep_before(self._path, update)
                self._has_begun = True
            with open(self._path, "ab") as stream:
                for (layer, pool), load in zip(self._rows, loads, strict=True):
                    stream.write(_lines(self._path, (update, updates, layer, pool), load))
        for (layer, pool), load in zip(self._rows, loads, strict=True):
            name = f"load/layer_{layer}" + (f"_{pool}" if pool else "")
            heads = {f"{name}/head_{head}": counts for head, counts in enumerate(load)} if len(load) > 1 else {}
            for tag, counts in {name: [sum(expert) for expert in zip(*load)], **heads}.items():
                self._draw(tag, counts, update)
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def _draw(self, tag: str, counts: list[int], update: int) -> None:
        """A histogram with a bucket for each expert."""
        if self._tensorboard is None:
            return
        moments = [sum(count * expert**power for expert, count in enumerate(counts)) for power in (0, 1, 2)]
        limits = list(range(1, len(counts) + 1))
        self._tensorboard.add_histogram_raw(tag, 0, len(counts), *moments, limits, counts, global_step=update)


def check_load_log(file: str) -> Path:
    """Return the path of ``--mhmoe-load-log``; ``UserError`` if loads cannot be written there."""
    try:
        path = output_file(file)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{FLAG} {error}") from error
    if path.suffix not in (".jsonl", ".csv"):
        raise UserError(f"{FLAG} ({file}) must end in .jsonl or .csv")
    if path.exists():
        with open(path, "rb") as stream:
            first, header = stream.readline(), _header(path)
        if first and (first != header if header else _update_of(path, first) is None):
            raise UserError(f"{FLAG} ({file}) holds something else than loads: name another file")
    return path


def _keep_before(path: Path, update: int) -> None:
    """Begin the file, or continue it behind a resumed training's last update: later lines, and half ones, go."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    found = [(_update_of(path, line), line) for line in lines if line.endswith(b"\n")]
    with atomic_path(path) as temporary:
        kept = b"".join(line for number, line in found if number is not None and number < update)
        temporary.write_bytes(_header(path) + kept)


def _header(path: Path) -> bytes:
    return (",".join(_CSV) + "\n").encode() if path.suffix == ".csv" else b""


def _lines(path: Path, about: tuple[Any, ...], load: list[list[int]]) -> bytes:
    """What the file says of a row's loads ``(H, E)``: a line of JSON, or one of CSV for each number."""
    if path.suffix == ".jsonl":
        return json_line({**dict(zip(_CSV, about)), "load": load})
    written = io.StringIO()
    table = csv.writer(written, lineterminator="\n")
    for head, counts in enumerate(load):
        table.writerows((*about, head, expert, count) for expert, count in enumerate(counts))
    return written.getvalue().encode()


def _update_of(path: Path, line: bytes) -> int | None:
    try:
        return int(line.split(b",")[0] if path.suffix == ".csv" else json.loads(line)["update"])
    except (ValueError, KeyError, TypeError):
        return None


def _spread(share: float, meters: Any) -> float:
    """A quantile, over rows that anything was routed to, of the largest load over the mean."""
    load = meters[f"_{_KEY}"].sum.sum(1)
    used = load[load.sum(1) > 0]
    return round(float(load_max_over_mean(used).quantile(share)), 3) if len(used) else 0.0


def _summary_writer(folder: str | None) -> Any:
    """One more of fairseq's TensorBoard writers, which it closes; None without ``--tensorboard-logdir`` or package."""
    if not folder or progress_bar.SummaryWriter is None:
        return None
    writers = progress_bar._tensorboard_writers
    if "loads" not in writers:
        # A file's name has the second of its beginning: what is resumed within that second must not begin it anew.
        suffix = f".{os.getpid()}"
        writers["loads"] = progress_bar.SummaryWriter(os.path.join(folder, "loads"), filename_suffix=suffix)
    return writers["loads"]
