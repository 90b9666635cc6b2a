"""Every place of a built model where its flags name a dropout drops at its own rate, and no other place drops.

A model is run once in training with every rate different from all others. At each place what leaves is divided by what
enters: the quotient is the mask, 0 or ``1 / (1 - rate)``. Places are told from modules' inputs and outputs alone, not
from the modules that drop.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from beit3_models import IMAGE_POSITIONS, beit3_batch, small_beit3
from language_models import small_model, token_rows
from module_flow import ModuleFlow
from torch import Tensor, nn

from mhmoe_fairseq.models.heads import LastTokenHead
from mhmoe_fairseq.models.options import BEiT3Options, LanguageModelOptions

RATES = {"dropout": 0.2, "attention_dropout": 0.35, "activation_dropout": 0.5}
NONE = dict.fromkeys(RATES, 0.0)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # TorchScale's activation is float32 whatever the input
WORDS = 11  # with the image's positions as many as an attention head is wide
# One expert for each sub-token, as wide inside as the sub-token: an identity as second map shows the inner activation.
EXPERTS = {"moe_top_k": 1, "moe_ffn_dim": 8, "no_subln": True}
BASELINE = {**EXPERTS, "moe_ffn_dim": 32}
MODELS = {
    "decoder dense gelu": ("dense_lm_tiny", RATES),
    "decoder dense relu": ("dense_lm_tiny", {**RATES, "activation_fn": "relu", "no_subln": True}),
    "decoder dense swiglu": ("dense_lm_tiny", {**RATES, "activation_fn": "silu"}),
    "decoder post-norm": ("dense_lm_tiny", {**RATES, "deepnorm": True}),
    "decoder smoe relu": ("smoe_lm_tiny", {**RATES, **BASELINE, "activation_fn": "relu"}),
    "decoder mhmoe gelu": ("mhmoe_lm_tiny", {**RATES, **EXPERTS}),
    "decoder mhmoe swiglu": ("mhmoe_lm_tiny", {**RATES, **EXPERTS, "activation_fn": "silu"}),
    "decoder torchscale": ("xmoe_lm_tiny", {**RATES, "moe_top_k": 1, "mhmoe_routing": "torchscale"}),
    "encoder dense gelu": ("dense_beit3_tiny", RATES),
    "encoder dense relu": ("dense_beit3_tiny", {**RATES, "activation_fn": "relu", "no_subln": True}),
    "encoder dense swiglu": ("dense_beit3_tiny", {**RATES, "activation_fn": "silu"}),
    "encoder post-norm": ("dense_beit3_tiny", {**RATES, "deepnorm": True}),
    "encoder mhmoe gelu": ("mhmoe_beit3_tiny", {**RATES, **EXPERTS}),
    "encoder mhmoe separate": ("mhmoe_beit3_tiny", {**RATES, **EXPERTS, "mhmoe_modality_experts": "separate"}),
    "encoder dense drop path": ("dense_beit3_tiny", {**NONE, "encoder_layers": 3, "drop_path_rate": 0.6}),
    "encoder mhmoe drop path": (
        "mhmoe_beit3_tiny",
        {**NONE, **EXPERTS, "encoder_layers": 3, "drop_path_rate": 0.6, "mhmoe_modality_experts": "separate"},
    ),
}


class Place(NamedTuple):
    """Where something may be dropped.

    Attributes:
        name: for messages.
        rate: what should be dropped.
        source: what ``before`` and ``after`` are functions of.
        before: what enters.
        after: what leaves, of the same shape.
        by_row: whole rows are dropped, the first dimension's.
        heads: of attention, whose dropped weights multiply ``source``, the values; 0 elsewhere.
    """

    name: str
    rate: float
    source: Tensor
    before: Tensor
    after: Tensor
    by_row: bool = False
    heads: int = 0

    def kept(self) -> Tensor:
        """The places that are kept, ``(rows, features)`` as 0 and 1, NaN where nothing entered."""
        mask = (self.after / self.before).detach().flatten(0, -2)
        known = self.before.detach().flatten(0, -2).abs() > 1e-9
        return torch.where(known, (mask.abs() > 1e-6).double(), torch.nan)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of ``source`` for a random gradient of ``after``, and the same by the mask that the values tell."""
        kept = self.kept().view_as(self.after)
        weights = torch.randn(self.after.shape, dtype=torch.double) * ~kept.isnan()
        actual = torch.autograd.grad(self.after, self.source, weights, retain_graph=True)[0]
        if self.heads:
            attention, given = (x.detach().unflatten(-1, (self.heads, -1)) for x in (self.after, weights))
            expected = torch.einsum("bqhk,bqhj->khj", attention, given).flatten(1)
            return actual, expected[: actual.size(0)]
        masked = weights * kept.nan_to_num(0) / (1 - self.rate)
        return actual, torch.autograd.grad(self.before, self.source, masked, retain_graph=True)[0]


class OneHotValues(nn.Module):
    """In place of the values' projection: attention then returns its weights, key by key."""

    def __init__(self, heads: int, length: int, width: int) -> None:
        super().__init__()
        values = torch.eye(length, width // heads, dtype=torch.double).repeat(1, heads)
        self.values = nn.Parameter(values)

    def forward(self, x: Tensor, split: int = 0) -> Tensor:
        return self.values[: x.size(1)].expand(x.size(0), -1, -1)


class Observed:
    """A built model with what flows through it."""

    def __init__(self, name: str, rows: int = 12) -> None:
        arch, self.flags = MODELS[name]
        self.rates = {**NONE, "drop_path_rate": 0.0, **self.flags}
        flags = {"layernorm_embedding": True, **self.flags}
        self.is_encoder = "beit3" in arch
        if self.is_encoder:
            self.model = small_beit3(arch, **flags).double()
            self.stack, self.prefix = self.model.beit3.encoder, "beit3.encoder"
            self.batch = beit3_batch("pair", [WORDS] * rows)
        else:
            self.model = small_model(arch, **flags).double()
            self.stack, self.prefix = self.model.decoder, "decoder"
            self.batch = {"src_tokens": token_rows([WORDS + IMAGE_POSITIONS] * rows)}
        for layer in self.stack.layers:
            layer.self_attn.v_proj = OneHotValues(2, WORDS + IMAGE_POSITIONS, 32)
        for module in self.model.modules():
            if hasattr(module, "fc2_weight"):  # experts
                module.fc2_weight.data = torch.eye(module.fc2_weight.size(1)).double().expand_as(module.fc2_weight)
                module.fc2_bias.data.zero_()
        self.flow = ModuleFlow(self.model)

    def places(self, training: bool = True, seed: int = 0) -> list[Place]:
        """All places, after a forward pass."""
        torch.manual_seed(seed)
        self.model.train(training)(**self.batch)
        found = [self.embedding()]
        for depth, layer in enumerate(self.stack.layers):
            name = f"{self.prefix}.layers.{depth}"
            found += [self.attention(name, layer), *self.blocks(name, depth, layer)]
        for name, module in self.model.named_modules():
            if hasattr(module, "fc1") and name in self.flow.outputs:
                found += self.network(name, module)
            elif hasattr(module, "fc2_weight"):
                found.append(self.experts(name, module))
            elif hasattr(module, "merge_projection"):
                found.append(self.moe_layer(name, module))
        return found

    def embedding(self) -> Place:
        before = self.flow.out_of(f"{self.prefix}.layernorm_embedding")
        return Place("embedding", self.rates["dropout"], before, before, self.flow.into(f"{self.prefix}.layers.0"))

    def attention(self, name: str, layer: nn.Module) -> Place:
        """The attention weights: again without dropout from the same input."""
        inner = f"{name}.self_attn." + ("out_proj" if layer.self_attn.inner_attn_ln is None else "inner_attn_ln")
        after, values = self.flow.into(inner), layer.self_attn.v_proj.values
        causal = {} if self.is_encoder else {"is_causal": True}
        before = self.flow.evaluated(f"{name}.self_attn", layer.self_attn, **causal).into(inner)
        rate, heads = self.rates["attention_dropout"], layer.self_attn.num_heads
        return Place(f"{name}: attention weights", rate, values, before, after, heads=heads)

    def blocks(self, name: str, depth: int, layer: nn.Module) -> Iterator[Place]:
        """What attention and the feed-forward part give, and what the residual stream takes."""
        flow, is_pre_norm = self.flow, "deepnorm" not in self.flags
        into = flow.into(name)
        attended, ended = flow.into(f"{name}.final_layer_norm"), flow.out_of(name)[0]
        if is_pre_norm:
            sums = (attended - into, ended - attended)
        else:
            alpha = (2 * len(self.stack.layers)) ** 0.25
            sums = (
                flow.into(f"{name}.self_attn_layer_norm") - alpha * into,
                flow.into(f"{name}.final_layer_norm") - alpha * flow.out_of(f"{name}.self_attn_layer_norm"),
            )
        attention = flow.out_of(f"{name}.self_attn")
        forward = flow.out_of(f"{name}.moe_layer").hidden if layer.is_moe_layer else flow.out_of(f"{name}.ffn")
        path = self.rates["drop_path_rate"] * depth / max(len(self.stack.layers) - 1, 1)
        by_row = self.rates["drop_path_rate"] > 0
        rate = path if by_row else self.rates["dropout"]
        yield Place(f"{name}: after attention", rate, attention, attention, sums[0], by_row)
        yield Place(f"{name}: after feed-forward", path, forward, forward, sums[1], by_row)

    def network(self, name: str, module: nn.Module) -> Iterator[Place]:
        """A dense network, of TorchScale's static experts too."""
        flow, kind = self.flow, self.flags.get("activation_fn", "gelu")
        hidden = flow.out_of(f"{name}.fc1")
        before = ACTIVATIONS[kind](hidden)
        if kind == "silu":
            before = before * flow.out_of(f"{name}.gate")
        after = flow.into(f"{name}.{'fc2' if module.ffn_layernorm is None else 'ffn_layernorm'}")
        yield Place(f"{name}: inner activation", self.rates["activation_dropout"], hidden, before, after)
        inner = flow.out_of(f"{name}.fc2")
        after = flow.out_of(name).view_as(inner)
        yield Place(f"{name}: output", self.rates["dropout"], inner, inner, after)

    def experts(self, name: str, module: nn.Module) -> Place:
        """Our experts' inner activation: again without dropout from the same input."""
        before, _ = self.flow.evaluated(name, module).out_of(name)
        rate, source = self.rates["activation_dropout"], self.flow.into(name)
        return Place(f"{name}: inner activation", rate, source, before, self.flow.out_of(name)[0])

    def moe_layer(self, name: str, module: nn.Module) -> Place:
        """The output of an MH-MoE layer, once."""
        hidden = self.flow.out_of(name).hidden
        if module.merge_projection is None:
            inner, _ = self.flow.out_of(f"{name}.experts")
        else:
            inner = self.flow.out_of(f"{name}.merge_projection")
        return Place(f"{name}: output", self.rates["dropout"], inner, inner.view_as(hidden), hidden)


ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "relu": lambda x: x * (x > 0),
    "silu": lambda x: x / (1 + (-x).exp()),
}


@pytest.fixture(scope="module", params=MODELS)
def observed(request):
    return Observed(request.param)


def assert_share(kept: Tensor, expected: float, name: str) -> None:
    """The share of ones among independent draws, within five standard deviations."""
    draws = kept[~kept.isnan()]
    allowed = 5 * math.sqrt(expected * (1 - expected) / draws.numel())
    assert draws.numel() >= 300 and abs(draws.mean().item() - expected) <= allowed, (name, draws.mean(), expected)


def test_every_place_drops_at_its_own_rate_and_rescales(observed):
    for place in observed.places():
        if place.by_row:
            continue
        assert_share(place.kept(), 1 - place.rate, place.name)
        mask = torch.where(place.kept().view_as(place.after) > 0, 1 / (1 - place.rate), 0.0)
        torch.testing.assert_close(place.after, place.before * mask, **CLOSE, msg=place.name)


def test_rows_features_and_calls_are_dropped_independently(observed):
    for place, again in zip(observed.places(seed=0), observed.places(seed=1)):
        if place.by_row or place.rate == 0:
            continue
        kept, both = place.kept(), (1 - place.rate) ** 2
        assert_share(kept[1:] * kept[:-1], both, f"{place.name}: rows")
        assert_share(kept[:, 1:] * kept[:, :-1], both, f"{place.name}: features")
        if kept.shape == again.kept().shape:  # routing may differ after a dropout
            assert_share(kept * again.kept(), both, f"{place.name}: calls")


def test_nothing_is_dropped_in_evaluation(observed):
    for place in observed.places(training=False):
        torch.testing.assert_close(place.after, place.before, **CLOSE, msg=place.name)


def test_gradients_pass_where_values_do(observed):
    for place in observed.places():
        torch.testing.assert_close(*place.gradients(), **CLOSE, msg=place.name)


@pytest.mark.parametrize("name", [name for name in MODELS if "drop path" in name])
def test_whole_samples_leave_out_a_block_with_a_rate_that_rises_by_layer(name):
    observed = Observed(name, rows=200)
    places = [place for place in observed.places() if place.by_row]
    assert [round(place.rate, 9) for place in places] == [0, 0, 0.3, 0.3, 0.6, 0.6]
    masks = []
    for place in places:
        mask = (place.after / place.before).flatten(1)
        known = place.before.flatten(1).abs() > 1e-6
        row = torch.stack([values[of_row].mean() for values, of_row in zip(mask, known)])
        expected = torch.where(row > 0.5, 1 / (1 - place.rate), 0.0)
        torch.testing.assert_close(place.after.flatten(1), place.before.flatten(1) * expected[:, None])
        share = (expected > 0).double().mean().item()
        assert abs(share - (1 - place.rate)) <= 5 * math.sqrt(place.rate * (1 - place.rate) / 200), place.name
        masks.append(expected > 0)
    for one, other in ((2, 3), (4, 5)):  # the two blocks of a layer
        assert not torch.equal(masks[one], masks[other])


def test_a_classification_heads_features_are_dropped():
    torch.manual_seed(0)
    head = LastTokenHead(64, 64, 0.3).double().train()
    head.weight.data = torch.eye(64).double()
    features = torch.randn(50, 3, 64, dtype=torch.double, requires_grad=True)
    calls = [head(features, torch.zeros(50, 3, dtype=torch.bool)) for _ in range(2)]
    before = features[:, -1]
    places = [Place("head", 0.3, features, before, after) for after in calls]
    for place in places:
        kept = place.kept()
        assert_share(kept, 0.7, "head")
        torch.testing.assert_close(place.after, before * kept / 0.7)
        assert_share(kept[1:] * kept[:-1], 0.49, "rows")
    assert_share(places[0].kept() * places[1].kept(), 0.49, "calls")
    torch.testing.assert_close(head.eval()(features, torch.zeros(50, 3, dtype=torch.bool)), before)


def test_every_dropout_that_the_options_name_is_looked_at():
    named = {
        field.name
        for options in (LanguageModelOptions, BEiT3Options)
        for field in dataclasses.fields(options)
        if "dropout" in field.name or "drop_path" in field.name
    }
    assert named == {*RATES, "drop_path_rate"}
