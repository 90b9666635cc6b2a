"""A small model with names of an encoder of ours, whose layers learn at different rates."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from fairseq import optim
from parallel_runs import configuration
from torch import Tensor, nn

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
from mhmoe_fairseq.training import prepare_sharded_model
from mhmoe_fairseq.training.optimizer import scale_by_name, scale_layers

LAYER = MHMoEConfig(embed_dim=8, num_heads=2, num_experts=4, top_k=2, expert_ffn_dim=6, router="xmoe")
DECAY, HEAD, LR, BETAS, EPS, WEIGHT_DECAY = 0.5, 3.0, 0.01, (0.9, 0.98), 1e-6, 0.1
ADAM = ["--lr", LR, "--adam-betas", str(BETAS), "--adam-eps", EPS, "--weight-decay", WEIGHT_DECAY]
# Two layers: the embedding is three steps below the top.
FACTORS = {"embed": 0.5**3, "layers.0": 0.5**2, "layers.1": 0.5, "norm": 1.0, "heads.task": HEAD}


class Model(nn.Module):
    """Names as in an encoder of ours."""

    def __init__(self, parallel=None):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Linear(8, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), MHMoELayer(LAYER, parallel=parallel)])
        self.norm = nn.LayerNorm(8)
        self.heads = nn.ModuleDict({"task": nn.Linear(8, 2)})

    def forward(self, x):
        x = self.layers[0](self.embed(x))
        output = self.layers[1](x)
        return self.heads["task"](self.norm(x + output.hidden)).square().sum() + output.balance_loss


@functools.cache
def settings(*flags: object) -> Any:
    """fairseq takes long to make them."""
    return configuration(*map(str, (*ADAM, *flags)))


def build(decay: float = DECAY, head: float = HEAD, parallel: Any = None, flags: tuple = ()) -> tuple[Model, Any]:
    """The model and its optimizer, as fairseq's trainer builds them."""
    config = settings(*flags)
    model = Model(parallel)
    prepare_sharded_model(model, config.task)
    scale_by_name(model, config.task)
    scale_layers(model, config.task, decay, head)
    common = config.common
    if common.fp16:
        model.half()
        wrapper = optim.MemoryEfficientFP16Optimizer if common.memory_efficient_fp16 else optim.FP16Optimizer
        return model, wrapper.build_optimizer(config, list(model.parameters()))
    return model, optim.build_optimizer(config.optimizer, list(model.parameters()))


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))


def step(model: Model, optimizer: Any, x: Tensor) -> float:
    """One update; the norm of the gradient, which is clipped to 0.5."""
    optimizer.zero_grad()
    optimizer.backward(model(x.to(next(model.parameters()).dtype)))
    optimizer.all_reduce_grads(SimpleNamespace())
    norm = optimizer.clip_grad_norm(0.5)
    optimizer.step()
    return float(norm)


def factor(name: str) -> float:
    """Of the learning rate by layer, of a parameter of ``build()``."""
    return next(value for prefix, value in FACTORS.items() if name.startswith(prefix))


def adam_by_hand(
    model: Model, batches: list[Tensor], lr: float, factor_of: Callable[[str], float]
) -> dict[str, Tensor]:
    """Parameters after some steps of Adam with decoupled weight decay, each at its own learning rate."""
    values = {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}
    first, second = ({name: torch.zeros_like(value) for name, value in values.items()} for _ in range(2))
    for number, x in enumerate(batches, 1):
        for name, parameter in model.named_parameters():
            parameter.data = values[name].float()
        gradients = dict(zip(values, torch.autograd.grad(model(x), list(model.parameters()))))
        total = sum(float(gradient.double().square().sum()) for gradient in gradients.values()) ** 0.5
        for name, value in values.items():
            gradient = gradients[name].double() * min(1.0, 0.5 / (total + 1e-6))
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * gradient
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * gradient**2
            corrected = (1 - BETAS[1] ** number) ** 0.5 / (1 - BETAS[0] ** number)
            own = lr * factor_of(name)
            value -= own * WEIGHT_DECAY * value
            value -= own * corrected * first[name] / (second[name].sqrt() + EPS)
    return values
