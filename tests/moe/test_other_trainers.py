"""The layer in other people's trainers: copied, pickled, recomputed, with other weights, stored, sharded by FSDP2."""

import copy
import pickle
import warnings

import pytest
import torch
from moe_oracle import relative_error
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe.gate import GATES

DIM = 32
VARIANTS = {
    "plain": {},
    "one head": {"num_heads": 1, "router": "linear"},
    "everything": {
        "activation": "swiglu", "expert_layernorm": True, "shared_expert_dim": 16, "num_projection_layers": 2,
        "routing": "capacity",
    },
    **{routing: {"routing": routing} for routing in GATES if routing != "dropless"},
    "quantized": {"quantize_experts": True, "shared_expert_dim": 16},
    "temperature": {"router_temperature": 0.3, "router_normalize": "both"},
}  # fmt: skip
variants = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str = "plain", seed: int = 0) -> MHMoELayer:
    torch.manual_seed(seed)
    base = {"embed_dim": DIM, "num_heads": 4, "num_experts": 8, "expert_ffn_dim": 24}
    return MHMoELayer(MHMoEConfig(**{**base, **VARIANTS[variant]}))


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(seed))


def loss_of(layer: nn.Module, x: Tensor) -> Tensor:
    output = layer(x)
    return output.hidden.sin().sum() + output.balance_loss + output.z_loss


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in layer.named_parameters()}


@variants
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_computes_the_same_and_shares_nothing(variant, copied):
    layer = build(variant)
    other = copied(layer)
    assert torch.equal(layer(tokens()).hidden, other(tokens()).hidden)
    loss_of(other, tokens()).backward()
    assert all(gradient is None for gradient in gradients(layer).values())
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.add_(1)
    assert all(
        not torch.equal(mine, theirs)
        for mine, theirs in zip(layer.state_dict().values(), other.state_dict().values(), strict=True)
    )


@variants
def test_recomputed_activations_give_the_same_gradients(variant):
    layer, x = build(variant), tokens().requires_grad_()
    loss_of(layer, x).backward()
    plain, plain_x = gradients(layer), x.grad
    layer.zero_grad()
    x.grad = None
    output = checkpoint(layer, x, use_reentrant=False)
    (output.hidden.sin().sum() + output.balance_loss + output.z_loss).backward()
    assert torch.equal(plain_x, x.grad)
    for name, gradient in gradients(layer).items():
        assert torch.equal(plain[name], gradient), name


@variants
def test_called_with_other_weights_it_is_the_layer_that_has_them(variant):
    layer, other = build(variant), build(variant, seed=5)
    weights = {name: parameter.detach() for name, parameter in other.named_parameters()}
    found = functional_call(layer, weights, (tokens(),))
    assert torch.equal(found.hidden, other(tokens()).hidden)
    assert not torch.equal(found.hidden, layer(tokens()).hidden)


@variants
def test_its_state_goes_to_safetensors_and_back_by_load_state_dict_alone(variant):
    layer = build(variant)
    stored = save(layer.state_dict())
    other = build(variant, seed=5)
    other.load_state_dict(load(stored))
    assert torch.equal(layer(tokens()).hidden, other(tokens()).hidden)
    with torch.device("meta"):
        empty = build(variant)
    empty.load_state_dict(load(stored), assign=True)
    assert torch.equal(layer(tokens()).hidden, empty(tokens()).hidden)


class Block(nn.Module):
    """What stands around the layer in a model: a map before and after, both its losses in the sum."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.moe = build(variant)
        self.before, self.after = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        output = self.moe(self.before(x))
        return self.after(output.hidden).square().mean() + output.balance_loss + output.z_loss


def sharded_gradients(variant: str) -> tuple[float, dict[str, Tensor]]:
    """On a rank: the loss of its own tokens, and every gradient, put together from both ranks' shards."""
    rank = torch.distributed.get_rank()
    model = Block(variant)
    mesh = init_device_mesh("cpu", (2,))
    with warnings.catch_warnings():  # that a view must not be changed in place, of any module that returns one
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        for module in (model.moe, model):
            fully_shard(module, mesh=mesh)
        loss = model(tokens(rank))
        loss.backward()
    shards = {name: parameter.grad.to_local().shape for name, parameter in model.named_parameters()}
    assert any(shards[name] != parameter.shape for name, parameter in model.named_parameters())
    return loss.item(), {name: gradient.full_tensor() for name, gradient in gradients(model).items()}


def test_fsdp_refuses_a_temperature_by_name():
    """docs/layer.md says so: its shape is that of checkpoints. When FSDP takes scalars, that sentence can go."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ValueError, match="scalar parameters. Change temperature"):
            fully_shard(build("temperature"), mesh=init_device_mesh("cpu", (2,)))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {"temperature"}))
def test_sharded_over_two_ranks_it_is_one_process(variant, workers2):
    by_rank = workers2.run(sharded_gradients, variant)
    alone = Block(variant)
    losses = [alone(tokens(rank)) for rank in range(2)]
    (sum(losses) / 2).backward()
    for rank, (loss, found) in enumerate(by_rank):
        assert loss == pytest.approx(losses[rank].item(), rel=1e-6)
        for name, expected in gradients(alone).items():
            assert expected.abs().max() > 0 and relative_error(found[name], expected) < 1e-5, name
