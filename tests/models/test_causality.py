"""No language model's outputs depend on later tokens: every family, routing, router and flag that there is.

A token is changed, and whatever stands before it is compared. Not to the bit: groups of experts of another size make
other products.
"""

import itertools

import pytest
import torch
from language_models import small_model, token_rows
from test_option_effects import OWN, SHARED, SIZES
from torch import Tensor, nn

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.models import flags
from mhmoe_fairseq.models.architectures import FAMILIES
from mhmoe_fairseq.models.options import BENCHMARK_ROUTERS, ROUTER_CHOICES, ROUTING_CHOICES

TOLERANCE = 1e-6
LENGTH, BATCH = 9, 3
# Of every value of --mhmoe-routing. A new one is put where it belongs, and language models refuse what is not causal.
CAUSAL = {"dropless": {}, "relu": {}, "lory": {"mhmoe_segment_length": 3}}
CAUSAL_BY_DOMAIN = {"domain"}  # a text's, which is known before it
REFUSED = {"smear", "expert-choice"}
BY_DROPS = {"capacity", "torchscale"}  # causal with one expert per sub-token, or where none is dropped
ROUTERS = [str(choice.value) for choice in ROUTER_CHOICES if choice.value not in BENCHMARK_ROUTERS.values()]
FAMILIES_AND_ROUTINGS = [
    (family, routing)
    for family, routing in itertools.product(FAMILIES, CAUSAL)
    if family != "dense" and (routing == "dropless" or family in ("smoe", "xmoe"))  # lory refuses what others are about
]
EFFECTS = {**SHARED, **OWN["decoder"]}
FLAGS = [  # but those of routing, which have tests of their own
    name
    for name, effect in EFFECTS.items()
    if effect.kind == "function" and name != "mhmoe_routing" and effect.other.get("mhmoe_routing") not in BY_DROPS
]


def earlier_and_later(model: nn.Module, changed: int, **inputs: Tensor) -> tuple[float, float]:
    """How much the outputs before a position and behind it differ when the last row's token there is another.

    Of the last row alone: capacity is handed out row by row, so those behind see the whole rows before.
    """
    model = model.double().eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "first_E" in name or "bias" in name or "_shift" in name:  # what begins at zero would hide its use
                parameter.normal_(std=0.1)
        before, after = (model(tokens, **inputs)[0] for tokens in (rows(), rows(changed)))
    difference = (after - before).abs().amax(-1)
    return difference[:, :changed].max().item(), difference[-1, changed:].max().item()


def rows(changed: int | None = None) -> Tensor:
    tokens = token_rows([LENGTH] * BATCH)
    if changed is not None:
        tokens[-1, changed] = 4 + (tokens[-1, changed] + 17) % 40
    return tokens


def worst_leak(model: nn.Module, **inputs: Tensor) -> float:
    leaks = []
    for changed in range(1, LENGTH):
        earlier, later = earlier_and_later(model, changed, **inputs)
        assert later > 1e-4, "the token that was changed has no effect"
        leaks.append(earlier)
    return max(leaks)


def test_every_routing_is_said_to_be_causal_or_not():
    assert {*CAUSAL, *CAUSAL_BY_DOMAIN, *REFUSED, *BY_DROPS} == {str(choice.value) for choice in ROUTING_CHOICES}


def test_no_dense_model_sees_later_tokens():
    assert worst_leak(small_model("dense_lm_tiny")) < TOLERANCE


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family, routing", FAMILIES_AND_ROUTINGS)
def test_no_family_sees_later_tokens(family, routing, router):
    own = {"moe_freq": 1, "mhmoe_routing": routing, "mhmoe_router": router, **CAUSAL[routing]}
    assert worst_leak(small_model(f"{family}_lm_tiny", **own)) < TOLERANCE


@pytest.mark.parametrize("routing", sorted(CAUSAL_BY_DOMAIN))
def test_experts_of_domains_see_no_later_tokens(routing):
    domain = (torch.arange(BATCH * LENGTH) % 8).view(BATCH, LENGTH)
    assert worst_leak(small_model("smoe_lm_tiny", mhmoe_routing=routing), domain=domain) < TOLERANCE


@pytest.mark.parametrize("name", FLAGS)
def test_no_flag_makes_a_model_see_later_tokens(name):
    effect = EFFECTS[name]
    own = {f"decoder_{key}" if key in SIZES else key: value for key, value in effect.other.items()}
    if name in ("moe_gating_use_fp32", "mhmoe_precision"):  # half precision would hide a small leak, or make one
        own, value = {}, "fp32" if name == "mhmoe_precision" else True
    else:
        value = effect.value
    model = small_model(f"{effect.arch}_lm_tiny", **own, **{name: value})
    assert worst_leak(model) < TOLERANCE


@pytest.mark.parametrize("routing", sorted(REFUSED))
@pytest.mark.parametrize("family", ["smoe", "xmoe"])
def test_what_sees_later_tokens_is_refused_and_would_fail_here(family, routing, monkeypatch):
    with pytest.raises(UserError, match=f"--mhmoe-routing {routing} is for BEiT-3 and not for language models: .*"):
        small_model(f"{family}_lm_tiny", mhmoe_routing=routing)
    monkeypatch.setattr(flags, "_check_causal", lambda options: None)
    assert worst_leak(small_model(f"{family}_lm_tiny", mhmoe_routing=routing)) > 1e-4


@pytest.mark.parametrize("routing", sorted(BY_DROPS))
@pytest.mark.parametrize("top_k, fraction, leaks", [(1, 0.15, False), (2, 1.0, False), (2, 0.15, True)])
def test_capacity_leaks_by_what_is_dropped_of_second_choices(routing, top_k, fraction, leaks):
    """All first choices, later tokens' too, queue before all second ones (GShard)."""
    tight = {"moe_top_k": top_k, "moe_eval_capacity_token_fraction": fraction}
    worst = worst_leak(small_model("smoe_lm_tiny", mhmoe_routing=routing, **tight))
    assert worst > 1e-4 if leaks else worst < TOLERANCE
