"""Running this checkout's scripts with its own ``mhmoe`` first on PATH."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Scripts:
    """Scripts of this checkout.

    Args:
        folder: gets a ``bin`` with the command.
        environment: settings of every run.
    """

    def __init__(self, folder: Path, **environment: str) -> None:
        (folder / "bin").mkdir()
        mhmoe = folder / "bin" / "mhmoe"
        python = f'PYTHONPATH="{ROOT}" exec "{sys.executable}"'
        mhmoe.write_text(f'#!/bin/sh\n{python} -m mhmoe_fairseq "$@"\n')
        mhmoe.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{mhmoe.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            **environment,
        }

    def run(self, script: str, *words: str, **environment: str) -> str:
        """What a script printed; it must end well."""
        env = {**self.environment, **environment}
        done = subprocess.run(["bash", script, *words], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
