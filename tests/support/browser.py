"""A page as a browser shows it, and what a layer chooses computed anew from its input."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")


class Page(HTMLParser):
    """The elements of a page after its scripts ran: ``(tag, attributes, text)``, those of a class by ``of``."""

    def __init__(self, file: Path, address: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[list[str]] = []
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={file.parent / 'browser'}"]
        command = [BROWSER, *flags, "--dump-dom", f"{file.as_uri()}#{address}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        self.feed(done.stdout)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))
        if tag not in ("meta", "img", "input"):
            self._open.append(self.elements[-1][2])

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for texts in self._open:
            texts.append(data)

    def of(self, name: str) -> list[tuple[dict[str, str], str]]:
        """Attributes and whole text of the elements of a class."""
        return [(attrs, "".join(text)) for _, attrs, text in self.elements if name in attrs.get("class", "").split()]


@torch.no_grad()
def chosen_anew(
    layer: nn.Module, model: nn.Module, *args: Any, **kwargs: Any
) -> list[list[tuple[list[int], list[float], float]]]:
    """Call a model; for each position of its first row, by head: an MoE layer's experts, weights, entropy in nats."""
    given: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    model(*args, **kwargs)
    handle.remove()
    found = []
    for x in given[0][0]:
        x = x if layer.head_projection is None else layer.head_projection(x)
        subtokens = []
        for part in layer.router(x.view(layer.config.num_heads, -1)).softmax(-1):
            weights, experts = part.topk(layer.config.top_k)
            scale = weights.sum() if layer.config.top_k > 1 and layer.config.normalize_gates else 1
            entropy = -sum(float(p * p.log()) for p in part)
            subtokens.append((experts.tolist(), (weights / scale).tolist(), entropy))
        found.append(subtokens)
    return found


def as_shown(subtokens: list[tuple[list[int], list[float], float]]) -> list[tuple[list[int], Any, Any]]:
    """What ``chosen_anew`` says of a position, to compare with rows of a page's table."""
    return [
        (experts, pytest.approx(weights, abs=2e-4), pytest.approx(entropy, abs=2e-3))
        for experts, weights, entropy in subtokens
    ]


def shown_subtokens(page: Page) -> list[tuple[list[int], list[float], float]]:
    """The rows of a page's table about one token, head by head."""
    rows = [attrs for attrs, _ in page.of("subtoken")]
    return [
        (
            [*map(int, row["data-experts"].split())],
            [*map(float, row["data-weights"].split())],
            float(row["data-entropy"]),
        )
        for row in rows
    ]
