"""Adam for experts that are shared out over ranks, and for learning rates by parameter: ``--optimizer mhmoe_adam``."""

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from typing import Any, NamedTuple, Optional

import torch
import torch.distributed as dist
from fairseq.optim import register_optimizer
from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig
from torch import Tensor, nn

from ..common.errors import UserError
from .checks import OPTIMIZER, TrainingFlags, flattens_gradients, optimizer_name
from .expert_state import ExpertState, notes_of, take_note
from .fused_adam import FusedAdam

logger = logging.getLogger(__name__)

_SCALE = "lr_scale"
_PER_INPUT = "/fan_in"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)\w*embed\w*\.")


@dataclass
class MHMoEAdamConfig(FairseqAdamConfig):
    """fairseq's flags of Adam, and factors of the learning rate."""

    lr_factors: Optional[str] = field(
        default=None,
        metadata={
            "help": "PATTERN=FACTOR,...: parameters in whose name the regular expression is found learn at that factor "
            "of --lr, such as experts.fc2=0.25; of several that fit, at their product. N/fan_in is N over the number "
            "of a weight's inputs, 1 for biases and norms: experts.fc2=128/fan_in"
        },
    )
    use_old_adam: bool = field(
        default=False,
        metadata={"help": "step with fairseq's own Adam; without it PyTorch's fused kernel computes the same, faster"},
    )


@register_optimizer(OPTIMIZER, dataclass=MHMoEAdamConfig)
class MHMoEAdam(FairseqAdam):
    """fairseq's Adam, flag for flag and state for state, on PyTorch's fused kernel (``FusedAdam``).

    Where experts are shared out it does for them what fairseq does for the rest of the model: it adds up the
    gradients of ranks that hold the same experts, counts all experts in the gradient norm, and saves and loads the
    state of all. It works below ``FP16Optimizer`` (with ``--fp16-no-flatten-grads``), ``MemoryEfficientFP16Optimizer``
    and ``AMPOptimizer`` too.

    Where parameters have factors of the learning rate (``--lr-factors``, ``scale_layers``) each factor has a parameter
    group, whose ``lr_scale`` it is.
    """

    def __init__(self, cfg: MHMoEAdamConfig, params: Iterable[nn.Parameter]) -> None:
        groups = _groups_by_scale(list(params))
        if cfg.use_old_adam or cfg.fp16_adam_stats:  # statistics in fp16 are apex's
            super().__init__(cfg, groups)
        else:
            super(FairseqAdam, self).__init__(cfg)
            self._optimizer = FusedAdam(groups, **self.optimizer_config)
        self.set_lr(self.optimizer_config["lr"])
        shards = {parameter: notes_of(parameter).shard for parameter in self.params}
        self._shards = {parameter: shard for parameter, shard in shards.items() if shard is not None}
        if self._shards:
            ExpertState(self._optimizer, self._shards)

    def get_lr(self) -> float:
        """Return the learning rate of the run, of which groups have their factors."""
        group = self.param_groups[0]
        return group["lr"] / group.get(_SCALE, 1.0)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the run."""
        for group in self.param_groups:
            group["lr"] = lr * group.get(_SCALE, 1.0)

    def load_state_dict(self, state_dict: dict[str, Any], optimizer_overrides: dict[str, Any] | None = None) -> None:
        """Continue where a run stopped; one with other factors of the learning rate is refused."""
        both = state_dict["param_groups"], self.param_groups
        saved, own = ([group.get(_SCALE, 1.0) for group in groups] for groups in both)
        if saved != own:
            before, now = (", ".join(f"{scale:.3g}" for scale in scales) for scales in (saved, own))
            raise UserError(
                f"--lr-factors, --layer-decay, --head-lr-multiplier: the run that is resumed had the factors {before} "
                f"of the learning rate, this one has {now}: give the same flags, or --reset-optimizer"
            )
        super().load_state_dict(state_dict, optimizer_overrides)
        if optimizer_overrides and "lr" in optimizer_overrides:
            self.set_lr(optimizer_overrides["lr"])

    def all_reduce_grads(self, module: nn.Module) -> None:
        """Average the dense gradients over all ranks, then add up the experts' over the ranks that hold the same.

        Gradients of the model are meant, also where the optimizer steps on fp32 copies: those are filled from it
        afterwards. Expert gradients are divided by the number of ranks in the backward pass already, so their sum is
        a mean over all ranks like the others.
        """
        super().all_reduce_grads(module)
        for shard in self._shards.values():
            if shard.groups.num_replicas > 1:
                gradient = shard.parameter.grad
                assert gradient is not None, "fairseq has made zeros where there were none"
                dist.all_reduce(gradient, group=shard.groups.replicas)

    def multiply_grads(self, c: float | Tensor) -> None:
        """Multiply all gradients by ``c``, at the next step if that can do it on its way over them."""
        fused = self._multiplying()
        if fused is None:
            super().multiply_grads(c)
        else:
            fused.factor = fused.factor * c

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return the norm of the whole model's gradient, every expert counted once; the same on every rank.

        Where the norm is above ``max_norm``, unless that is 0, gradients are multiplied as ``multiply_grads`` does.
        """
        fused = self._multiplying()
        if fused is None:
            return self._clip_at_once(max_norm, aggregate_norm_fn)
        norm = (self._clip_at_once(0, aggregate_norm_fn) * fused.factor).abs()
        if max_norm > 0:
            fused.factor = fused.factor * (float(max_norm) / (norm + 1e-6)).clamp_(max=1)
        return norm

    def _multiplying(self) -> FusedAdam | None:
        """The inner optimizer if its next step can multiply the gradients; ``--zero-sharding`` puts another there."""
        inner = self._optimizer
        return inner if isinstance(inner, FusedAdam) and inner.multiplies_gradients() else None

    def _clip_at_once(self, max_norm: float, aggregate_norm_fn: Callable[[Tensor], Tensor] | None) -> Tensor:
        """fairseq's own function scales the experts' gradients but leaves them out of the norm."""
        if not self._shards:
            return super().clip_grad_norm(max_norm, aggregate_norm_fn)
        gradients = [parameter.grad for parameter in self._shards]  # fairseq has made zeros where there were none
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        squares = torch.stack(norms).double().square().sum()
        dist.all_reduce(squares, group=next(iter(self._shards.values())).groups.experts)

        def with_experts(dense_norm: Tensor) -> Tensor:
            return (dense_norm.double().square() + squares).sqrt().to(dense_norm.dtype)

        norm = super().clip_grad_norm(max_norm, with_experts)
        # Under --amp every rank looks for inf and NaN in its own gradients only and skips the update, or does not:
        # what is found in one rank's experts must be found on all. Adding zero changes nothing.
        gradients[0].add_((norm * 0).to(gradients[0].dtype))
        return norm


def _groups_by_scale(parameters: list[nn.Parameter]) -> list[Any]:
    """One group for each factor of the learning rate, in order of appearance; the parameters if all have factor 1."""
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(notes_of(parameter).lr_scale, []).append(parameter)
    if set(groups) <= {1.0}:
        return parameters
    return [{"params": members, _SCALE: scale} for scale, members in groups.items()]


# Checkpoints name the class of their optimizer, and fairseq resumes them with a class of that name only. Both Adams
# are the same one: what was saved with --optimizer adam goes on with mhmoe_adam, and the other way round.
MHMoEAdam.__name__ = FairseqAdam.__name__


class Factor(NamedTuple):
    """A factor of the learning rate; ``per_input``: over the number of a weight's inputs, its last dimension."""

    value: float
    per_input: bool = False

    def of(self, name: str, parameter: nn.Parameter) -> float:
        """Return the factor for a parameter; the rule by inputs leaves biases and norms as they are."""
        if not self.per_input:
            return self.value
        has_inputs = name.endswith("weight") and "norm" not in name and parameter.dim() > 1
        return self.value / parameter.size(-1) if has_inputs else 1.0


def read_lr_factors(text: str | None) -> dict[str, Factor]:
    """Return pattern -> factor of ``--lr-factors``.

    Raises:
        UserError: naming the part that is not ``PATTERN=FACTOR``, its value and the rule.

    >>> read_lr_factors("experts.fc2=128/fan_in,embed_tokens=2")["embed_tokens"]
    Factor(value=2.0, per_input=False)
    """
    factors: dict[str, Factor] = {}
    for part in text.split(",") if text else ():
        pattern, _, number = part.strip().rpartition("=")
        try:
            re.compile(pattern)
            factor = Factor(float(number.removesuffix(_PER_INPUT)), number.endswith(_PER_INPUT))
        except (re.error, ValueError) as error:
            raise UserError(f"--lr-factors ({part}) must be PATTERN=FACTOR: {error}") from None
        if not pattern or pattern in factors:
            raise UserError(f"--lr-factors ({part}) must name {'another' if pattern else 'a'} pattern")
        if not 0 < factor.value < math.inf:
            raise UserError(f"--lr-factors ({part}) must have a positive, finite factor")
        factors[pattern] = factor
    return factors


def scale_by_name(model: nn.Module, flags: TrainingFlags) -> None:
    """Note the factors that ``--lr-factors`` gives the parameters of a model that will be trained.

    ``N/fan_in`` is how Adam's learning rate of hidden weights carries from one width to another (Tensor Programs V,
    arXiv 2203.03466, table 3): it moves each weight as far, and what they add up grows with their number.

    Args:
        flags: the task's configuration; a ``UserError`` says what else of it excludes such factors, and which pattern
            is found in no name.
    """
    config = getattr(flags, "optimizer_config", None)  # as check_training_numbers: a task may be built without it
    factors = read_lr_factors(getattr(config, "lr_factors", None))
    if not factors:
        return
    _refuse(flags, "--lr-factors")
    parameters = dict(model.named_parameters())
    for pattern, factor in factors.items():
        found = [name for name in parameters if re.search(pattern, name)]
        if not found:
            raise UserError(
                f"--lr-factors: no parameter has {pattern} in its name; names are such as "
                f"{', '.join(list(parameters)[-3:])}"
            )
        scales = {name: factor.of(name, parameters[name]) for name in found}
        for name, scale in scales.items():
            _scale(parameters[name], scale)
        factors_found = ", ".join(f"{scale:.3g}" for scale in sorted(set(scales.values())))
        logger.info(f"--lr-factors: {factors_found} of --lr in {len(found)} parameters, {found[0]} the first")


def scale_layers(model: nn.Module, flags: TrainingFlags, layer_decay: float, head_multiplier: float) -> None:
    """Note the factors of the learning rate by layer on every parameter of a model that will be trained.

    With n layers the embeddings learn with ``layer_decay ** (n + 1)`` of the learning rate, layer i (from 0) with
    ``layer_decay ** (n - i)``, what comes after the layers with all of it, and the heads with ``head_multiplier``
    times that. Both are 1 where nothing is to change.

    Args:
        model: with its heads under ``heads``.
        flags: the task's configuration; a ``UserError`` says what else of it excludes such factors.
    """
    if layer_decay == 1 and head_multiplier == 1:
        return
    _refuse(flags, "--layer-decay" if layer_decay < 1 else "--head-lr-multiplier")
    parameters = dict(model.named_parameters())
    num_layers = 1 + max((int(layer.group(1)) for layer in map(_LAYER.search, parameters) if layer), default=-1)
    for name, parameter in parameters.items():
        _scale(parameter, layer_scale(name, num_layers, layer_decay, head_multiplier))
    logger.info(
        f"factors of --lr: {layer_decay ** (num_layers + 1):.3g} in the embeddings, {layer_decay**num_layers:.3g} in "
        f"the first of {num_layers} layers, {head_multiplier:g} in the head"
    )


def layer_scale(name: str, num_layers: int, layer_decay: float, head_multiplier: float) -> float:
    """Return the factor for the parameter of a name; see ``scale_layers``."""
    if name.startswith("heads."):
        return head_multiplier
    layer = _LAYER.search(name)  # before embeddings: an X-MoE router has expert embeddings
    if layer:
        return layer_decay ** (num_layers - int(layer.group(1)))
    return layer_decay ** (num_layers + 1) if _EMBEDDING.search(name) else 1.0


def _scale(parameter: nn.Parameter, factor: float) -> None:
    take_note(parameter, lr_scale=notes_of(parameter).lr_scale * factor)


def _refuse(flags: TrainingFlags, flag: str) -> None:
    for problem in _obstacles(flags):
        raise UserError(f"{flag}: {problem}")


def _obstacles(flags: TrainingFlags) -> Iterator[str]:
    """Learning rates by parameter need an optimizer that has parameter groups, and parameters that stay apart."""
    name = optimizer_name(flags)
    if name != OPTIMIZER:
        yield f"--optimizer ({name}) must be {OPTIMIZER}: others have one learning rate for all"
    if flattens_gradients(flags):
        yield "--fp16 needs --fp16-no-flatten-grads: one flat tensor has one learning rate"
    if flags.zero_sharding != "none":
        yield f"--zero-sharding ({flags.zero_sharding}) must be none: it forms groups of its own"
    if flags.ddp_backend == "fully_sharded":
        yield "--ddp-backend fully_sharded makes one flat tensor, which has one learning rate"
