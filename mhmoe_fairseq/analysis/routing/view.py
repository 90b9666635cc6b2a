"""Which experts, with which weights, every sub-token of a text or an image goes to, for the viewer's page."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...checkpoints.open import Opened, open_model
from ...common.errors import UserError
from ...common.files import read_utf8_lines
from ...data.documents import clean_line
from ...data.vocabularies import open_vocabulary
from ...models.language_model import MHMoELanguageModel
from .diversity import prepare_images
from .listening import RoutedCall, expert_pools, listening
from .words import symbol_texts

MOST_POSITIONS = 10_000  # more are too many for a browser to lay out
MOST_BYTES = 5_000_000  # of routing in a page
_BASE64 = 4 / 3


class Source(NamedTuple):
    """What is routed by itself: a text, an image or, with both, a pair."""

    name: str
    text: str | None = None
    image: Path | None = None


@dataclass(frozen=True)
class Sample:
    """One text, image or pair as the model sees it, of T positions.

    Attributes:
        tokens: what each position shows: a token's text, a special symbol, or nothing for a patch.
        blocks: where the model starts anew, in texts that are longer than its positions; the first is 0.
        image: ``(3, H, W)`` of -1 to 1, or None. Its positions are the first: class token, then patches by row.
        grid: rows and columns of patches; (0, 0) without an image.
        experts, weights: ``(L, T, H, K)`` by MoE layer; the weight is 0 where the assignment was dropped.
        entropies: ``(L, T, H)`` nats.
    """

    name: str
    tokens: list[str]
    blocks: list[int]
    image: Tensor | None
    grid: tuple[int, int]
    experts: Tensor
    weights: Tensor
    entropies: Tensor


@dataclass(frozen=True)
class RoutedView:
    """Samples as one checkpoint routes them.

    Attributes:
        checkpoint: its file.
        layers: indices of the L MoE layers, from 0.
        num_experts: of a layer, of all pools together: texts' experts follow images' where each have their own.
        num_pools: 2 where images and texts have experts of their own, else 1.
        num_banks: of each pool: H where every head has experts of its own, which follow one another, else 1.
    """

    checkpoint: Path
    layers: list[int]
    num_experts: int
    num_pools: int
    num_banks: int
    samples: list[Sample] = field(default_factory=list)


def read_sources(texts: Sequence[Path], words: str | None, images: Sequence[Path]) -> list[Source]:
    """Pair texts with images in their order, where there are both.

    Raises:
        UserError: there is nothing to show, or texts and images are not equally many.
    """
    found = [(path.name, "".join(f"{line}\n" for line in read_utf8_lines(path))) for path in texts]
    found += [] if words is None else [("words", words)]
    if not found and not images:
        raise UserError("--view needs --text FILE, --words TEXT or, of a model of images, --image FILE")
    if found and images and len(found) != len(images):
        raise UserError(f"--image ({len(images)}) and --text ({len(found)}) make pairs: as many of one as of the other")
    if not images:
        return [Source(name, text) for name, text in found]
    texts_or_none: list[tuple[str, str | None]] = [*found] or [("", None)] * len(images)
    return [
        Source(" + ".join(filter(None, (image.name, name))), text, image)
        for image, (name, text) in zip(images, texts_or_none)
    ]


@torch.no_grad()
def route_view(
    checkpoint: Path,
    data: Path,
    sources: Sequence[Source],
    device: str | None = None,
    precision: str | None = None,
) -> RoutedView:
    """Route every source, alone in its batch, and say what each position's sub-tokens chose.

    Args:
        checkpoint: of a language model or a model of images and text, with experts.
        data: prepared folder with the vocabulary.
        device, precision: see ``open_model``.

    Raises:
        UserError: a dense model, an image for a language model, a text that does not fit, or more than a page holds.
    """
    opened = open_model(checkpoint, data, device, precision=precision)
    pools = expert_pools(opened.model)
    if not pools:
        raise UserError(f"{checkpoint} is a dense model: it has no experts to show")
    first = next(iter(pools.values()))
    if first[0].gate.chooses_all:
        raise UserError(
            f"{checkpoint}: a position goes to any number of experts ({first[0].config.routing}); --view shows top-k"
        )
    is_text_model = isinstance(opened.model, MHMoELanguageModel)
    if is_text_model and any(source.image for source in sources):
        raise UserError(f"{checkpoint} is a language model: it sees no --image")
    encoded = _encode_all(opened, sources, is_text_model)
    grids = [opened.task.grid if source.image else (0, 0) for source in sources]
    positions = sum(map(len, encoded)) + sum(1 + rows * columns for rows, columns in grids if rows)
    config = first[0].config
    _check_size(positions, len(pools), config.subtokens_per_token, config.top_k)
    texts = _shown_texts(opened) if any(encoded) else []
    view = RoutedView(checkpoint, list(pools), config.total_experts * len(first), len(first), config.num_banks)
    for source, ids, grid in zip(sources, encoded, grids):
        longest = opened.model.max_decoder_positions() if is_text_model else max(len(ids), 1)
        blocks = list(range(0, len(ids), longest)) or [0]
        image = prepare_images([source.image], opened.task.args.img_size)[0] if source.image else None
        shown = [*(["[cls]"] + [""] * (grid[0] * grid[1]) if source.image else []), *(texts[index] for index in ids)]
        calls = [_route(opened, image, ids[start : start + longest], is_text_model) for start in blocks]
        routed = [
            torch.stack([torch.cat([getattr(call, what)[layer][0] for call in calls]) for layer in pools]).cpu()
            for what in ("choices", "weights", "entropies")
        ]
        view.samples.append(Sample(source.name, shown, blocks, image, grid, *routed))
    return view


def _route(opened: Opened, image: Tensor | None, ids: Sequence[int], is_text_model: bool) -> RoutedCall:
    """One call of the model, with what it was given alone in the batch."""
    tokens = torch.tensor([ids], device=opened.device) if ids else None
    calls: list[RoutedCall] = []
    with listening(opened.model, calls.append):
        if is_text_model:
            opened.model(tokens, features_only=True)
        else:
            opened.model(tokens, None if image is None else image[None].to(opened.device))
    return calls[0]


def _check_size(positions: int, layers: int, heads: int, top_k: int) -> None:
    """``UserError`` if a page would be too large to look at."""
    size = positions * layers * heads * (2 * top_k + 1) * 2 * _BASE64
    if positions > MOST_POSITIONS or size > MOST_BYTES:
        raise UserError(
            f"--view: {positions:,} positions in {layers} layers of {heads} x {top_k} choices are {size / 1e6:.1f} MB; "
            f"a page holds at most {MOST_POSITIONS:,} positions and {MOST_BYTES / 1e6:.0f} MB: give less text or images"
        )


def _encode_all(opened: Opened, sources: Sequence[Source], is_text_model: bool) -> list[list[int]]:
    """The indices of every source's text, special symbols as in training; none where it has no text.

    A language model reads lines, each with its end mark, after the symbol that leads every text of its training; a
    model of images and text reads all words as one line between ``<s>`` and ``</s>``.
    """
    dictionary, args = opened.task.source_dictionary, opened.task.args
    has_text = any(source.text is not None for source in sources)
    vocabulary = open_vocabulary(opened.data, dictionary.symbols[dictionary.nspecial :]) if has_text else None

    def encode(line: str) -> list[int]:
        line = clean_line(line)
        return vocabulary.encode_lines([line])[0] if vocabulary else [*map(dictionary.index, line.split())]

    encoded: list[list[int]] = []
    for name, text, _ in sources:
        if text is None:
            encoded.append([])
        elif is_text_model:
            start = dictionary.bos() if getattr(args, "add_bos_token", False) else dictionary.eos()
            lines = text.split("\n")
            ends = [[dictionary.eos()]] * (len(lines) - 1) + [[]]
            encoded.append([start, *(index for line, end in zip(lines, ends) for index in [*encode(line), *end])])
        else:
            encoded.append([dictionary.bos(), *encode(text), dictionary.eos()])
            if len(encoded[-1]) > args.max_text_length:
                raise UserError(
                    f"{name}: {len(encoded[-1])} tokens, <s> and </s> counted; the model's texts have at most "
                    f"{args.max_text_length} (--max-text-length of its training)"
                )
    return encoded


def _shown_texts(opened: Opened) -> list[str]:
    """What every index of the dictionary is shown as; bytes of cut characters as ``\\xe4``."""
    dictionary = opened.task.source_dictionary
    shown = [text.decode("utf-8", "backslashreplace") for text in symbol_texts(dictionary, opened.data)]
    return [*dictionary.symbols[: dictionary.nspecial], *shown[dictionary.nspecial :]]
