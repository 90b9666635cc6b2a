"""Every norm of every kind of model: where the options want one, of which kind, and against its formula."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from beit3_models import beit3_batch, small_beit3
from language_models import small_model, token_rows
from module_flow import ModuleFlow
from torch import Tensor, nn

from mhmoe_fairseq.models.heads import CenteredLayerNorm

EPS = 1e-5  # of all norms
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"no_subln": True, "layernorm_embedding": True},
    {"rms_norm": True},
    {"rms_norm": True, "subln": True, "layernorm_embedding": True},
    {"rms_norm": True, "subln": True, "activation_fn": "silu"},
    {"activation_fn": "silu"},
    {"deepnorm": True},
)
ARCHES = ("dense_lm_tiny", "mhmoe_lm_tiny", "dense_beit3_tiny", "mhmoe_beit3_tiny")


def has_subln(options: dict[str, Any]) -> bool:
    return "subln" in options or not {"no_subln", "rms_norm", "deepnorm"} & options.keys()


def wanted_norms(arch: str, options: dict[str, Any]) -> set[str]:
    """The names of a model's norms outside its experts, of two layers of which an MoE model's second is sparse."""
    prefix, sides = ("decoder", ("",)) if "_lm_" in arch else ("beit3.encoder", (".A", ".B"))
    names = set() if "deepnorm" in options else {"layer_norm"}
    names |= {"layernorm_embedding"} & options.keys()
    for layer in ("layers.0", "layers.1"):
        names |= {f"{layer}.self_attn_layer_norm", f"{layer}.final_layer_norm"}
        if has_subln(options):
            names.add(f"{layer}.self_attn.inner_attn_ln")
    wanted = {f"{prefix}.{name}{side}" for name in names for side in sides}
    dense = ("layers.0",) if arch.startswith("mhmoe") else ("layers.0", "layers.1")
    if has_subln(options):
        wanted |= {f"{prefix}.{layer}.ffn{side}.ffn_layernorm" for layer in dense for side in sides}
    return wanted


def by_formula(x: Tensor, norm: nn.Module, is_rms: bool) -> Tensor:
    if is_rms:
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.weight
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("arch", ARCHES)
def test_norms_are_where_the_options_want_them_and_of_that_kind(arch, options):
    if "_lm_" in arch:
        model, batch = small_model(arch, **options), {"src_tokens": token_rows([6, 6])}
    else:
        model, batch = small_beit3(arch, **options), beit3_batch("pair", [6, 6])
    model.double().eval()
    for parameter in model.parameters():  # no weight is 1 and no bias 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    flow = ModuleFlow(model)
    model(**batch)
    norms = {name: module for name, module in model.named_modules() if type(module).__name__.endswith("Norm")}
    assert norms.keys() == wanted_norms(arch, options)
    for name, norm in norms.items():
        expected = by_formula(flow.into(name), norm, "rms_norm" in options)
        torch.testing.assert_close(flow.out_of(name), expected, rtol=1e-9, atol=1e-9, msg=name)


WIDTH = 5


@pytest.fixture
def norm():
    layer = CenteredLayerNorm(WIDTH)
    torch.manual_seed(3)
    for parameter in layer.parameters():
        parameter.data = torch.randn(WIDTH)
    return layer


def batches(number, rows=4):
    return torch.randn(number, rows, WIDTH, generator=torch.Generator().manual_seed(1)) + 10


def test_the_mean_is_of_all_rows_and_then_of_the_last_batches(norm):
    seen = batches(60)
    for x in seen[:20]:
        norm(x)
    torch.testing.assert_close(norm.running_mean, seen[:20].mean((0, 1)))
    for x in seen[20:]:
        norm(x)
    expected = seen[:50].mean((0, 1))
    for x in seen[50:]:
        expected = 0.98 * expected + 0.02 * x.mean(0)
    torch.testing.assert_close(norm.running_mean, expected)
    assert norm.num_batches.item() == 60


def test_output_and_gradients_are_a_layer_norms_of_the_differences(norm):
    first, x = batches(2)
    norm(first)
    x.requires_grad_()
    out = norm(x)
    rows = x.detach().clone().requires_grad_()
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in (norm.weight, norm.bias))
    mean = (first.mean(0) + rows.detach().mean(0)) / 2  # a constant: no gradient goes through it
    expected = F.layer_norm(rows - mean, (WIDTH,), weight, bias)
    torch.testing.assert_close(out, expected)
    for y in (out, expected):
        y.pow(3).sum().backward()
    for ours, theirs in ((x, rows), (norm.weight, weight), (norm.bias, bias)):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_evaluation_leaves_the_mean_and_looks_at_rows_one_by_one(norm):
    first, x = batches(2)
    norm(first)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm.eval()
    whole = norm(x)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    torch.testing.assert_close(torch.cat([norm(row[None]) for row in x]), whole)
    again = CenteredLayerNorm(WIDTH).eval()
    again.load_state_dict(before)
    assert torch.equal(again(x), whole)


def test_what_all_rows_have_in_common_does_not_show():
    x = batches(1)[0]
    torch.testing.assert_close(CenteredLayerNorm(WIDTH)(x + 100), CenteredLayerNorm(WIDTH)(x), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    norm = CenteredLayerNorm(WIDTH).to(dtype)
    for x in batches(3).to(dtype):
        out = norm(x)
    assert out.dtype == norm.running_mean.dtype == dtype and norm.num_batches.dtype == torch.long
    torch.testing.assert_close(norm.running_mean.double(), batches(3).double().mean((0, 1)), atol=0.1, rtol=0.01)
