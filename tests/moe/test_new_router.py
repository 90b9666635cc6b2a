"""A router that is written in one file is counted, planned, analysed and told of updates, or refused by its name."""

import pytest
import torch
from language_models import count_model, small_model, token_rows
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mhmoe_fairseq.analysis.plan.activation_memory import ActivationMemory, shape_of
from mhmoe_fairseq.evaluation.expert_loads import LoadCounter
from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.counts import count_built
from mhmoe_fairseq.moe import ConfigError, MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe.config import choices
from mhmoe_fairseq.moe.router import ROUTERS, Router, RouterFields

BUILT_IN = tuple(ROUTERS)
FIELDS = {"embed_dim": 24, "num_heads": 4, "num_experts": 5, "expert_ffn_dim": 16, "router": "two_layers"}


class TwoLayerRouter(Router):
    """``W2 tanh(W1 x)`` with as many hidden units as features."""

    def __init__(self, config: RouterFields) -> None:
        super().__init__(config)
        self.first = nn.Linear(config.subtoken_dim, config.subtoken_dim, bias=False)
        self.second = nn.Linear(config.subtoken_dim, config.num_experts, bias=False)

    @staticmethod
    def num_params(config: RouterFields) -> int:
        return config.subtoken_dim * (config.subtoken_dim + config.num_experts)

    @staticmethod
    def flops(config: RouterFields) -> int:
        return 2 * TwoLayerRouter.num_params(config)

    def scores(self, x_Nd: Tensor) -> Tensor:
        return self.second(self.first(x_Nd).tanh())


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS, "two_layers", TwoLayerRouter)


def test_it_is_counted_like_the_built_layer() -> None:
    layer = MHMoELayer(MHMoEConfig(**FIELDS)).double()
    assert isinstance(layer.router, TwoLayerRouter) and choices("router") == (*BUILT_IN, "two_layers")
    counts = layer.counts()
    assert counts.params == sum(parameter.numel() for parameter in layer.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(6, 24, dtype=torch.float64))
    assert counter.get_total_flops() == 6 * counts.flops_per_token
    wide = MHMoEConfig(**{**FIELDS, "num_heads": 1, "expert_ffn_dim": 640})
    matched = MHMoEConfig.matching(wide, budget="params", num_heads=4)
    assert -0.005 <= matched.budget_gap(wide).params <= 0


def test_models_plans_and_analyses_use_it_or_refuse_it_by_name() -> None:
    model = small_model(mhmoe_router="two_layers").eval()
    options = architecture_options("mhmoe_lm_tiny", mhmoe_router="two_layers")
    counts = count_model(options)
    linear = count_model(architecture_options("mhmoe_lm_tiny", mhmoe_router="linear"))
    assert counts.total - linear.total > 0 and counts.flops_per_token != linear.flops_per_token
    assert count_built(model, 8).total == sum(parameter.numel() for parameter in model.parameters())
    loads = LoadCounter(model.decoder.layers)
    with loads.counting(), torch.no_grad():
        model(token_rows([7, 3]))
    assert sum(loads.loads.layers[0].loads) == 10 * 4 * 2
    with pytest.raises(ConfigError, match=r"router \('two_layers'\) does not say"):
        ActivationMemory(shape_of(model), "loop", exchanged=False, cpu=True).kept()
    with pytest.raises(ValueError, match=r"--mhmoe-router \('two_layers'\) cannot be combined"):
        small_model("smoe_lm_tiny", mhmoe_router="two_layers", mhmoe_routing="torchscale")


def test_what_it_has_no_use_for_is_refused_and_so_is_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"router_temperature \(0.3\) needs the xmoe router; router is 'two_layers'"):
        MHMoEConfig(**FIELDS, router_temperature=0.3)
    with pytest.raises(ConfigError, match=rf"router \('three'\) must be one of {', '.join(BUILT_IN)}, two_layers"):
        MHMoEConfig(**{**FIELDS, "router": "three"})
