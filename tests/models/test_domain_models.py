"""Language models whose experts are domains: what flags make of them, what they cost, and how they are called."""

import pytest
import torch
from language_models import SMALL, count_model, small_model, token_rows
from torch import Tensor

from mhmoe_fairseq.analysis.plan.activation_memory import ActivationMemory, shape_of
from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.flags import encoder_settings, moe_config

FLAGS = {"mhmoe_routing": "domain", "moe_expert_count": 3, "moe_freq": 1}


def tokens_and_domains() -> tuple[Tensor, Tensor]:
    tokens = token_rows([9, 6])
    return tokens, (torch.arange(tokens.numel()).view(tokens.shape) // 4) % 3


def test_the_name_and_a_number_are_enough() -> None:
    config = moe_config(architecture_options("smoe_lm_tiny", **FLAGS))
    assert (config.router, config.routing, config.top_k, config.num_heads) == ("domain", "dropless", 1, 1)


def test_it_has_the_flops_of_a_dense_model_and_an_expert_for_each_domain() -> None:
    dense, domains = (
        count_model(architecture_options(f"{arch}_lm_tiny", **SMALL, **flags))
        for arch, flags in (("dense", {}), ("smoe", FLAGS))
    )
    assert domains.flops_per_token == dense.flops_per_token
    assert domains.active == dense.total
    assert domains.expert == 3 * (dense.total - domains.non_expert)


def test_a_choice_without_a_router_keeps_less_for_its_backward_pass() -> None:
    kept = [
        ActivationMemory(shape_of(small_model("smoe_lm_tiny", **flags)), "loop", exchanged=False, cpu=True).kept()
        for flags in (FLAGS, {**FLAGS, "mhmoe_routing": "dropless", "moe_top_k": 1})
    ]
    assert 0.9 * kept[1] < kept[0] < kept[1]


@pytest.mark.parametrize("family", ["xmoe", "mhmoe"])
def test_other_families_have_a_router_and_are_refused(family: str) -> None:
    options = architecture_options(f"{family}_lm_tiny", mhmoe_routing="domain")
    with pytest.raises(UserError, match=r"--mhmoe-router \(xmoe\) contradicts --mhmoe-routing domain, which has none"):
        moe_config(options)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"moe_top_k": 2}, r"--moe-top-k \(2\) must be 1: all of a token goes to its domain"),
        ({"mhmoe_heads_number": 2, "mhmoe_budget": "none"}, r"--mhmoe-heads-number \(2\) must be 1"),
        ({"mhmoe_capacity_factor": 2.0}, "--mhmoe-capacity-factor is about capacity; it contradicts domain routing"),
    ],
)
def test_what_contradicts_is_refused_by_its_flag(flags: dict, line: str) -> None:
    with pytest.raises(UserError, match=line):
        moe_config(architecture_options("smoe_lm_tiny", **{**FLAGS, **flags}))


def test_an_encoder_has_no_domains() -> None:
    with pytest.raises(UserError, match="--mhmoe-routing domain is for language models"):
        encoder_settings(architecture_options("smoe_beit3_tiny", mhmoe_routing="domain"), 50)


def test_each_position_depends_on_its_own_and_earlier_domains_alone() -> None:
    model = small_model("smoe_lm_tiny", **FLAGS).eval()
    tokens, domains = tokens_and_domains()
    before = model(tokens, domain=domains)[0]
    changed = domains.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 3
    after = model(tokens, domain=changed)[0]
    torch.testing.assert_close(after[0, :5], before[0, :5])
    torch.testing.assert_close(after[1], before[1])
    assert (after[0, 5] - before[0, 5]).abs().max() > 1e-3


def test_step_by_step_is_as_all_at_once() -> None:
    model = small_model("smoe_lm_tiny", **FLAGS).eval()
    tokens, domains = tokens_and_domains()
    whole = model(tokens, domain=domains)[0]
    state: dict = {}
    for end in range(1, 7):  # the shorter row's tokens
        step = model(tokens[:, :end], domain=domains[:, :end], incremental_state=state)[0]
        torch.testing.assert_close(step[:, -1], whole[:, end - 1], atol=1e-5, rtol=1e-4)


def test_activations_that_are_computed_again_are_those_of_the_same_domains() -> None:
    gradients = []
    for again in (False, True):
        model = small_model("smoe_lm_tiny", **FLAGS, checkpoint_activations=again).train()
        tokens, domains = tokens_and_domains()
        model(tokens, domain=domains)[0].square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_a_model_with_a_router_takes_no_domains() -> None:
    tokens, domains = tokens_and_domains()
    with pytest.raises(UserError, match="domain .* is given, but router is not 'domain'"):
        small_model("smoe_lm_tiny")(tokens, domain=domains)
