"""lm-eval is an optional package: whether it is there, and where it keeps its tasks."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..common.errors import UserError

INSTALL = 'pip install "mhmoe-fairseq[lm-eval]"'


def require_lm_eval() -> Path:
    """The folder of lm-eval's packaged tasks.

    Raises:
        UserError: lm-eval is not installed; the message has the line that installs it.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"lm-eval is not installed: {INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "tasks"
