"""What stock fairseq 0.12 needs to run on current NumPy, PyTorch and Python: the only place we patch.

``apply()`` runs once when the package is imported, before any model is registered. Each repair has a
test in ``tests/test_compat.py`` that also shows the unrepaired failure, so that it is noticed when a
release makes the repair needless.

========================================  ==========================================================
Breakage of the stock package             What happens here
========================================  ==========================================================
``np.compat.long`` is gone from NumPy 2;  :func:`restore_numpy_compat` puts it back. (``np.int`` is
``--sample-break-mode eos`` and           gone too, but only fairseq's speech masking uses it.)
``fairseq-interactive`` use it.
A distributed resume unpickles the        :func:`allow_checkpoint_globals` names the harmless classes
checkpoint with ``weights_only=True``     of that payload; ``weights_only`` itself stays on.
and stops at omegaconf's classes.
``--bf16`` on fairseq's command line      :func:`refuse_tpu` is called by the task before any data is
means "train on a TPU", on a GPU too.     read and names ``--mhmoe-precision bf16`` instead.
``--user-dir mhmoe_fairseq`` (the         :func:`accept_installed_user_dir` adds the spelling that
installed package, by name) is refused    fairseq builds for it to the package's ``__path__``.
when the package is already imported.
fairscale 0.4.0 and ``torch.jit.script``  :func:`silence_import_warnings` hides just these messages.
warn on import, once for each process.
========================================  ==========================================================

Owned elsewhere, because the cure is not a patch: fairseq-fixed drops the last batch of training and
validation data unless ``--required-batch-size-multiple 1`` (our task corrects it); stock padding masks
are longer than the input in incremental decoding (``torchscale_ext``).
"""

from __future__ import annotations

import collections
import os
import sys
import typing
import warnings
from types import SimpleNamespace

import numpy as np
import torch


def apply() -> None:
    """Install every repair; calling it again changes nothing."""
    silence_import_warnings()
    restore_numpy_compat()
    allow_checkpoint_globals()
    accept_installed_user_dir()


def restore_numpy_compat() -> None:
    """Give NumPy 2 the name ``np.compat.long`` back, if it has none of its own."""
    if not hasattr(np, "compat"):
        np.compat = SimpleNamespace(long=np.int64)


def checkpoint_globals() -> list[typing.Any]:
    """The classes in the checkpoint that rank 0 broadcasts on resume: containers, no code.

    The saved file itself holds plain containers only; fairseq turns its configuration into omegaconf
    objects before it sends them to the other ranks.
    """
    from fairseq.distributed.utils import _TensorPlaceholder
    from omegaconf import AnyNode, DictConfig, ListConfig
    from omegaconf.base import ContainerMetadata, Metadata

    omegaconf_classes = [DictConfig, ListConfig, ContainerMetadata, Metadata, AnyNode]
    return [*omegaconf_classes, typing.Any, dict, list, int, collections.defaultdict, _TensorPlaceholder]


def allow_checkpoint_globals() -> None:
    """Let ``torch.load(weights_only=True)`` read the checkpoint that a distributed resume broadcasts."""
    torch.serialization.add_safe_globals(checkpoint_globals())


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


def silence_import_warnings() -> None:
    """Hide the FutureWarnings that importing TorchScale's dependency fairscale raises in every process."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"fairscale\.")
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated", category=FutureWarning)


def refuse_tpu(tpu: bool) -> None:
    """Stop before any work where fairseq would look for a TPU.

    Args:
        tpu: ``cfg.tpu`` of a task or model configuration, where ``II("common.tpu")`` stands. fairseq sets
            it for ``--tpu`` and, silently, for ``--bf16`` and ``--memory-efficient-bf16``.

    Raises:
        ValueError: if it is set.
    """
    if tpu:
        raise ValueError(
            "--bf16, --memory-efficient-bf16 and --tpu make fairseq look for a TPU, which is not supported here: "
            "use --mhmoe-precision bf16 (or common.bf16=true with fairseq-hydra-train)"
        )
