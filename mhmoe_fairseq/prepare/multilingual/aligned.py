"""Held-out text that is the same in several languages: ``aligned/{valid,test}.jsonl``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Sequence

from ...common.files import atomic_open
from .passages import read_passages


def write_aligned(held_out: Path, split: str, languages: Sequence[str], target: Path) -> Counter[str]:
    """Writes ``{"key": ..., "text": {"en": ..., "de": ...}}`` for every key that two languages or more have.

    Args:
        held_out: folder with ``CODE/SPLIT.jsonl`` passages that have keys.

    Returns:
        how many keys there are (``keys``), and how many each language has.
    """
    texts: dict[str, dict[str, str]] = {}
    for code in languages:
        for passage in read_passages(held_out / code / f"{split}.jsonl"):
            texts.setdefault(str(passage.key), {}).setdefault(code, " ".join(passage.lines))
    counts: Counter[str] = Counter()
    with atomic_open(target) as stream:
        for key in sorted(texts):
            if len(texts[key]) > 1:
                counts.update(["keys", *texts[key]])
                stream.write((json.dumps({"key": key, "text": texts[key]}, ensure_ascii=False) + "\n").encode())
    return counts
