"""What a paper claims of two models, and whether our records show it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """``model`` is better than ``reference``: a lower loss or perplexity, a higher score.

    Attributes:
        text: the claim in words, such as ``MH-MoE has a lower perplexity than X-MoE``.
        model, reference: names of models of the experiment.
        paper: what the paper measured, in its own numbers.
        metric: its name in our records, such as ``perplexity``; empty: the main one of ``what``.
        what: kind of the evaluation, such as ``perplexity``, ``masked``, ``captions``; empty: the run's first.
        part: language, domain or modality; None: the whole split.
    """

    text: str
    model: str
    reference: str
    paper: str = ""
    metric: str = ""
    what: str = ""
    split: str = "test"
    part: str | None = None
