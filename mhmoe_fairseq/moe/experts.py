"""The expert FFNs: stacked parameters and the choice of how to compute them.

Backends, the same function to rounding:

``loop``     one slice of sorted rows per expert, hand-written backward (:mod:`.cpu.loop`). For CPUs: the slice
             bounds are needed on the host, which costs nothing there.
``grouped``  ``torch.nn.functional.grouped_mm`` over device-side offsets (:mod:`._expert_network`).
``blocked``  batched products over equal blocks (:mod:`._expert_network`): any dtype and shape on a device, without
             synchronisation, at up to twice the FLOPs.

``auto`` takes ``loop`` on CPUs, where grouped_mm's kernel was measured at about twice a loop's time (torch 2.14);
elsewhere ``grouped`` where its kernel takes device, dtype and shape. Otherwise, and wherever torch.compile,
torch.export, torch.func or forward-mode differentiation see the layer, it takes ``blocked``, which can do all of that.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._expert_network import ExpertWeights, blocked_ffn, grouped_ffn, grouped_mm_supports
from .activations import ACTIVATIONS
from .config import MHMoEConfig
from .cpu.loop import loop_ffn
from .dispatch import DispatchPlan, combine
from .modes import compute_dtype, eager_obstacle, without_autocast
from .parallelism import ExpertParallelism, Traffic, exchanged_ffn
from .quantize import TernaryLinear, TernaryWeights, quantize_activation

BACKENDS = ("auto", "loop", "grouped", "blocked")


class ExpertFFN(TernaryWeights):
    """E feed-forward networks ``d -> F -> d`` with stacked parameters, of all banks one after the other.

    One expert computes ``fc2(norm(dropout(act(fc1(x)))))``; a gated activation takes ``gate(x)``, too. Initialised
    like ``nn.Linear``, each expert from a generator of its own. With ``quantize_experts`` every expert's matrix is
    ternary, with a scale of its own, and the maps' inputs have eight bits: a sub-token's before it is sent, that of
    ``fc2`` in each routed row.

    Args:
        parallel: the processes that share the experts; this one then holds E / P of them. None: all are here.

    >>> experts = ExpertFFN(MHMoEConfig(embed_dim=8, num_experts=4, expert_ffn_dim=16))
    >>> plan = plan_dispatch(torch.tensor([[0], [3]]), num_experts=4, all_real=True)
    >>> y, traffic = experts(torch.randn(2, 8), torch.ones(2, 1), plan)
    >>> y.shape, traffic
    (torch.Size([2, 8]), None)
    """

    def __init__(
        self, config: MHMoEConfig, *, backend: str = "auto", parallel: ExpertParallelism | None = None
    ) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"backend ({backend!r}) must be one of {', '.join(BACKENDS)}")
        self.config = config
        self.backend = backend
        self.parallel = parallel if parallel is not None and parallel.size > 1 else None
        size, rank = (1, 0) if self.parallel is None else (self.parallel.size, self.parallel.rank)
        if config.total_experts % size:
            number = config.experts_in_words
            raise ValueError(f"expert parallelism over {size} processes must divide num_experts ({number})")
        e, f, d = config.total_experts // size, config.expert_ffn_dim, config.subtoken_dim
        self.local_experts = range(rank * e, (rank + 1) * e)
        bias, gated, norm = config.expert_bias, ACTIVATIONS[config.activation].is_gated, config.expert_layernorm

        def parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(*shape)) if wanted else None

        self.fc1_weight = nn.Parameter(torch.empty(e, f, d))
        self.fc1_bias = parameter(bias, e, f)
        self.gate_weight = parameter(gated, e, f, d)
        self.gate_bias = parameter(gated and bias, e, f)
        self.layernorm_weight = parameter(norm, e, f)
        self.layernorm_bias = parameter(norm, e, f)
        self.fc2_weight = nn.Parameter(torch.empty(e, d, f))
        self.fc2_bias = parameter(bias, e, d)
        if config.quantize_experts:
            self.ternary_names = ("fc1_weight", *(["gate_weight"] if gated else []), "fc2_weight")
        self.reset_parameters()
        if self.parallel is not None:
            self.parallel.shard(self)

    def reset_parameters(self) -> None:
        """``nn.Linear``'s default: uniform in +-1/sqrt(fan_in), biases included.

        An expert's values depend on the global generator and the expert's number, not on which process draws them.
        """
        bound_in = 1 / math.sqrt(self.config.subtoken_dim)
        bound_hidden = 1 / math.sqrt(self.config.expert_ffn_dim)
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("layernorm"):
                nn.init.constant_(parameter, float(name == "layernorm_weight"))
            else:
                _uniform_by_expert(parameter, self.local_experts, bound_hidden if name.startswith("fc2") else bound_in)

    def forward(self, x_Nd: Tensor, gates_NK: Tensor, plan: DispatchPlan) -> tuple[Tensor, Traffic | None]:
        """Gate-weighted sum of the chosen experts' outputs, ``(N, d), (N, K) -> (N, d)``, and what was sent for it."""
        device = x_Nd.device.type
        weights = self._weights()
        if self.parallel is not None:
            weights = weights.each(self.parallel.scale_gradient)
        dtype = compute_dtype(x_Nd)
        with without_autocast(device):
            if self.ternary_names:
                quantized = {name: self.ternary_weight(getattr(weights, name)) for name in self.ternary_names}
                weights, x_Nd = weights._replace(**quantized), quantize_activation(x_Nd)
            x_Nd = x_Nd.to(dtype)
            local_ffn = functools.partial(self._local_ffn, weights)
            if self.parallel is None or self.parallel.by == "heads":  # whose rows have arrived before
                return local_ffn(x_Nd, gates_NK, plan), None
            return exchanged_ffn(self.parallel, x_Nd, gates_NK, plan, local_ffn)

    def _weights(self) -> ExpertWeights:
        return ExpertWeights._make(getattr(self, name) for name in ExpertWeights._fields)

    def _local_ffn(self, weights: ExpertWeights, x_Nd: Tensor, gates_NK: Tensor, plan: DispatchPlan) -> Tensor:
        dropout = self.config.activation_dropout if self.training else 0.0
        of_network = self.config.activation, dropout, self.config.quantize_experts
        backend = self._backend_for(x_Nd, weights)
        if backend == "loop":  # casts the weights itself
            return loop_ffn(x_Nd, gates_NK, plan, weights, *of_network)
        weights = weights.each(lambda weight: weight.to(x_Nd.dtype))
        device_ffn = grouped_ffn if backend == "grouped" else blocked_ffn
        y_Rd = device_ffn(x_Nd.index_select(0, plan.source_R), plan, weights, *of_network)
        return combine(y_Rd, gates_NK, plan)

    def _backend_for(self, x_Nd: Tensor, weights: Sequence[Tensor | None] = ()) -> str:
        on_cpu = x_Nd.device.type == "cpu"
        obstacle = eager_obstacle([x_Nd, *weights]) if self.backend == "loop" or on_cpu else None
        if self.backend == "loop" and obstacle is not None:
            raise ValueError(f"backend 'loop' cannot be used {obstacle}: take 'auto' or 'blocked'")
        if self.backend != "auto":
            return self.backend
        if on_cpu:
            return "loop" if obstacle is None else "blocked"
        widths = (self.config.subtoken_dim, self.config.expert_ffn_dim)
        # grouped_mm's backward refuses a product without rows (a batch of the other modality, or nothing received).
        grouped = x_Nd.size(0) > 0 and grouped_mm_supports(x_Nd.device, x_Nd.dtype, widths, self.fc1_weight.size(0))
        return "grouped" if grouped else "blocked"


class SharedExpert(nn.Module):
    """One FFN on whole tokens that every token passes (P2 table 2).

    >>> config = MHMoEConfig(embed_dim=8, num_experts=4, expert_ffn_dim=16, shared_expert_dim=32)
    >>> SharedExpert(config)(torch.ones(3, 8)).shape
    torch.Size([3, 8])
    """

    def __init__(self, config: MHMoEConfig) -> None:
        super().__init__()
        d, f, bias = config.embed_dim, config.shared_expert_dim, config.expert_bias
        self.activation = ACTIVATIONS[config.activation]
        linear = TernaryLinear if config.quantize_experts else nn.Linear
        self.fc1 = linear(d, f, bias=bias)
        self.gate = linear(d, f, bias=bias) if self.activation.is_gated else None
        self.fc2 = linear(f, d, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        """``(T, D) -> (T, D)``."""
        maps = [self.fc1] if self.gate is None else [self.fc1, self.gate]
        return self.fc2(self.activation.of(*(linear(x_TD) for linear in maps)))


def _uniform_by_expert(stacked: Tensor, experts: range, bound: float) -> None:
    """Fill dim 0 for ``experts``, each from its own generator; no process draws another's experts."""
    if stacked.untyped_storage().device.type == "meta":  # meta and fake tensors have no values
        return
    seed = int(torch.randint(2**62, (), device="cpu"))
    with torch.no_grad():
        for values, expert in zip(stacked, experts):
            generator = torch.Generator().manual_seed(seed + expert)
            # On the CPU whatever the device, so that all devices begin with one model.
            target = values if values.device.type == "cpu" else torch.empty(values.shape, device="cpu")
            values.copy_(target.uniform_(-bound, bound, generator=generator))
