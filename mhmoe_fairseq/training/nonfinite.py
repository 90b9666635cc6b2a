"""What a model looked like when its loss or gradient became NaN or infinite."""

import logging
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..moe import RoutingStats
from ..moe.stats import load_max_over_mean

logger = logging.getLogger(__name__)


def latest_routing(model: nn.Module) -> dict[nn.Module, RoutingStats]:
    """Return what every layer with experts routed in its latest forward pass, kept up to date by a hook."""
    latest: dict[nn.Module, RoutingStats] = {}
    for layer in model.modules():
        if getattr(layer, "is_moe_layer", False):
            layer.get_submodule("moe_layer").register_forward_hook(
                lambda experts, args, output, layer=layer: latest.update({layer: output.stats})
            )
    return latest


def report_nonfinite(model: nn.Module, loss: Tensor, what: str, routing: dict[nn.Module, RoutingStats]) -> None:
    """Log one error with the loss of the batch that the model has just done, and a line on every layer.

    Args:
        what: the batch, for the message.
        routing: what its layers with experts routed, see ``latest_routing``.
    """
    rank = f"rank {dist.get_rank()}, " if dist.is_initialized() else ""
    lines = [f"{rank}{what}: loss {float(loss.detach().sum()):g}; layer by layer on this rank:"]
    # What gives routing counts, and the modules before and after: each parameter once.
    layers = [f"{name}." for name, module in model.named_modules() if hasattr(module, "is_moe_layer")]
    for name, module in model.named_modules():
        has_own = next(module.parameters(recurse=False), None) is not None
        if f"{name}." in layers or (has_own and not name.startswith(tuple(layers))):
            shown = name.removeprefix("module.").removeprefix("module.")
            lines.append(f"  {shown}: {', '.join(_facts(module, routing.get(module)))}")
    logger.error("\n".join(lines))


def _facts(layer: nn.Module, stats: RoutingStats | None) -> Iterator[str]:
    yield f"weights {_norm([p.detach() for p in layer.parameters()]):g}"
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    if gradients:
        yield f"gnorm {_norm(gradients):g}"
    for load, dropped, entropy, num_subtokens in zip(*stats.by_pool()) if stats is not None else ():
        yield f"router entropy {float(entropy / num_subtokens.clamp(min=1)):g}"
        yield f"dropped {float(dropped):.0f}"
        yield f"largest load over mean {float(load_max_over_mean(load)):g}"
        yield f"expert loads {' '.join(f'{number:.0f}' for number in load.tolist())}"


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]).norm())
