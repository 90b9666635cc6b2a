"""The viewer: one HTML file, without network or other files, that shows the experts of every sub-token."""

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...common.files import atomic_open
from ..routing.diversity import shown
from ..routing.view import RoutedView, Sample

_TEMPLATE = Path(__file__).with_name("view.html")
_MARK = '"DATA"'
_SCALE = 65535  # of numbers from 0 to 1


def write_view(path: Path, view: RoutedView) -> None:
    """Write the page of a view, whole or not at all."""
    before, after = _TEMPLATE.read_text(encoding="utf-8").split(_MARK)
    with atomic_open(path) as stream:
        stream.write(f"{before}{embedded(page_data(view))}{after}".encode())


def page_data(view: RoutedView) -> dict[str, Any]:
    """What the page reads, ready for JSON; numbers of routing are base64 of little-endian uint16, layer by layer.

    Weights are in units of 1/65535, entropies in units of ln(E)/65535, with E experts to choose from.
    """
    checkpoint, choices = view.checkpoint.resolve(), view.num_experts // view.num_pools // view.num_banks
    return {
        "model": "/".join(checkpoint.parts[-3:]),
        "layers": [layer + 1 for layer in view.layers],
        "heads": view.samples[0].experts.size(2),
        "topK": view.samples[0].experts.size(3),
        "experts": view.num_experts,
        "pools": view.num_pools,
        "choices": choices,
        "samples": [_sample_data(sample, math.log(choices) or 1.0) for sample in view.samples],
    }


def _sample_data(sample: Sample, most_nats: float) -> dict[str, Any]:
    image = None
    if sample.image is not None:
        png = io.BytesIO()
        shown(sample.image).save(png, format="PNG")
        image = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return {
        "name": sample.name,
        "tokens": sample.tokens,
        "blocks": sample.blocks,
        "image": image,
        "grid": sample.grid,
        "experts": _packed(sample.experts),
        "weights": _packed(sample.weights * _SCALE),
        "entropies": _packed(sample.entropies / most_nats * _SCALE),
    }


def _packed(values: Tensor) -> str:
    rounded = np.clip(np.rint(values.double().numpy()), 0, _SCALE)
    return base64.b64encode(rounded.astype("<u2").tobytes()).decode()


def embedded(value: Any) -> str:
    """JSON that stands in an HTML page as it is: nothing in it can end a script or begin a tag."""
    text = json.dumps(value, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
