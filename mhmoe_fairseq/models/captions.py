"""Captions by beam search over a model that writes token by token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.errors import UserError
from ..common.ranges import FLAGS, flag
from ..torchscale_ext.attention import KeyValueCache


@dataclass
class CaptionState:
    """Images and the captions so far, a row each."""

    caches: list[KeyValueCache]  # of each layer
    num_tokens: int = 0  # of the captions so far

    def reorder(self, rows: Tensor) -> None:
        """Follow beam search: row ``i`` becomes what row ``rows[i]`` was; there may be more rows than before."""
        for cache in self.caches:
            cache.reorder(rows)


class Specials(NamedTuple):
    """Ids of the vocabulary's special symbols."""

    bos: int  # what a caption starts with
    eos: int  # what ends it
    never: tuple[int, ...]  # ids that no caption has


@dataclass(frozen=True)
class CaptionSearch:
    """How to look for the best caption.

    Args:
        beam: hypotheses kept for an image; 1 is greedy.
        length_penalty: a hypothesis of n tokens, ``</s>`` counted, is scored by its log-probability over ``n ** this``.
        max_len: most tokens of a caption, ``</s>`` counted.

    Raises:
        UserError: naming the flag, its value and the rule.
    """

    beam: int = 3
    length_penalty: float = 0.6
    max_len: int = 31

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if problem := FLAGS[f"caption_{name}"].problem(value):
                raise UserError(f"{flag(name)} ({value}) {problem}")


class Caption(NamedTuple):
    """What the search found for an image."""

    tokens: tuple[int, ...]  # ids, without the symbols that start and end it
    score: float  # log-probability in nats over the power of the length; minus infinity if the model gave no number


@torch.no_grad()
def search_captions(
    model: Any, images: Tensor, search: CaptionSearch, specials: Specials, are_all_done: Callable[[bool], bool] = bool
) -> list[Caption]:
    """The best caption of every image.

    An image is done when ``search.beam`` of its hypotheses have ended, or none that goes on can beat the best of
    these. A caption has at least one word, and at ``search.max_len`` every hypothesis ends. Each image's result is the
    same in any batch.

    Args:
        model: in evaluation mode, with ``start_captions`` and ``next_token_logits`` as ``MHMoEBEiT3`` has them.
        images: ``(B, 3, H, W)``, at least one.
        are_all_done: told after every step whether this process's images are done, answers whether to stop. Where a
            step of the model needs all processes, they must be given the same answer.
    """
    beams = _Beams(len(images), search, specials, images.device)
    state = model.start_captions(images)
    state.reorder(torch.arange(len(images), device=images.device).repeat_interleave(search.beam))
    for _ in range(search.max_len):
        rows = beams.advance(model.next_token_logits(state, beams.tokens_BKS[:, :, -1].flatten()))
        if are_all_done(bool(beams.is_done_B.all())):
            break
        state.reorder(rows)
    return [Caption(tokens, score) for tokens, score in zip(beams.best_tokens, beams.best_score_B.tolist())]


class _Beams:
    """The hypotheses of B images, K each; row ``image * K + rank`` of the model's batch."""

    def __init__(self, images: int, search: CaptionSearch, specials: Specials, device: torch.device) -> None:
        self.search = search
        self.specials = specials
        self.length = 0  # tokens so far, bos not counted
        self.tokens_BKS = torch.full((images, search.beam, 1), specials.bos, device=device)
        self.sums_BK = torch.full((images, search.beam), -torch.inf, device=device)
        self.sums_BK[:, 0] = 0.0  # at first all hypotheses of an image are one
        self.ended_B = torch.zeros(images, dtype=torch.long, device=device)
        self.is_done_B = torch.zeros(images, dtype=torch.bool, device=device)
        self.best_score_B = torch.full((images,), -torch.inf, device=device)
        self.best_tokens: list[tuple[int, ...]] = [()] * images

    def advance(self, logits: Tensor) -> Tensor:
        """Take the best continuations.

        Args:
            logits: ``(B * K, vocabulary)``.

        Returns:
            ``(B * K,)`` the old row that every new one goes on from.
        """
        images, beam = self.sums_BK.shape
        candidates = (self.sums_BK[..., None] + self._log_probs(logits).view(images, beam, -1)).flatten(1)
        vocabulary = logits.size(-1)
        # An image has at most K candidates that end: among 2 K there are K that go on.
        sums, chosen = candidates.topk(min(2 * beam, candidates.size(1)))
        parents, tokens = chosen.div(vocabulary, rounding_mode="floor"), chosen % vocabulary
        ends = tokens == self.specials.eos
        self.length += 1
        self._record_ends(sums[:, :beam], ends[:, :beam], parents)
        sums, order = sums.masked_fill(ends, -torch.inf).topk(min(beam, sums.size(1)))
        parents, tokens = parents.gather(1, order), tokens.gather(1, order)
        self._keep(sums, parents, tokens.masked_fill(sums.isneginf(), self.specials.eos))
        offsets = torch.arange(images, device=parents.device)[:, None] * beam
        return (offsets + parents).flatten()

    def _log_probs(self, logits: Tensor) -> Tensor:
        """Without what may not come next: forbidden ids, an end at once, anything but an end at the last position."""
        log_probs = logits.float().log_softmax(-1).nan_to_num(nan=-torch.inf)
        log_probs[:, list(self.specials.never)] = -torch.inf
        eos = log_probs[:, self.specials.eos].clone()
        if self.length + 1 == self.search.max_len:
            log_probs[:] = -torch.inf
        log_probs[:, self.specials.eos] = -torch.inf if self.length == 0 else eos
        return log_probs

    def _record_ends(self, sums: Tensor, ends: Tensor, parents: Tensor) -> None:
        """Note the hypotheses among an image's best K that end here."""
        ends = ends & ~sums.isneginf() & ~self.is_done_B[:, None]
        scores = (sums / self.length**self.search.length_penalty).masked_fill(~ends, -torch.inf)
        score_B, rank_B = scores.max(1)
        for image in (score_B > self.best_score_B).nonzero().flatten().tolist():
            parent = parents[image, rank_B[image]]
            self.best_tokens[image] = tuple(self.tokens_BKS[image, parent, 1:].tolist())
        self.best_score_B = torch.maximum(self.best_score_B, score_B)
        self.ended_B += ends.sum(1)

    def _keep(self, sums: Tensor, parents: Tensor, tokens: Tensor) -> None:
        """The hypotheses that go on; the images for which none of them can win any more are done."""
        self.sums_BK = sums
        history = self.tokens_BKS.gather(1, parents[..., None].expand(-1, -1, self.tokens_BKS.size(2)))
        self.tokens_BKS = torch.cat([history, tokens[..., None]], dim=2)
        # Log-probabilities only fall, so this is the most that a hypothesis can reach.
        reachable_B = sums.amax(1) / self.search.max_len**self.search.length_penalty
        self.is_done_B |= (self.ended_B >= self.search.beam) | (reachable_B <= self.best_score_B)
