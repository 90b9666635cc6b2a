"""What a folder holds, links followed, and what a source did not read of it: named for the user and in the manifest."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Iterable, Iterator, Mapping

from ..archives import Say

LeftOut = Mapping[str, list[str]]  # why -> names within the folder
_SHOWN = 3


def walk_files(folder: Path) -> Iterator[Path]:
    """Everything in ``folder`` and below that is no folder, in order; links to folders are entered, not in circles."""
    yield from _walk(folder, ())


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    here = os.path.realpath(folder)
    if here in above or not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _walk(path, (*above, here))
        else:
            yield path


def group_left_out(reasons: Iterable[tuple[str, str]]) -> LeftOut:
    """Names by reason, from pairs of a name and the reason why it was not read."""
    grouped: dict[str, list[str]] = defaultdict(list)
    for name, reason in reasons:
        grouped[reason].append(name)
    return dict(grouped)


def say_left_out(source: str, left_out: LeftOut, say: Say) -> None:
    """One line for each reason, with the first names."""
    for reason, names in left_out.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        say(f"left out: {source}: {', '.join(names[:_SHOWN])}{more}: {reason}")
