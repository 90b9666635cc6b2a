"""Multi-Head Mixture-of-Experts for fairseq and TorchScale.

This package is a fairseq user directory (``fairseq-train --user-dir mhmoe_fairseq``): importing
it registers the models, criterions and tasks. ``mhmoe_fairseq.moe`` is pure PyTorch and works
without fairseq and TorchScale.
"""

from importlib.util import find_spec

__version__ = "0.1.0"

# find_spec, not try/except: an ImportError inside our own modules must not be hidden.
if find_spec("fairseq") is not None:
    from . import compat

    with compat.logging_as_found():
        compat.apply()
        from . import criterions, models, tasks, training  # noqa: F401  (imported for their registrations)

        training.save_atomically()
        training.refuse_in_one_line()
