"""Checkpoint files that are either the old one or the new one, never half of one.

fairseq writes the first file of a save to a temporary name, but then copies it straight over ``checkpoint_best.pt``
and ``checkpoint_last.pt``: a process killed in between leaves a truncated file, and the run cannot resume. Here every
file, copies included, gets its bytes under a temporary name in the same folder and takes its own name in one step.
"""

import shutil
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from ..common.files import atomic_path
from ..compat import replaces
from ..data.tensor_files import save_tensors


def save_atomically() -> None:
    """Make fairseq save so; calling it again changes nothing.

    Only local files: what fairseq sends through ``iopath`` (remote paths, ``--write-checkpoints-asynchronously``) has
    no rename and stays fairseq's.
    """

    @replaces(PathManager, "copy")
    def copy_or_send(stock: Any, src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        if not (PathManager.supports_rename(src_path) and PathManager.supports_rename(dst_path) and overwrite):
            return stock(src_path, dst_path, overwrite=overwrite)
        with atomic_path(Path(dst_path)) as temporary:
            shutil.copyfile(src_path, temporary)
        return True

    @replaces(checkpoint_utils, "torch_persistent_save")
    def save_or_send(stock: Any, obj: object, filename: str, async_write: bool = False) -> None:
        if PathManager.supports_rename(filename) and not async_write:
            save_tensors(obj, Path(filename))
        else:
            stock(obj, filename, async_write=async_write)
