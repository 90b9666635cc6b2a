"""Listen to the gates of a model: which experts every position goes to, while the model works."""

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from fairseq.models import BaseFairseqModel
from torch import Tensor, nn

from ...common.errors import UserError
from ...evaluation.expert_loads import POOLS
from ...evaluation.records import ExpertLoads, LayerLoads, Metric, Record
from ...models.counts import stack_of_layers
from ...moe import MHMoELayer
from ...moe.assignment import Assignment
from ...torchscale_ext.feed_forward import SeparateExperts

NOT_CHOSEN = -1
# What positions are told apart, in the order of tables; a language model's are all text.
GROUPS = ("image", "text", "image of pairs", "text of pairs")


@dataclass(frozen=True)
class RoutedCall:
    """One call of the model.

    Attributes:
        groups: bool ``(B, L)`` for each of ``GROUPS`` that the call has: its positions, without padding. A call that
            only keeps other processes company is all padding.
        choices: by MoE layer, ``(B, L, H, K)`` experts of each sub-token, before any is dropped for lack of capacity;
            where each modality has experts of its own, the text's follow the image's. Where experts choose, K is their
            number, and of those that did not choose the sub-token ``NOT_CHOSEN`` stands there.
        num_experts: of a layer, all banks' and both modalities' together.
        weights: by MoE layer, ``(B, L, H, K)`` float32 weights of their outputs; 0 where dropped.
        entropies: by MoE layer, ``(B, L, H)`` entropy in nats of the router's probabilities.
    """

    groups: dict[str, Tensor]
    choices: dict[int, Tensor]
    num_experts: int
    weights: dict[int, Tensor] = field(default_factory=dict)
    entropies: dict[int, Tensor] = field(default_factory=dict)

    def distinct(self, layer: int) -> Tensor:
        """To how many different experts the sub-tokens of each position go, ``(B, L)``."""
        choices = self.choices[layer].flatten(2)
        used = torch.zeros(*choices.shape[:2], self.num_experts + 1, dtype=torch.bool, device=choices.device)
        return used.scatter(-1, choices.where(choices >= 0, self.num_experts), True)[..., :-1].sum(-1)


@contextmanager
def listening(model: BaseFairseqModel, hear: Callable[[RoutedCall], None]) -> Iterator[None]:
    """Tell ``hear`` of every call of the model inside this context, when the encoder or decoder returns.

    Args:
        model: ``MHMoEBEiT3`` or ``MHMoELanguageModel`` with MoE layers, in evaluation mode.

    Raises:
        UserError: a layer's experts cannot be listened to.
    """
    layers, is_beit3 = expert_pools(model), hasattr(model, "beit3")
    heard: dict[int, list[tuple[Tensor, ...]]] = defaultdict(list)

    def note(index: int, gate: nn.Module, given: Any, assignment: Assignment) -> None:
        entropy_N = torch.special.entr(assignment.probs_NE.float()).sum(1)
        choices_NK = assignment.choices_NK
        if gate.chooses_all and assignment.kept_NK is not None:
            choices_NK = torch.where(assignment.kept_NK, choices_NK, choices_NK.new_tensor(NOT_CHOSEN))
        heard[index].append((choices_NK, assignment.gates_NK.float(), entropy_N))

    def end_call(module: nn.Module, given: Any, output: tuple[Tensor, dict[str, Any]]) -> None:
        features, extra = output
        (batch, length), split = features.shape[:2], extra.get("image_positions", 0)
        choices, weights, entropies = {}, {}, {}
        for index, pools in layers.items():
            config, sizes = pools[0].config, [length] if len(pools) == 1 else [split, length - split]
            by_pool = []
            for pool, (noted, size) in enumerate(zip(heard.pop(index), sizes)):
                shape = batch, size, config.subtokens_per_token
                chosen, weight, entropy = (each.view(*shape, *each.shape[1:]) for each in noted)
                by_pool.append((chosen.where(chosen < 0, chosen + pool * config.total_experts), weight, entropy))
            choices[index], weights[index], entropies[index] = (torch.cat(each, dim=1) for each in zip(*by_pool))
        was_routed = any(layer is not None and layer.stats.num_subtokens.sum() > 0 for layer in extra["moe"])
        is_real = torch.full((batch, length), was_routed, device=features.device)
        padding_mask = extra["padding_mask"] if is_beit3 else given[0].eq(model.decoder.embed_tokens.padding_idx)
        if padding_mask is not None:
            is_real &= ~padding_mask
        groups = {"image" if split else "text": is_real}
        if 0 < split < length:
            is_image = torch.arange(length, device=features.device) < split
            groups = {"image of pairs": is_real & is_image, "text of pairs": is_real & ~is_image}
        hear(RoutedCall(groups, choices, len(pools) * config.total_experts, weights, entropies))

    handles = [(model.beit3 if is_beit3 else model.decoder).register_forward_hook(end_call)]
    for index, pools in layers.items():
        handles += [pool.gate.register_forward_hook(functools.partial(note, index)) for pool in pools]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def expert_pools(model: nn.Module) -> dict[int, list[MHMoELayer]]:
    """Index of each MoE layer, from 0 -> its pool of experts, or its pools for images and for text.

    Raises:
        UserError: a layer does not tell which experts it chose.
    """
    found = {}
    for index, layer in enumerate(stack_of_layers(model).layers):
        if layer.is_moe_layer:
            experts = layer.moe_layer
            found[index] = [experts.A, experts.B] if isinstance(experts, SeparateExperts) else [experts]
            if not all(isinstance(pool, MHMoELayer) for pool in found[index]):
                kind = type(experts).__name__
                raise UserError(f"layer {index + 1} ({kind}) does not tell which experts its positions choose")
    return found


def most_distinct(model: nn.Module) -> int:
    """To how many different experts the sub-tokens of one position can go."""
    pool = next(iter(expert_pools(model).values()))[0]
    return min(pool.config.total_experts, pool.config.subtokens_per_token * pool.gate.most_choices(pool.config))


class PositionCounts:
    """Expert loads of the positions of images and of texts, alone and in pairs, of ``MHMoEBEiT3`` with MoE layers."""

    def __init__(self, model: nn.Module) -> None:
        self._pools = {layer: len(pools) for layer, pools in expert_pools(model).items()}
        self._most_distinct = most_distinct(model)
        self._positions: Counter[str] = Counter()
        self._loads: dict[tuple[str, int], Any] = defaultdict(int)  # group, layer -> assignments to each expert
        self._distinct: Counter[tuple[str, int]] = Counter()  # of different experts, summed over positions

    def add(self, call: RoutedCall) -> None:
        """Count one call's positions."""
        for group, positions in call.groups.items():
            self._positions[group] += int(positions.sum())
            for layer, choices in call.choices.items():
                chosen = choices[positions]
                load_E = torch.bincount(chosen[chosen >= 0], minlength=call.num_experts)
                self._loads[group, layer] += load_E.cpu()
                self._distinct[group, layer] += int(call.distinct(layer)[positions].sum())

    def added_to(self, record: Record) -> Record:
        """The record of an evaluation as one of routing, with the groups that have positions as its parts."""
        groups = {group: self._positions[group] for group in GROUPS if self._positions[group]}
        spread, parts, rows = {}, {}, record.expert_loads.of(None).layers
        for group, count in groups.items():
            spread[group] = [self._distinct[group, layer] / count for layer in self._pools]
            parts[group] = {"experts per position": Metric(float(np.mean(spread[group])), "experts", count=count)}
            for layer, pools in self._pools.items():
                loads = zip((None,) if pools == 1 else POOLS, self._loads[group, layer].chunk(pools))
                rows += [LayerLoads(layer, load_E.tolist(), group, pool) for pool, load_E in loads if load_E.any()]
        return dataclasses.replace(
            record,
            what="routing",
            parts=parts,
            experts=ExpertLoads(rows),
            settings={**record.settings, "experts_per_position": spread, "most_experts": self._most_distinct},
        )
