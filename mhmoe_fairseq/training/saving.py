"""Checkpoint files that are either the old one or the new one, never half of one.

fairseq writes the first file of a save to a temporary name, but then copies it straight over ``checkpoint_best.pt``
and ``checkpoint_last.pt``: a process killed in between leaves a truncated file, and the run cannot resume. Here every
file, copies included, gets its bytes under a temporary name in the same folder and takes its own name in one step.
"""

import shutil
from functools import wraps
from pathlib import Path

from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from ..common.files import atomic_path
from ..data.tensor_files import save_tensors


def save_atomically() -> None:
    """Make fairseq save so; calling it again changes nothing.

    Only local files: what fairseq sends through ``iopath`` (remote paths, ``--write-checkpoints-asynchronously``) has
    no rename and stays fairseq's.
    """
    if getattr(PathManager.copy, "is_atomic", False):
        return
    stock_copy, stock_save = PathManager.copy, checkpoint_utils.torch_persistent_save

    @wraps(stock_copy)
    def copy_or_send(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        if PathManager.supports_rename(src_path) and PathManager.supports_rename(dst_path) and overwrite:
            with atomic_path(Path(dst_path)) as temporary:
                shutil.copyfile(src_path, temporary)
            return True
        return stock_copy(src_path, dst_path, overwrite=overwrite)

    @wraps(stock_save)
    def save_or_send(obj: object, filename: str, async_write: bool = False) -> None:
        if PathManager.supports_rename(filename) and not async_write:
            save_tensors(obj, Path(filename))
        else:
            stock_save(obj, filename, async_write=async_write)

    copy_or_send.is_atomic = True
    PathManager.copy = staticmethod(copy_or_send)
    checkpoint_utils.torch_persistent_save = save_or_send
