"""Text under a model with an expert for each domain, without being told which domain it is of (DEMix, equation 4).

Every token is predicted once by each expert, in as many passes; the predictions are mixed by the posterior of the
domains: ``p(x_t | x_<t) = sum_j p_j(x_t | x_<t) P(j | x_<t)``, ``P(j | x_<t) ~ prior_j prod_s p_j(x_s | x_<s)`` over
the tokens s < t of the same document and block. So a document has the probability ``sum_j prior_j p_j(document)``.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from fairseq import utils
from torch import Tensor

from ..common.errors import UserError


def exact(log_probs_JBS: Tensor, starts_BS: Tensor, log_prior_J: Tensor) -> Tensor:
    """The mixture by Bayes' rule: log-probabilities ``(B, S)``.

    Args:
        log_probs_JBS: float64, of every token under each domain's expert; 0 for what is no target.
        starts_BS: True where a document begins, at whose first token the prior counts alone; everywhere in column 0.

    >>> half = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    >>> log_probs = torch.tensor([[[0.5, 0.2, 0.9]], [[0.1, 0.4, 0.3]]], dtype=torch.float64).log()
    >>> exact(log_probs, torch.tensor([[True, False, False]]), half).exp()
    tensor([[0.3000, 0.2333, 0.7286]], dtype=torch.float64)
    """
    before_JBS = log_probs_JBS.cumsum(2) - log_probs_JBS
    positions_S = torch.arange(starts_BS.size(1), device=starts_BS.device)
    first_BS = torch.where(starts_BS, positions_S, 0).cummax(1).values
    evidence_JBS = before_JBS - before_JBS.gather(2, first_BS.expand_as(before_JBS))
    return _mixed_predictions(log_probs_JBS, evidence_JBS + log_prior_J.view(-1, 1, 1))


def one_token(log_probs_JBS: Tensor, starts_BS: Tensor, log_prior_J: Tensor) -> Tensor:
    """As the code that the paper released: only the token before counts, whatever document it is of, and the prior.

    Arguments are those of ``exact``; a block's first token is mixed uniformly.

    >>> half = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    >>> log_probs = torch.tensor([[[0.5, 0.2, 0.9]], [[0.1, 0.4, 0.3]]], dtype=torch.float64).log()
    >>> one_token(log_probs, torch.tensor([[True, False, False]]), half).exp()
    tensor([[0.3000, 0.2333, 0.5000]], dtype=torch.float64)
    """
    weights_JBS = log_probs_JBS.roll(1, 2) + log_prior_J.view(-1, 1, 1)
    weights_JBS[:, :, 0] = 0
    return _mixed_predictions(log_probs_JBS, weights_JBS)


def _mixed_predictions(log_probs_JBS: Tensor, weights_JBS: Tensor) -> Tensor:
    return torch.logsumexp(log_probs_JBS + weights_JBS.log_softmax(0), 0)


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"exact": exact, "demix-code": one_token}
PRIORS: dict[str, Callable[[Any], list[int]]] = {  # what each domain has of it in advance, from the task
    "uniform": lambda task: [1] * len(task.domains),
    "train": lambda task: [task.domain_tokens().get(name, 0) for name in task.domains],
}
_KINDS = {"exact": "domain mixture", "demix-code": "one-token mixture"}  # of records; of a domain's name "one domain"


class DomainMixture:
    """How a model's experts are mixed in evaluation.

    Args:
        task: of a model with experts of domains; it stops telling their domains.
        method: a name in ``METHODS``, or a domain's, whose expert then predicts everything.
        prior: a name in ``PRIORS``: equal shares, or those of the training text; None: uniform.

    Raises:
        UserError: the model has no such experts, there is no such method, domain or prior, or nothing has one.
    """

    def __init__(self, task: Any, method: str, prior: str | None = None) -> None:
        if task.domains is None:
            raise UserError(f"--domain-mixture ({method}): the model was not trained with --mhmoe-routing domain")
        if method not in (*METHODS, *task.domains):
            known = ", ".join([*METHODS, *task.domains])
            raise UserError(f"--domain-mixture ({method}): must be one of {known}")
        if prior is not None and method in task.domains:
            raise UserError(f"--domain-prior ({prior}): has no meaning with --domain-mixture {method}, one expert")
        if (prior or "uniform") not in PRIORS:
            raise UserError(f"--domain-prior ({prior}): must be one of {', '.join(PRIORS)}")
        self.method, self.prior = method, prior or "uniform"
        self._experts = [task.domains.index(method)] if method in task.domains else list(range(len(task.domains)))
        shares = PRIORS[self.prior](task)
        if not any(shares):
            raise UserError(f"--domain-prior ({prior}): no training text is of the model's {', '.join(task.domains)}")
        self._log_prior_J = (torch.tensor(shares, dtype=torch.float64)[self._experts] / sum(shares)).log()
        self._end, self._pad = task.source_dictionary.eos(), task.source_dictionary.pad()
        task.names_domains = False

    @property
    def kind(self) -> str:
        """What a record is of, which tells it from one of text whose domains are known."""
        return _KINDS.get(self.method, "one domain") + (" by share" if self.prior == "train" else "")

    @property
    def settings(self) -> dict[str, Any]:
        """What a record says of it."""
        prior = {} if len(self._experts) == 1 else {"domain prior": self.prior}
        return {"domain mixture": self.method, **prior, "passes over the text": len(self._experts)}

    @torch.no_grad()
    def log_probs(self, model: Any, batch: dict[str, Any], has_bos: bool = False) -> Tensor:
        """The log-probability of every target of a batch, ``(B, S)`` float64; 0 for what is no target.

        Args:
            has_bos: whether a row begins with a symbol that is given, not predicted.
        """
        target, inputs = batch["target"], batch["net_input"]["src_tokens"]
        scored = target.ne(self._pad)
        if has_bos:
            scored[:, 0] = False
        passes = (
            model(inputs, targets=target, domain=torch.full_like(inputs, expert))[0].double().neg()
            for expert in self._experts
        )
        log_probs_JBS = torch.stack([log_probs.masked_fill(~scored, 0) for log_probs in passes])
        mix = METHODS.get(self.method, exact)
        return mix(log_probs_JBS, self._starts(inputs, target), self._log_prior_J.to(inputs.device)).masked_fill(
            ~scored, 0
        )

    def _starts(self, inputs: Tensor, target: Tensor) -> Tensor:
        """Where a document begins: behind an empty line, which is an end mark behind an end mark."""
        is_empty_line = inputs.eq(self._end) & target.eq(self._end)
        starts = is_empty_line.roll(1, 1)
        starts[:, 0] = True
        return starts


def score_batches(mixture: DomainMixture, model: Any, batches: Iterable[dict[str, Any]], has_bos: bool) -> float:
    """The cross entropy of all targets of ``batches`` in bits."""
    device = next(model.parameters()).device
    moved = (utils.apply_to_sample(lambda tensor: tensor.to(device), batch) for batch in batches if batch)
    return -sum(float(mixture.log_probs(model, batch, has_bos).sum()) for batch in moved) / math.log(2)
