"""The layer and what it is compared with, each as a step: one forward and one backward pass at one setting.

Every module here maps x ``(T, D)`` to an object with ``hidden (T, D)`` and ``balance_loss`` (or None) between the same
two ``D x D`` projections, so that a comparison compares how the experts are run and nothing else.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer

# What products compute in. "bf16" is a layer that was converted; "autocast" one whose float32 weights and input are
# cast in every step, with float32 gradients: what training with --mhmoe-precision bf16 does.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.bfloat16}
BALANCE_WEIGHT, SEED, TOLERANCE = 0.01, 1, 1e-5
NAMES = {
    "mhmoe": "MH-MoE (ours)", "mhmoe-swiglu": "MH-MoE (ours), SwiGLU", "gemm": "GEMM bound",
    "loop": "plain autograd loop", "torchscale": "TorchScale static X-MoE",
    "mixtral-grouped": "Hugging Face Mixtral, grouped_mm", "mixtral-eager": "Hugging Face Mixtral, eager loop",
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

    @property
    def sub_dim(self) -> int:
        return self.embed_dim // self.num_heads

    def flops(self) -> int:
        """Multiply-adds counted twice, forward and both backward products, experts and projections."""
        experts = 2 * self.tokens * self.num_heads * self.top_k * self.sub_dim * self.ffn_dim
        return 3 * 2 * (experts + 2 * self.tokens * self.embed_dim**2)

    def config(self) -> MHMoEConfig:
        """Our layer with GELU experts and TorchScale's X-MoE router."""
        names = ("embed_dim", "num_heads", "num_experts", "top_k")
        return MHMoEConfig(**{name: getattr(self, name) for name in names}, expert_ffn_dim=self.ffn_dim)

    def swiglu_config(self) -> MHMoEConfig:
        """Our layer as Mixtral's block computes: linear router, no biases, SwiGLU at the GELU expert's FLOPs."""
        changes = {"router": "linear", "activation": "swiglu", "expert_bias": False}
        return dataclasses.replace(self.config(), **changes, expert_ffn_dim=2 * self.ffn_dim // 3)

    def label(self) -> str:
        sizes = f"D={self.embed_dim} H={self.num_heads} E={self.num_experts} F={self.ffn_dim} T={self.tokens}"
        return f"{sizes} {self.dtype}, {self.threads} thread{'s' * (self.threads > 1)}"


class BetweenProjections(nn.Module):
    """A rival's experts on the sub-tokens ``(N, d)``, between the projections that our layer has."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting
        dim, config = setting.embed_dim, setting.config()
        self.head_projection = nn.Linear(dim, dim) if config.has_head_projection else nn.Identity()
        self.merge_projection = nn.Linear(dim, dim) if config.has_merge_projection else nn.Identity()

    def forward(self, x: Tensor) -> SimpleNamespace:
        output = self.experts_of(self.head_projection(x).view(-1, self.setting.sub_dim))
        hidden = self.merge_projection(output.hidden.reshape(x.shape))
        return SimpleNamespace(hidden=hidden, balance_loss=output.balance_loss)

    def named_like_ours(self) -> dict[str, list[Tensor]]:
        """Our parameter names, each with the tensors here that make it up when stacked."""
        projections = [p for p in ("head_projection", "merge_projection") if isinstance(getattr(self, p), nn.Linear)]
        return {f"{p}.0.{part}": [getattr(getattr(self, p), part)] for p in projections for part in ("weight", "bias")}

    @torch.no_grad()
    def copy_from(self, ours: nn.Module) -> None:
        """Take the weights of our layer."""
        source = dict(ours.named_parameters())
        for name, targets in self.named_like_ours().items():
            for target, value in zip(targets, source[name].view(len(targets), *targets[0].shape)):
                target.copy_(value)


class PlainLoop(BetweenProjections):
    """The loop that everyone writes first: select an expert's rows, linear, GELU, linear, weight, ``index_add``."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        sub_dim, num_experts = setting.sub_dim, setting.num_experts
        self.reduction = nn.Linear(sub_dim, setting.config().router_dim, bias=False)
        self.expert_embedding = nn.Parameter(torch.randn(num_experts, self.reduction.out_features))
        self.fc1 = nn.ModuleList(nn.Linear(sub_dim, setting.ffn_dim) for _ in range(num_experts))
        self.fc2 = nn.ModuleList(nn.Linear(setting.ffn_dim, sub_dim) for _ in range(num_experts))

    def experts_of(self, sub_tokens: Tensor) -> SimpleNamespace:
        logits = F.linear(self.reduction(sub_tokens).float(), F.normalize(self.expert_embedding.float(), dim=1))
        probabilities = logits.softmax(dim=-1)
        gates, experts = probabilities.topk(self.setting.top_k, dim=-1)
        if self.setting.top_k > 1:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        share = torch.bincount(experts[:, 0], minlength=len(self.fc1)) / len(sub_tokens)
        balance = len(self.fc1) * (share * probabilities.mean(dim=0)).sum()
        gates, total = gates.to(sub_tokens.dtype), torch.zeros_like(sub_tokens)
        for expert, (fc1, fc2) in enumerate(zip(self.fc1, self.fc2)):
            row, choice = torch.where(experts == expert)
            total = total.index_add(0, row, fc2(F.gelu(fc1(sub_tokens[row]))) * gates[row, choice, None])
        return SimpleNamespace(hidden=total, balance_loss=balance)

    def named_like_ours(self) -> dict[str, list[Tensor]]:
        names = [(fc, part) for fc in ("fc1", "fc2") for part in ("weight", "bias")]
        banks = {f"experts.{fc}_{part}": [getattr(layer, part) for layer in getattr(self, fc)] for fc, part in names}
        router = {"reduction.weight": [self.reduction.weight], "expert_embedding": [self.expert_embedding]}
        return {**super().named_like_ours(), **banks, **{f"router.{name}": parts for name, parts in router.items()}}


class TorchScaleLayer(BetweenProjections):
    """TorchScale's ``MOELayer`` as ``--mhmoe-routing torchscale``: X-MoE router, capacity, second choices kept."""

    def __init__(self, setting: Setting) -> None:
        from mhmoe_fairseq.torchscale_ext.static_xmoe import StaticXMoE

        super().__init__(setting)
        changes = {"num_heads": 1, "routing": "capacity", "second_expert_policy": "all"}
        moe = dataclasses.replace(setting.config(), embed_dim=setting.sub_dim, **changes)
        self.layer = StaticXMoE(SimpleNamespace(moe=moe, layernorm_eps=1e-5))

    def experts_of(self, sub_tokens: Tensor) -> SimpleNamespace:
        return self.layer(sub_tokens[None])


class Mixtral(BetweenProjections):
    """Hugging Face's ``MixtralSparseMoeBlock`` with one of its expert implementations, which have no balance loss."""

    def __init__(self, setting: Setting, implementation: str) -> None:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        super().__init__(setting)
        self.block = MixtralSparseMoeBlock(MixtralConfig(
            hidden_size=setting.sub_dim, intermediate_size=setting.swiglu_config().expert_ffn_dim,
            num_local_experts=setting.num_experts, num_experts_per_tok=setting.top_k,
            experts_implementation=implementation,
        ))  # fmt: skip
        chosen = self.block.experts.config._experts_implementation
        if chosen != implementation:
            raise RuntimeError(f"transformers would run experts_implementation={chosen}, not {implementation}")
        for parameter in self.block.parameters():  # the block leaves them unwritten, for a checkpoint to fill
            nn.init.normal_(parameter, std=0.02)

    def experts_of(self, sub_tokens: Tensor) -> SimpleNamespace:
        return SimpleNamespace(hidden=self.block(sub_tokens[None]), balance_loss=None)

    def named_like_ours(self) -> dict[str, list[Tensor]]:
        up, gate = self.block.experts.gate_up_proj.chunk(2, dim=1)  # SiLU on the first half, which is our fc1
        banks = {"fc1": up, "gate": gate, "fc2": self.block.experts.down_proj}
        ours = {f"experts.{name}_weight": list(bank.unbind()) for name, bank in banks.items()}
        return {**super().named_like_ours(), **ours, "router.weight": [self.block.gate.weight]}


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
        self.x, self.grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        self.x.requires_grad_()  # as inside a network
        self.tensors = [*self.parameters, *module.buffers(), self.x, self.grad]  # exist before and after a step

    def clear(self) -> None:
        for tensor in (self.x, *self.parameters):
            tensor.grad = None

    def __call__(self) -> tuple[Tensor, Tensor | None]:
        self.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            output = self.module(self.x)
        roots, gradients = [output.hidden], [self.grad.to(output.hidden.dtype)]
        if output.balance_loss is not None:
            roots.append(output.balance_loss)
            gradients.append(torch.full_like(output.balance_loss, BALANCE_WEIGHT))
        torch.autograd.backward(roots, gradients)
        return output.hidden, output.balance_loss


BUILDERS: dict[str, Callable[[Setting], nn.Module]] = {
    "mhmoe": lambda setting: MHMoELayer(setting.config()),
    "mhmoe-swiglu": lambda setting: MHMoELayer(setting.swiglu_config()),
    "loop": PlainLoop,
    "torchscale": TorchScaleLayer,
    "mixtral-grouped": lambda setting: Mixtral(setting, "grouped_mm"),
    "mixtral-eager": lambda setting: Mixtral(setting, "eager"),
}


def unavailable(name: str) -> str | None:
    """Why a contender cannot run here, or None."""
    package = {"torchscale": "torchscale", "mixtral": "transformers"}.get(name.split("-")[0])
    missing = package is not None and importlib.util.find_spec(package) is None
    return f"{package} is not installed (pip install {package})" if missing else None


def build(name: str, setting: Setting) -> Callable[[], object]:
    """Returns the named contender, ready to be called: one call is one forward and backward pass."""
    torch.manual_seed(SEED)
    if name == "gemm":
        return gemm_bound(setting.config(), setting.tokens, DTYPES[setting.dtype])
    return Step(BUILDERS[name](setting), setting)


def relative_error(value: Tensor, reference: Tensor) -> float:
    scale = reference.abs().max().clamp_min(torch.finfo(reference.dtype).tiny)
    return ((value - reference).abs().max() / scale).item()


def errors_against(rival: str, setting: Setting) -> dict[str, float]:
    """Relative errors of our layer against a rival with the same weights: output, balance loss and every gradient."""
    ours = build("mhmoe-swiglu" if rival.startswith("mixtral") else "mhmoe", setting)
    other = build(rival, setting)
    other.module.copy_from(ours.module)
    (hidden, balance), (hidden_other, balance_other) = ours(), other()
    errors = {"output": relative_error(hidden, hidden_other)}
    if balance_other is None:  # without it the gradients are of another sum
        return errors
    errors["balance loss"] = relative_error(balance, balance_other)
    errors["gradient of the input"] = relative_error(ours.x.grad, other.x.grad)
    gradients = {name: parameter.grad for name, parameter in ours.module.named_parameters()}
    for name, parts in other.module.named_like_ours().items():
        reference = torch.stack([part.grad for part in parts])
        errors[f"gradient of {name}"] = relative_error(gradients[name].view_as(reference), reference)
    return errors


def check(errors: dict[str, float], what: str) -> float:
    """The largest error; ``RuntimeError`` if it exceeds the tolerance: a comparison of speed would mean nothing."""
    name, worst = max(errors.items(), key=lambda item: item[1])
    if not worst <= TOLERANCE:
        raise RuntimeError(f"{what}: relative error of {name} is {worst:.2e}, the limit is {TOLERANCE:.0e}")
    return worst
