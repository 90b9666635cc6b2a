"""A look at random lines of every language: which scripts are in them."""

from __future__ import annotations

import heapq
from collections import Counter
from pathlib import Path
from typing import Any

from ...data.languages import Language
from ..corpus import iter_lines
from .assignment import position
from .scripts import fits, foreign_letters, letters_by_script

NUM_LINES = 100
_NUM_EXAMPLES = 5


def spot_check(text: Path, language: Language, seed: int, num_lines: int = NUM_LINES) -> dict[str, Any]:
    """Figures on ``num_lines`` lines drawn from ``seed``.

    Returns:
        ``lines``; ``foreign_script_lines``, with a letter that is neither of the language's scripts nor Latin;
        ``misfit_lines``, which are mostly of another script; ``scripts``, the shares of the letters; ``examples``
        of the first two kinds.
    """
    sample = heapq.nsmallest(num_lines, iter_lines(text), key=lambda line: position(seed, "spot check", line))
    letters: Counter[str] = Counter()
    foreign, misfits = [], []
    for line in sample:
        in_line = letters_by_script(line)
        letters.update(in_line)
        if foreign_letters(in_line, language):
            foreign.append(line)
        if not fits(in_line, language):
            misfits.append(line)
    total = sum(letters.values())
    return {
        "lines": len(sample),
        "foreign_script_lines": len(foreign),
        "misfit_lines": len(misfits),
        "scripts": {script: round(count / total, 4) for script, count in letters.most_common()},
        "examples": (foreign + misfits)[:_NUM_EXAMPLES],
    }
