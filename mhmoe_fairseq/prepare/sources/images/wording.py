"""What English captions tell about an image."""

from __future__ import annotations

import re

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "grey", "pink")
_COLOUR = re.compile(rf"\b({'|'.join(COLOURS)})\b")


def colour_facts(text: str) -> dict[str, str]:
    """``{"colour": name}`` where a text names exactly one; none otherwise."""
    found = set(_COLOUR.findall(text.lower()))
    return {"colour": found.pop()} if len(found) == 1 else {}
