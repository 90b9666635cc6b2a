"""What the tests of the accelerator path share: a recorder of operations, and a default dtype."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that need a value on the host, or whose shape depends on values.
HOST_READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::masked_select", "aten::is_nonzero"}


class Recorder(TorchDispatchMode):
    """The names of all operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype(dtype):
    """New parameters and buffers in ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
