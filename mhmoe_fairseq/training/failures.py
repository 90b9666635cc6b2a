"""Processes that should not train, and ranks that fail.

Processes that nobody connected, or whose folder another training writes to, are stopped before the first update. One
rank's failure ends all of them, soon and with the reason:

======================================  ==============================================================
What happens to a rank                  How the others end
======================================  ==============================================================
It is killed, or raises                 gloo's connections break; the message below names the rank and
                                        its error. Under torchrun its agent ends them, and tells why.
It is frozen, its machine is gone,      :mod:`.watch` notices after ``MHMOE_WATCH_SECONDS`` (60) and ends
or NCCL does not notice                 a rank that has not ended by itself after half of that again.
It runs, but waits in another           a transfer fails after ``MHMOE_TRANSFER_SECONDS`` (600).
exchange than the others
It has too little GPU memory            it fails; fairseq would skip its batch and go on, while the
                                        others wait for its part (:func:`no_lone_recovery`).
======================================  ==============================================================
"""

import contextlib
import datetime
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..common.errors import UserError
from ..common.files import refuse_path_separator
from ..common.locks import hold_folder
from .checks import TrainingFlags
from .watch import Watch, start_watch

logger = logging.getLogger(__name__)

WATCH_VARIABLE, TRANSFER_VARIABLE = "MHMOE_WATCH_SECONDS", "MHMOE_TRANSFER_SECONDS"
# What torch says when the process at the other end is the one to blame.
_BROKEN_CONNECTION = re.compile(r"by peer|Broken pipe|[Tt]imed? ?out|ncclRemoteError|Connection refused")

# What tells how many processes were started, who sets it, and what makes fairseq connect them. torch reads the rank
# from torchrun's environment where fairseq names -1.
_LAUNCHERS = {
    "WORLD_SIZE": (
        "torchrun",
        "distributed_training.distributed_world_size={n} distributed_training.distributed_rank=-1 "
        "distributed_training.distributed_init_method=env:// distributed_training.distributed_no_spawn=true "
        "to fairseq-hydra-train, or --distributed-world-size {n} --distributed-rank -1 "
        "--distributed-init-method env:// --distributed-no-spawn to fairseq-train",
    ),
    "SLURM_STEP_NUM_TASKS": ("srun", "--distributed-world-size {n} --distributed-port PORT to fairseq-train"),
}


def require_process_group() -> None:
    """Stop if this process is one of several that fairseq did not connect; to be called before a model is trained.

    Each would train on all the data and overwrite the others' checkpoints, without a word. It happens where fairseq
    does not read the launcher's environment: under ``srun`` without the flags that the message names, and under
    ``torchrun`` with ``fairseq-hydra-train``, which loads this package after it has looked, when
    ``compat.follow_launchers`` comes too late.

    Raises:
        UserError: with the flags that connect the processes.
    """
    if dist.is_available() and dist.is_initialized():
        return
    for variable, (launcher, flags) in _LAUNCHERS.items():
        started = os.environ.get(variable, "1")
        if started.isdecimal() and int(started) > 1:
            raise UserError(
                f"{variable} ({started}): {launcher} started {started} processes, but fairseq has not connected them, "
                "so each would train alone and overwrite the others' checkpoints. "
                f"Add {flags.format(n=started)}. If each is meant to train alone, with a --save-dir of its own, "
                f"unset {variable}"
            )


def hold_save_dir(flags: TrainingFlags) -> None:
    """Keep other trainings out of the checkpoints' folder while this one runs; to be called before a model is trained.

    Two runs would mix their checkpoints without a word, until one fails over a file that the other has renamed. fairseq
    has made the folder by now; where there is none, nothing is trained.

    Raises:
        UserError: if no command could open the checkpoints there, or another training, of this machine or of one that
            shares its files, saves there.
    """
    folder = Path(flags.save_dir)
    if flags.no_save:
        return
    refuse_path_separator(folder, "--save-dir")
    if folder.is_dir() and (not dist.is_initialized() or dist.get_rank() == 0):
        hold_folder(folder, "--save-dir")


def guard_ranks(groups: Iterable[dist.ProcessGroup]) -> None:
    """Bound every wait of this rank for another; does nothing in one process.

    Args:
        groups: the process groups of the training besides the default one.
    """
    limit, transfer = seconds(WATCH_VARIABLE, 60), seconds(TRANSFER_VARIABLE, 600)
    if transfer == 0:
        raise UserError(f"{TRANSFER_VARIABLE} (0) must be more than 0")
    if not dist.is_initialized():
        return
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout  # torch before 2.14
    for group in (dist.group.WORLD, *groups):
        set_timeout(datetime.timedelta(seconds=transfer), group)
    watch = start_watch(limit)
    if watch is not None:
        tell_the_others(watch)


def seconds(variable: str, default: float) -> float:
    """Return an environment variable's value, a number of seconds; a ``UserError`` says that it is none."""
    text = os.environ.get(variable, str(default))
    if not re.fullmatch(r"\d+(\.\d*)?", text):
        raise UserError(f"{variable} ({text}) must be a number of seconds, 0 or more")
    return float(text)


def tell_the_others(watch: Watch) -> None:
    """Let an error that ends this process end the others too, and say here which rank broke a connection."""
    stock = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            stock(kind, error, trace)  # may end this process with a status of its own
        finally:
            # A board that cannot be reached has nothing to add to the error.
            with contextlib.suppress(RuntimeError):
                explain(watch, error)

    sys.excepthook = hook


def explain(watch: Watch, error: BaseException) -> None:
    """Write the error on the board, or, if another rank has caused it, log which and why."""
    board = watch.board
    if not _BROKEN_CONNECTION.search(str(error)):
        board.fail(f"{board.who(board.rank)} failed: {type(error).__name__}: {error}")
        return
    logger.error(f"rank {board.rank} lost the connection to another rank: {_culprit(watch) or 'its output says why'}")


def _culprit(watch: Watch) -> str:
    """Who broke the connection: one that has said so itself, or one that gives no more signs of life."""
    board = watch.board
    others = [rank for rank in range(board.size) if rank != board.rank] if board.rank == 0 else [0]
    signs = {rank: board.sign_of(rank) for rank in others}
    # Two signs' time; the other ranks also wait for what rank 0 finds.
    deadline = time.monotonic() + watch.limit / (10 if board.rank == 0 else 6)
    while not board.failure() and time.monotonic() < deadline:
        time.sleep(0.1)
    silent = [rank for rank, sign in signs.items() if board.sign_of(rank) == sign]
    if silent:
        board.fail(f"{board.who(silent[0])} was killed, or its machine is gone")
    return board.failure()


@contextlib.contextmanager
def no_lone_recovery(spreads_experts: bool) -> Iterator[None]:
    """Make a GPU that runs out of memory an error that ends the training, where experts are spread over ranks.

    fairseq drops the batch on this rank and goes on, while the others wait in the middle of theirs for its experts.

    Raises:
        RuntimeError: in place of the error, without the words by which fairseq knows it.
    """
    try:
        yield
    except RuntimeError as error:
        if spreads_experts and "out of memory" in str(error):
            raise RuntimeError(
                f"rank {dist.get_rank()} has too little GPU memory for this batch, and the others wait for its "
                "experts: lower --batch-size or --max-tokens and raise --update-freq"
            ) from error
        raise
