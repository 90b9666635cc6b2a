"""Our dense network against TorchScale's own, in every number format."""

import pytest
import torch
from torchscale.component.feedforward_network import FeedForwardNetwork

from mhmoe_fairseq.torchscale_ext.feed_forward import build_dense_ffn
from mhmoe_fairseq.torchscale_ext.settings import DecoderSettings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_equals_torchscales_bit_for_bit_and_keeps_less(activation, dtype):
    settings = DecoderSettings(activation_fn=activation, subln=True, dropout=0.1, activation_dropout=0.2)
    ours = build_dense_ffn(settings, 24, 56)
    theirs = FeedForwardNetwork(24, 56, activation, 0.1, 0.2, settings.layernorm_eps, subln=True)
    theirs.load_state_dict(ours.state_dict())
    found, kept = [], []
    for network in (ours, theirs):
        x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0)).transpose(0, 1).requires_grad_()
        saved = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                y = network(x)
        grads = torch.autograd.grad(y.float().sin().sum(), [x, *network.parameters()])
        found.append([y, *grads])
        kept.append(sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in saved}.values()))
    assert all(map(torch.equal, *found))
    assert kept[0] <= kept[1] - (15 * 56 * 2 if dtype != torch.float32 else 0)
