"""The layer and what it is compared with, each as a step: one forward and one backward pass at one setting.

Every module here maps x ``(T, D)`` to an object with ``hidden (T, D)`` and ``balance_loss`` (or None). A rival is made
from a layer of ours, with its weights and projections: a comparison compares how the experts are run and nothing else.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer

# What products compute in. "bf16" is a layer that was converted; "autocast" one whose float32 weights and input are
# cast in every step, with float32 gradients: what training with --mhmoe-precision bf16 does.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.bfloat16}
BALANCE_WEIGHT, SEED = 0.01, 1
INPUTS = 8  # taken in turn: experts get other numbers of rows in every step, as in training
SIZES = {
    "embed_dim": ("D", "model dimension"), "num_heads": ("H", "MH-MoE heads"), "num_experts": ("E", "experts"),
    "top_k": ("K", "experts per sub-token"), "ffn_dim": ("F", "inner width of an expert"),
    "tokens": ("T", "tokens of a step"),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What one measurement is of: T tokens, E experts, number format (of ``DTYPES``), D, H, K, an expert's width F."""

    tokens: int
    num_experts: int
    dtype: str = "fp32"
    embed_dim: int = 768
    num_heads: int = 4
    top_k: int = 2
    ffn_dim: int = 3072
    threads: int = 2

    def __post_init__(self) -> None:
        self.config()  # the layer's own checks: heads divide the width, k at most E, ...

    def flops(self) -> int:
        """Multiply-adds counted twice, forward and both backward products, experts and projections."""
        config = self.config()
        maps = config.has_head_projection + config.has_merge_projection
        return 3 * 2 * self.tokens * self.embed_dim * (2 * self.top_k * self.ffn_dim + maps * self.embed_dim)

    def config(self, is_swiglu: bool = False) -> MHMoEConfig:
        """Our layer with GELU experts and TorchScale's X-MoE router; or as Mixtral's block computes, at equal FLOPs."""
        names = ("embed_dim", "num_heads", "num_experts", "top_k")
        ours = MHMoEConfig(**{name: getattr(self, name) for name in names}, expert_ffn_dim=self.ffn_dim)
        mixtral = {"router": "linear", "activation": "swiglu", "expert_bias": False}
        return dataclasses.replace(ours, **mixtral, expert_ffn_dim=2 * self.ffn_dim // 3) if is_swiglu else ours

    def label(self, but: str = "") -> str:
        """Returns sizes, number format and threads in words, without the size ``but``."""
        sizes = [f"{letter}={getattr(self, size)}" for size, (letter, _) in SIZES.items() if size != but]
        return f"{' '.join(sizes)} {self.dtype}, {self.threads} thread{'s' * (self.threads > 1)}"


class BetweenProjections(nn.Module):
    """A rival's experts on the sub-tokens ``(N, d)``, between the projections of the layer that it is made from."""

    def __init__(self, ours: MHMoELayer) -> None:
        super().__init__()
        self.config = ours.config
        self.head_projection = ours.head_projection if self.config.has_head_projection else nn.Identity()
        self.merge_projection = ours.merge_projection if self.config.has_merge_projection else nn.Identity()

    def forward(self, x: Tensor) -> SimpleNamespace:
        y = self.experts_of(self.head_projection(x).view(-1, self.config.subtoken_dim))
        return SimpleNamespace(hidden=self.merge_projection(y.hidden.reshape(x.shape)), balance_loss=y.balance_loss)


class PlainLoop(BetweenProjections):
    """The loop that everyone writes first: select an expert's rows, linear, GELU, linear, weight, ``index_add``."""

    def __init__(self, ours: MHMoELayer) -> None:
        super().__init__(ours)
        self.router = ours.router
        banks = ours.experts.named_parameters()
        self.experts = nn.ModuleDict({name: nn.ParameterList(bank.detach().unbind()) for name, bank in banks})

    def experts_of(self, sub_tokens: Tensor) -> SimpleNamespace:
        probabilities = self.router(sub_tokens).softmax(dim=-1)
        gates, experts = probabilities.topk(self.config.top_k, dim=-1)
        if self.config.top_k > 1:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        share = torch.bincount(experts[:, 0], minlength=self.config.num_experts) / len(sub_tokens)
        balance = self.config.num_experts * (share * probabilities.mean(dim=0)).sum()
        gates, total = gates.to(sub_tokens.dtype), torch.zeros_like(sub_tokens)
        banks = [self.experts[name] for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")]
        for expert, (weight1, bias1, weight2, bias2) in enumerate(zip(*banks)):
            row, choice = torch.where(experts == expert)
            y = F.linear(F.gelu(F.linear(sub_tokens[row], weight1, bias1)), weight2, bias2)
            total = total.index_add(0, row, y * gates[row, choice, None])
        return SimpleNamespace(hidden=total, balance_loss=balance)


class TorchScaleLayer(BetweenProjections):
    """TorchScale's ``MOELayer`` with weights of its own: X-MoE's router, capacity, second choices kept."""

    def __init__(self, ours: MHMoELayer) -> None:
        from mhmoe_fairseq.torchscale_ext.static_xmoe import StaticXMoE

        super().__init__(ours)
        changes = {"num_heads": 1, "routing": "capacity", "second_expert_policy": "all"}
        moe = dataclasses.replace(self.config, embed_dim=self.config.subtoken_dim, **changes)
        self.layer = StaticXMoE(SimpleNamespace(experts=moe, layernorm_eps=1e-5))

    def experts_of(self, sub_tokens: Tensor) -> SimpleNamespace:
        return self.layer(sub_tokens[None])


class Mixtral(BetweenProjections):
    """Hugging Face's ``MixtralSparseMoeBlock`` with one of its expert implementations, which have no balance loss."""

    def __init__(self, ours: MHMoELayer, implementation: str) -> None:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        super().__init__(ours)
        self.block = MixtralSparseMoeBlock(MixtralConfig(
            hidden_size=self.config.subtoken_dim, intermediate_size=self.config.expert_ffn_dim,
            num_local_experts=self.config.num_experts, num_experts_per_tok=self.config.top_k,
            experts_implementation=implementation,
        ))  # fmt: skip
        experts, bank = self.block.experts, ours.experts
        if (chosen := experts.config._experts_implementation) != implementation:
            raise RuntimeError(f"transformers would run experts_implementation={chosen}, not {implementation}")
        # SiLU on the first half, which is our fc1
        experts.gate_up_proj.data = torch.cat([bank.fc1_weight.data, bank.gate_weight.data], dim=1)
        experts.down_proj.data, self.block.gate.weight.data = bank.fc2_weight.data, ours.router.weight.data

    def experts_of(self, sub_tokens: Tensor) -> SimpleNamespace:
        return SimpleNamespace(hidden=self.block(sub_tokens[None]), balance_loss=None)


def products(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Callable[[], None], Callable[[], None]]:
    """Returns a linear map of ``rows`` rows, and its two backward products, into preallocated outputs."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, inputs), (outputs, inputs), (rows, outputs))
    x, weight, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    grad_x, grad_weight, y = (torch.empty(shape, dtype=dtype) for shape in shapes)

    def backward() -> None:
        torch.mm(grad, weight, out=grad_x)
        torch.mm(grad.t(), x, out=grad_weight)

    return lambda: torch.mm(x, weight.t(), out=y), backward


def gemm_bound(config: MHMoEConfig, tokens: int, dtype: torch.dtype) -> Callable[[], None]:
    """Returns what computes a layer's matrix products alone: no router, no sort, no activation, no sums.

    Each expert has its products over an equal share of the rows, so that weights are as large, and read as often, as
    the layer's.
    """
    dim, sub_dim, inner = config.embed_dim, config.subtoken_dim, config.expert_ffn_dim
    share, rest = divmod(tokens * dim // sub_dim * config.top_k, config.num_experts)
    shapes = [(sub_dim, inner)] * (config.matrices_per_expert - 1) + [(inner, sub_dim)]
    shares = [share + (expert < rest) for expert in range(config.num_experts)]  # no row is lost
    experts = [products(rows, *shape, dtype) for rows in shares for shape in shapes]
    maps = config.num_projection_layers * (config.has_head_projection + config.has_merge_projection)
    forward, backward = zip(*(products(tokens, dim, dim, dtype) for _ in range(maps)), *experts)
    return lambda: [product() for product in (*forward, *reversed(backward))]


class Step:
    """One training step of a module, without the optimiser; gradients start from None as after ``zero_grad``."""

    def __init__(self, module: nn.Module, setting: Setting) -> None:
        self.autocast = setting.dtype == "autocast"
        dtype = torch.float32 if self.autocast else DTYPES[setting.dtype]
        self.module = module.to(dtype)
        self.parameters = list(module.parameters())
        generator, shape = torch.Generator().manual_seed(SEED), (setting.tokens, setting.embed_dim)
        self.grad, *inputs = (torch.randn(shape, generator=generator).to(dtype) for _ in range(1 + INPUTS))
        self.inputs = [x.requires_grad_() for x in inputs]  # as inside a network
        self.tensors = [*self.parameters, *module.buffers(), *inputs, self.grad]  # exist before and after a step

    def clear(self) -> None:
        for tensor in (*self.inputs, *self.parameters):
            tensor.grad = None

    def __call__(self) -> tuple[Tensor, Tensor | None]:
        self.clear()
        self.x = self.inputs.pop(0)
        self.inputs.append(self.x)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            output = self.module(self.x)
        roots, gradients = [output.hidden], [self.grad.to(output.hidden.dtype)]
        if output.balance_loss is not None:
            roots.append(output.balance_loss)
            gradients.append(torch.full_like(output.balance_loss, BALANCE_WEIGHT))
        torch.autograd.backward(roots, gradients)
        return output.hidden, output.balance_loss


class Kind(NamedTuple):
    """A contender in words, what makes it from a layer of ours (None: the bound), whether of SwiGLU, what it needs."""

    label: str
    module: Callable[[MHMoELayer], nn.Module] | None
    is_swiglu: bool = False
    package: str = "torch"


CONTENDERS = {
    "mhmoe": Kind("MH-MoE (ours)", lambda ours: ours),
    "mhmoe-swiglu": Kind("MH-MoE (ours), SwiGLU", lambda ours: ours, True),
    "gemm": Kind("GEMM bound", None),
    "loop": Kind("plain autograd loop", PlainLoop),
    "torchscale": Kind("TorchScale static X-MoE", TorchScaleLayer, package="torchscale"),
    "mixtral-grouped": Kind("Mixtral, grouped_mm", partial(Mixtral, implementation="grouped_mm"), True, "transformers"),
    "mixtral-eager": Kind("Mixtral, eager loop", partial(Mixtral, implementation="eager"), True, "transformers"),
}
RIVALS = [name for name in CONTENDERS if not name.startswith("mhmoe")]


def build(name: str, setting: Setting) -> Callable[[], object]:
    """Returns the named contender, ready to be called: one call is one forward and backward pass."""
    torch.manual_seed(SEED)  # of the weights, which all have
    module, config = CONTENDERS[name].module, setting.config(CONTENDERS[name].is_swiglu)
    if module is None:
        return gemm_bound(config, setting.tokens, DTYPES[setting.dtype])
    return Step(module(MHMoELayer(config)), setting)
