"""The mixture of domains' experts against Bayes' rule written out, and the numbers computed by hand."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.evaluation.domain_mixture import METHODS, DomainMixture, exact, one_token

# Two domains, probabilities of three tokens (facts: section 4).
PROBABILITIES = torch.tensor([[[0.5, 0.2, 0.9]], [[0.1, 0.4, 0.3]]], dtype=torch.float64)
HALF = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
ONE_DOCUMENT = torch.tensor([[True, False, False]])
EOS, PAD = 2, 1


def test_three_tokens_of_two_domains_as_computed_by_hand() -> None:
    found = exact(PROBABILITIES.log(), ONE_DOCUMENT, HALF)
    assert found.exp().tolist() == [pytest.approx([0.3, 0.233333, 0.728571], abs=1e-6)]
    assert float(found.sum()) == pytest.approx(-2.975930, abs=1e-6)
    assert float(found.sum()) == pytest.approx(math.log(0.5 * 0.09 + 0.5 * 0.012))
    assert float(one_token(PROBABILITIES.log(), ONE_DOCUMENT, HALF).sum()) == pytest.approx(-3.352407, abs=1e-6)


@pytest.mark.parametrize("prior", [(1 / 3, 1 / 3, 1 / 3), (0.7, 0.2, 0.1)])
def test_every_document_has_the_sum_of_prior_times_probability(prior: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = -40 * torch.rand(3, 2, 60, generator=generator, dtype=torch.float64)  # far apart: it saturates
    starts = torch.zeros(2, 60, dtype=torch.bool)
    starts[:, 0] = starts[0, 7] = starts[0, 8] = starts[1, 50] = True
    log_prior = torch.tensor(prior, dtype=torch.float64).log()
    found = exact(log_probs, starts, log_prior)
    for row in range(2):
        bounds = [*starts[row].nonzero().flatten().tolist(), 60]
        for begin, end in itertools.pairwise(bounds):
            total = torch.logsumexp(log_prior + log_probs[:, row, begin:end].sum(1), 0)
            torch.testing.assert_close(found[row, begin:end].sum(), total, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_equal_experts_mix_to_any_of_them(method: str) -> None:
    log_probs = -9 * torch.rand(1, 2, 30, dtype=torch.float64)
    starts = torch.zeros(2, 30, dtype=torch.bool)
    starts[:, 0] = True
    found = METHODS[method](log_probs.expand(4, 2, 30), starts, torch.zeros(4, dtype=torch.float64).log_softmax(0))
    torch.testing.assert_close(found, log_probs[0], atol=1e-12, rtol=1e-12)


def stand_in(tables: torch.Tensor):
    """A model whose expert j gives every token of the vocabulary the log-probability ``tables[j]``; and its task."""

    def model(inputs, targets, domain):
        assert domain.shape == inputs.shape and (domain == domain[0, 0]).all()
        return (-tables[domain[0, 0]][targets]).float(), {}

    task = SimpleNamespace(
        domains=["law", "code"], source_dictionary=Dictionary(), names_domains=True,
        domain_tokens=lambda: {"code": 30, "law": 10, "poems": 60},
    )  # fmt: skip
    return model, task


def batch_of(*rows: list[int]) -> dict:
    """Rows of targets, padded on the right; a row's input begins with an end mark."""
    longest = max(map(len, rows))
    target = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    inputs = torch.tensor([[EOS, *row[:-1]] + [PAD] * (longest - len(row)) for row in rows])
    return {"target": target, "net_input": {"src_tokens": inputs}}


def document(tables: torch.Tensor, tokens: list[int]) -> float:
    return float(torch.logsumexp(tables[:, tokens].sum(1) + math.log(0.5), 0))


TABLES = torch.randn(2, 9, generator=torch.Generator().manual_seed(3)).double().log_softmax(1)


def test_an_empty_line_ends_a_document_and_padding_says_nothing() -> None:
    model, task = stand_in(TABLES)
    mixture = DomainMixture(task, "exact")
    assert task.names_domains is False
    # A line, an empty line that belongs to it, two lines of another document; and a shorter row.
    first, second, third = [4, 5, EOS, EOS], [6, EOS, 7, 7, EOS], [8, 4]
    found = mixture.log_probs(model, batch_of(first + second, third))
    expected = [document(TABLES, first) + document(TABLES, second), document(TABLES, third)]
    torch.testing.assert_close(found.sum(1), torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=1e-5)
    assert not found[1, 2:].any()
    alone = mixture.log_probs(model, batch_of(third))
    torch.testing.assert_close(found[1, :2], alone[0])


def test_a_given_first_symbol_is_neither_scored_nor_evidence() -> None:
    model, task = stand_in(TABLES)
    mixture = DomainMixture(task, "exact")
    found = mixture.log_probs(model, batch_of([0, 4, 5]), has_bos=True)
    assert found[0, 0] == 0
    assert float(found.sum()) == pytest.approx(document(TABLES, [4, 5]), abs=1e-5)


def test_one_domain_for_all_takes_one_pass_of_its_expert() -> None:
    model, task = stand_in(TABLES)
    mixture = DomainMixture(task, "code")
    found = mixture.log_probs(model, batch_of([4, 5]))
    torch.testing.assert_close(found, TABLES[1, [4, 5]].view(1, 2), atol=1e-6, rtol=1e-6)
    assert mixture.settings == {"domain mixture": "code", "passes over the text": 1}
    mixed = DomainMixture(task, "demix-code").settings
    assert mixed == {"domain mixture": "demix-code", "domain prior": "uniform", "passes over the text": 2}


def test_the_training_texts_shares_are_what_domains_weigh_at_first() -> None:
    model, task = stand_in(TABLES)
    batch = batch_of([4, 5, 6])
    by_share, even = DomainMixture(task, "exact", "train"), DomainMixture(task, "exact", "uniform")
    shares = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    expected = torch.logsumexp(TABLES[:, [4, 5, 6]].sum(1) + shares, 0)
    torch.testing.assert_close(by_share.log_probs(model, batch).sum(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(even.log_probs(model, batch), DomainMixture(task, "exact").log_probs(model, batch))
    assert (by_share.settings["domain prior"], even.settings["domain prior"]) == ("train", "uniform")
    assert by_share.kind != even.kind == "domain mixture"  # records of one run do not stand for each other
    task.domain_tokens = lambda: {"code": 5}
    of_code = DomainMixture(task, "exact", "train").log_probs(model, batch)
    torch.testing.assert_close(of_code, DomainMixture(task, "code").log_probs(model, batch))


def test_what_cannot_be_mixed_is_refused() -> None:
    _, task = stand_in(TABLES)
    with pytest.raises(UserError, match=r"--domain-prior \(train\): has no meaning with --domain-mixture law"):
        DomainMixture(task, "law", "train")
    with pytest.raises(UserError, match=r"--domain-prior \(valid\): must be one of uniform, train"):
        DomainMixture(task, "exact", "valid")
    task.domain_tokens = lambda: {"poems": 5}
    with pytest.raises(UserError, match=r"--domain-prior \(train\): no training text is of the model's law, code"):
        DomainMixture(task, "exact", "train")
    with pytest.raises(UserError, match=r"--domain-mixture \(poems\): must be one of exact, demix-code, law, code"):
        DomainMixture(task, "poems")
    task.domains = None
    with pytest.raises(UserError, match=r"--domain-mixture \(exact\): the model was not trained with --mhmoe-routing"):
        DomainMixture(task, "exact")
