"""Every norm of every kind of model: where the options want one, of which kind, and against its formula."""

from typing import Any

import pytest
import torch
from beit3_models import beit3_batch, small_beit3
from language_models import small_model, token_rows
from module_flow import ModuleFlow
from torch import Tensor, nn

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
