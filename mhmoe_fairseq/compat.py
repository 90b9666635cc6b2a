"""What stock fairseq 0.12 needs to run on current NumPy, PyTorch and Python, and every patch that we make at run time.

``apply()`` runs once when the package registers with fairseq, before any model is registered. Each repair has a
test in ``tests/test_compat.py`` that also shows the unrepaired failure, so that it is noticed when a
release makes the repair needless.

========================================  ==========================================================
Breakage of the stock package             What happens here
========================================  ==========================================================
``np.compat.long`` is gone from NumPy 2;  :func:`restore_numpy_compat` puts it back. (``np.int`` is
``--sample-break-mode eos`` and           gone too, but only fairseq's speech masking uses it.)
``fairseq-interactive`` use it.
A distributed resume unpickles the        :func:`checkpoint_globals` names the harmless classes
checkpoint with ``weights_only=True``     of that payload; ``weights_only`` itself stays on.
and stops at omegaconf's classes.
``--bf16`` on fairseq's command line      :func:`refuse_tpu` is called before processes are connected and
means "train on a TPU", on a GPU too.     any data is read, and names ``--mhmoe-precision bf16`` instead.
``--cpu`` on a machine with a GPU: the    :func:`measure_gradients_where_they_are` puts a function in the
norm of gradients is on the GPU, and      place of apex's where that is not installed. On a GPU it takes one
clipping by it an error.                  kernel for many tensors where fairseq takes one for each.
``--user-dir mhmoe_fairseq`` (the         :func:`accept_installed_user_dir` adds the spelling that
installed package, by name) is refused    fairseq builds for it to the package's ``__path__``.
when the package is already imported.
fairseq-fixed does not see torchrun       :func:`follow_launchers` reads torchrun's environment where
without a GPU, or with one GPU on each    fairseq does not, and only there.
node: every process trains alone, all
into one folder. Told the world size, it
divides by the number of GPUs, zero.
SLURM without a GPU: fairseq-fixed        :func:`read_slurm` lets fairseq read SLURM's environment and
selects a CUDA device; one task on each   stops before the CUDA part; the one-task case is refused with
node makes a world of no processes.       what to write in its place.
fairscale 0.4.0 and ``torch.jit.script``  :func:`silence_import_warnings` hides just these messages.
warn on import, once for each process.
A checkpoint that holds an object ends    :func:`explain_refused_checkpoints` names file and object,
in PyTorch's advice to unpickle it.       and takes the ``module.`` off names that DistributedDataParallel
                                          gave.
Importing fairseq's models configures     :func:`logging_as_found` stands around the package's imports
logging: a handler, and level DEBUG.      and puts the root logger back.
``--store-ema`` multiplies integers of a   :func:`copy_integers_into_averages` takes them as they are, and tied
model's state by the decay: an error at   tensors once.
the first update. Tied ones twice.
========================================  ==========================================================

Other patches at run time, which live beside what they serve:

========================================  ==========================================================
``training/saving.py``                    ``PathManager.copy`` and ``torch_persistent_save``: fairseq
                                          copies a checkpoint over the old one byte by byte.
``training/failures.py`` and              ``sys.excepthook``: the rank that failed tells the others; a
``commands/main.py``                      refusal of ours in a fairseq command is one line.
``training/optimizer.py``                 ``__name__`` of our Adam is fairseq's, as checkpoints have it.
``training/batches.py`` and               ``__class__`` of fairseq's batch iterator and dataset: it drops
``data/datasets/batching.py``             the last batch unless ``--required-batch-size-multiple 1``, and
                                          forms other batches when a run resumes in a later epoch.
``torchscale_ext/static_xmoe.py``         ``torch.histc`` takes integers while TorchScale's layer runs.
``commands/zero_shot.py``                 ``sys.argv`` while lm-eval's own command line runs.
========================================  ==========================================================
"""

import collections.abc
import contextlib
import functools
import logging
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from .common.errors import UserError
from .data.tensor_files import unreadable, without_wrapper

TORCHRUN_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")


def apply() -> None:
    """Install every repair; calling it again changes nothing."""
    silence_import_warnings()
    restore_numpy_compat()
    torch.serialization.add_safe_globals(checkpoint_globals())
    accept_installed_user_dir()
    follow_launchers()
    explain_refused_checkpoints()
    copy_integers_into_averages()
    measure_gradients_where_they_are()


@contextlib.contextmanager
def logging_as_found() -> Iterator[None]:
    """A context that leaves the root logger with the level and the handlers that it had.

    Some modules of fairseq (``models.wav2vec.wav2vec2_classification``, ``fairseq_cli.eval_lm``) call
    ``logging.basicConfig`` when they are imported: every message of every library would go to the terminal, and the
    program's own ``basicConfig`` would come too late.
    """
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def restore_numpy_compat() -> None:
    """Give NumPy 2 the name ``np.compat.long`` back, if it has none of its own."""
    if not hasattr(np, "compat"):
        np.compat = SimpleNamespace(long=np.int64)  # type: ignore[attr-defined]


def checkpoint_globals() -> list[Any]:
    """Return the classes in the checkpoint that rank 0 broadcasts on resume: containers, no code.

    The saved file itself holds plain containers only; fairseq turns its configuration into omegaconf
    objects before it sends them to the other ranks.
    """
    from fairseq.distributed.utils import _TensorPlaceholder
    from omegaconf import AnyNode, DictConfig, ListConfig
    from omegaconf.base import ContainerMetadata, Metadata

    plain = [Any, dict, list, int, collections.defaultdict, _TensorPlaceholder]
    return [DictConfig, ListConfig, ContainerMetadata, Metadata, AnyNode, *plain]


def replaces(owner: Any, name: str) -> Callable[[Callable[..., Any]], None]:
    """Decorator: the function, which gets the stock one before its arguments, takes that one's place, once."""

    def install(ours: Callable[..., Any]) -> None:
        stock = getattr(owner, name)
        if not hasattr(stock, "__wrapped__"):  # else it is ours already
            setattr(owner, name, functools.wraps(stock)(lambda *args, **kwargs: ours(stock, *args, **kwargs)))

    return install


def copy_integers_into_averages() -> None:
    """Let fairseq's moving average take counters and fingerprints from the model, and average tied tensors once."""
    from fairseq.models.ema import EMA

    @replaces(EMA, "__init__")
    def remember_integers(stock: Any, self: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        stock(self, model, *args, **kwargs)
        state = model.state_dict().items()
        self.skip_keys = {*self.skip_keys, *(name for name, value in state if not value.is_floating_point())}

    @replaces(EMA, "_step_internal")
    def step_once(stock: Any, self: Any, new_model: torch.nn.Module, updates: int | None = None) -> None:
        # A tensor with two names, as a tied embedding has, is averaged under its first: fairseq would do it twice.
        names = {value.data_ptr(): name for name, value in reversed(self.model.state_dict().items())}
        firsts = {name: value for name, value in new_model.state_dict().items() if name in names.values()}
        stock(self, SimpleNamespace(state_dict=lambda: firsts), updates)


def measure_gradients_where_they_are() -> None:
    """Let fairseq's clipping take the norm on the gradients' own devices, by the way that it has for apex."""
    from fairseq import utils

    if not utils.multi_tensor_l2norm_available:
        utils.multi_tensor_l2norm_available, utils.multi_tensor_total_norm = True, norm_of_all


def norm_of_all(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The norm of all gradients together, in float32 on the first one's device."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for gradient in gradients:
        by_device.setdefault(gradient.device, []).append(gradient)
    first = gradients[0].device
    norms = [norm.to(first) for alike in by_device.values() for norm in torch._foreach_norm(alike, dtype=torch.float32)]
    return torch.linalg.vector_norm(torch.stack(norms))


def explain_refused_checkpoints() -> None:
    """Make the errors of fairseq's loading those of ``data.tensor_files``, and its names those of the model.

    fairseq-train, fairseq-eval-lm and ``from_pretrained`` all open checkpoints with ``load_checkpoint_to_cpu``.
    """
    from fairseq import checkpoint_utils

    @replaces(checkpoint_utils, "load_checkpoint_to_cpu")
    def load(stock: Any, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            state = stock(path, *args, **kwargs)
        except pickle.UnpicklingError as error:
            raise unreadable(path, error) from None
        if isinstance(state.get("model"), collections.abc.Mapping):
            state["model"] = without_wrapper(state["model"])
        return state


def accept_installed_user_dir() -> None:
    """Make ``--user-dir mhmoe_fairseq`` work after ``import mhmoe_fairseq``, when pip installed the package.

    For a name that is no path from here fairseq tries ``.../site-packages/fairseq/../mhmoe_fairseq`` and
    accepts an imported package only if its ``__path__`` holds that very string.
    """
    import fairseq

    package = sys.modules[__package__]
    beside_fairseq = os.path.join(os.path.dirname(fairseq.__file__), "..", package.__name__)
    is_ours = os.path.isdir(beside_fairseq) and os.path.samefile(beside_fairseq, os.path.dirname(__file__))
    if is_ours and beside_fairseq not in package.__path__:
        package.__path__.append(beside_fairseq)


def follow_launchers() -> None:
    """Let ``call_main`` find torchrun's and SLURM's environment where fairseq misses it, then look itself."""
    from fairseq.distributed import utils

    @replaces(utils, "infer_init_method")
    def infer(stock: Any, config: Any, force_distributed: bool = False) -> None:
        refuse_tpu(config.tpu)
        read_torchrun(config)
        read_slurm(config)
        stock(config, force_distributed)


def read_torchrun(config: Any) -> None:
    """Fill in world size, rank and init method from torchrun's environment where fairseq-fixed would miss them.

    It looks only if ``--distributed-world-size`` is more than 1, whose default is the number of this node's GPUs (at
    least 1), and takes the rank modulo that number. With two GPUs or more it finds everything itself.

    ``config``, fairseq's ``distributed_training``, is left as it is if it names an init method.
    """
    started_by_torchrun = all(name in os.environ for name in TORCHRUN_VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1
    if not started_by_torchrun or config.distributed_init_method is not None or config.tpu:
        return
    if config.pipeline_model_parallel or (config.distributed_world_size > 1 and torch.cuda.device_count() > 0):
        return
    config.distributed_init_method = "env://"
    config.distributed_world_size = int(os.environ["WORLD_SIZE"])
    config.distributed_rank = int(os.environ["RANK"])
    config.device_id = int(os.environ.get("LOCAL_RANK", 0))
    config.distributed_no_spawn = True  # torchrun has started the processes


def read_slurm(config: Any) -> None:
    """Without a GPU, read SLURM's environment with fairseq's own function, but without its CUDA calls after it.

    As in fairseq, SLURM is looked at if ``--distributed-world-size`` and ``--distributed-port`` are given and nothing
    else connects the processes.

    Raises:
        UserError: if there is one task on each node, of which fairseq makes one process for each GPU.
    """
    from fairseq.distributed import utils

    connected = config.distributed_init_method is not None or config.distributed_world_size == 1
    in_slurm = any(name in os.environ for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"))
    if connected or config.tpu or torch.cuda.device_count() > 0 or config.distributed_port <= 0 or not in_slurm:
        return
    asked = config.distributed_world_size
    utils._infer_slurm_init(config, None)
    if config.distributed_world_size == 0:
        raise UserError(
            f"--distributed-world-size ({asked}): SLURM starts one task on each node, and fairseq makes of it one "
            "process for each GPU, of which there are none here: give srun --ntasks-per-node, the processes of a node"
        )


def silence_import_warnings() -> None:
    """Hide the FutureWarnings that importing TorchScale's dependency fairscale raises in every process."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"fairscale\.")
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated", category=FutureWarning)


def refuse_tpu(tpu: bool) -> None:
    """Stop with a ``UserError``, before any work, where fairseq would look for a TPU.

    ``tpu`` is ``cfg.tpu`` of a task or model configuration, where ``II("common.tpu")`` stands. fairseq sets it for
    ``--tpu`` and, silently, for ``--bf16`` and ``--memory-efficient-bf16``.
    """
    if tpu:
        raise UserError(
            "--bf16, --memory-efficient-bf16 and --tpu make fairseq look for a TPU, which is not supported here: "
            "use --mhmoe-precision bf16 (or common.bf16=true with fairseq-hydra-train)"
        )
