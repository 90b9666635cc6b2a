"""Multi-Head Mixture-of-Experts for fairseq and TorchScale.

This package is a fairseq user directory (``fairseq-train --user-dir mhmoe_fairseq``): where fairseq is imported
already, importing it registers our models, criterions and tasks. Else it imports neither fairseq nor PyTorch: then
importing ``mhmoe_fairseq.models``, ``.tasks`` or ``.criterions`` registers everything, as does :func:`register`.
``mhmoe_fairseq.moe`` is pure PyTorch and works without fairseq and TorchScale.
"""

import sys

__version__ = "0.1.0"
_registered = False


def register() -> None:
    """Repairs stock fairseq and registers our models, criterions and tasks with it; again it changes nothing.

    Raises:
        ModuleNotFoundError: fairseq or TorchScale is not installed.
    """
    global _registered
    if _registered:
        return
    _registered = True  # the parts that are imported here ask for registration, too
    from . import compat

    with compat.logging_as_found():
        compat.apply()
        from . import criterions, models, tasks, training  # noqa: F401  (imported for their registrations)
        from .commands.main import refuse_in_one_line

        training.save_atomically()
        refuse_in_one_line()


if sys.modules.get("fairseq") is not None:
    register()
