"""Every variant of the layer on a CUDA device against the CPU's float64, and that it never makes the host wait."""

import copy

import pytest
import torch
from test_layer import VARIANTS, build
from test_merged import NETWORKS, layer_of

from mhmoe_fairseq.moe.merged import MERGINGS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LAYERS = {
    **{name: (build, {"embed_dim": 32, **fields}) for name, fields in VARIANTS.items()},
    "expert_choice": (build, {"embed_dim": 32, "routing": "expert-choice", "router": "linear"}),
    "capacity": (build, {"embed_dim": 32, "routing": "capacity", "capacity_factor": 0.5}),
    "groups": (build, {"embed_dim": 32, "num_experts": 8, "expert_groups": 4, "kept_groups": 2}),
    **{
        f"{routing}_{network}": (layer_of, {"routing": routing, "embed_dim": 32, **fields})
        for routing in MERGINGS for network, fields in NETWORKS.items()
    },
}  # fmt: skip
every_layer = pytest.mark.parametrize("name", LAYERS)


def layer_and_tokens(name: str, dtype: torch.dtype, **more):
    maker, fields = LAYERS[name]
    layer = maker(**fields, **(more if maker is build else {})).to(dtype)
    torch.manual_seed(7)
    mask = torch.arange(9) >= torch.tensor([9, 6, 0]).unsqueeze(1)  # all of the third row is padding
    return layer, torch.randn(3, 9, 32).to(dtype).masked_fill(mask.unsqueeze(2), torch.nan), mask


def results(layer, x, mask):
    """Output, losses, load and all gradients, by name."""
    x = x.clone().requires_grad_()
    out = layer(x, mask)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(out.hidden)
    total = (out.hidden * weight).sum() + 3 * out.balance_loss + 2 * out.z_loss
    names, parameters = zip(*layer.named_parameters())
    gradients = torch.autograd.grad(total, [x, *parameters], allow_unused=True)
    found = {"hidden": out.hidden, "balance": out.balance_loss, "z": out.z_loss, "load": out.stats.expert_load}
    return {**found, **{name: of for name, of in zip(("input", *names), gradients) if of is not None}}


@every_layer
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equals_the_cpu(name: str, training: bool) -> None:
    layer, x, mask = layer_and_tokens(name, torch.float32)
    layer.train(training)
    want = results(copy.deepcopy(layer).double(), x.double(), mask)
    got = results(layer.cuda(), x.cuda(), mask.cuda())
    assert got.keys() == want.keys()
    sizes = {what: float(expected.detach().abs().max()) for what, expected in want.items()}
    for what, expected in want.items():  # what is zero in exact arithmetic is as exact as the rest
        error = float((got[what].double().cpu() - expected).detach().abs().max())
        assert error <= 3e-5 * max(sizes[what], 0.1 * max(sizes.values())), what


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_never_makes_the_host_wait(name: str, dtype: torch.dtype) -> None:
    layer, x, mask = (of.cuda() for of in layer_and_tokens(name, dtype))
    layer.train()
    weight = torch.ones_like(x)

    def step() -> tuple[torch.Tensor | None, ...]:
        out = layer(x, mask)
        total = (out.hidden * weight).sum() + out.balance_loss + out.z_loss
        return torch.autograd.grad(total, list(layer.parameters()), allow_unused=True)

    step()  # a kernel's first use may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients = [gradient for gradient in step() if gradient is not None]  # an error where the host waits
        with pytest.raises(RuntimeError, match="synchroniz"):
            gradients[0].sum().item()  # CUDA does watch
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@every_layer
def test_autocast_and_half_precision_are_finite(name: str) -> None:
    layer, x, mask = (of.cuda() for of in layer_and_tokens(name, torch.float32))
    with torch.autocast("cuda", torch.bfloat16):
        found = [results(layer, x, mask)]
    found += [results(layer.to(dtype), x.to(dtype), mask) for dtype in (torch.bfloat16, torch.float16)]
    assert all(of.isfinite().all() for each in found for of in each.values())
