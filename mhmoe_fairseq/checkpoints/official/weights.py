"""The official repository's weights under our names: pure functions on state dictionaries.

Facts from github.com/yushuiwx/MH-MoE (``component/xmoe/tutel_moe_layer.py``, ``feedforward_network.py``,
``multihead_attention.py``, ``embedding.py``):

- One token's sub-tokens are consecutive there too: ``(N, D) -> (N, H, D / H) -> (N * H, D / H)``. The projections need
  no reordering.
- A gated network computes ``fc2(fc1(x) * silu(fc3(x)))``: its ``fc3`` is our ``fc1``, its ``fc1`` our gate.
- Rotary positions turn feature i together with i + d/2, ours feature 2i with 2i + 1: the rows of the query and key maps
  are reordered. Attention does not change, since queries and keys are reordered alike.
- The projections always have biases, ``--no-bias`` or not.
- Learned positions are counted from 2, as everywhere in fairseq; ours from 0.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ...common.errors import UserError

_ROUTER_AND_PROJECTIONS = {
    "gate.wg.weight": "router.weight",
    "gate.wg_reduction.weight": "router.reduction.weight",
    "gate.wg": "router.expert_embedding",
    "multi_heads.weight": "head_projection.0.weight",
    "multi_heads.bias": "head_projection.0.bias",
    "out_proj.weight": "merge_projection.0.weight",
    "out_proj.bias": "merge_projection.0.bias",
}
_EXPERT = re.compile(r"experts\.(\d+)\.(fc1|fc2|fc3|ffn_layernorm)\.(weight|bias)")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_MOE_PREFIX = "moe_layer."
_ATTENTION = re.compile(r"self_attn\.(q_proj|k_proj|v_proj|out_proj|inner_attn_ln)\.(weight|bias)")
_NORM = re.compile(r"(self_attn_layer_norm|final_layer_norm|ffn\.ffn_layernorm)\.(weight|bias)")
_DENSE = re.compile(r"ffn\.(fc1|fc2|fc3)\.(weight|bias)")
_OUTSIDE = re.compile(r"decoder\.(embed_tokens\.weight|output_projection\.weight|(layer_norm|layernorm_embedding)\..+)")
_POSITIONS = "decoder.embed_positions.weight"
_FIRST_POSITION = 2
# Not weights: tables that both sides compute.
_COMPUTED = re.compile(
    r"decoder\.(version|embed_positions\._float_tensor|layers\.\d+\.self_attn\.rotary_emb\.inv_freq)"
)


def convert_moe_layer(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One MoE layer: names below ``moe_layer.`` to the names of ``MHMoELayer``.

    Experts ``experts.E.fc1.weight (F, d)``, ``fc2 (d, F)``, ``fc3 (F, d)`` become stacks with E in front.

    Raises:
        UserError: naming the weights that have no counterpart, or experts that do not fit together.
    """
    converted: dict[str, Tensor] = {}
    experts: dict[tuple[str, str], dict[int, Tensor]] = defaultdict(dict)
    unknown = []
    for name, value in official.items():
        match = _EXPERT.fullmatch(name)
        if match is not None:
            experts[match[2], match[3]][int(match[1])] = value
        elif name in _ROUTER_AND_PROJECTIONS:
            converted[_ROUTER_AND_PROJECTIONS[name]] = value
        else:
            unknown.append(name)
    refuse_names(unknown)
    gated = ("fc3", "weight") in experts
    for (module, kind), values in experts.items():
        target = "layernorm" if module == "ffn_layernorm" else _gated_name(module, gated)
        converted[f"experts.{target}_{kind}"] = _stack(f"experts.*.{module}.{kind}", values)
    if "experts.layernorm_weight" in converted and "experts.layernorm_bias" not in converted:
        raise UserError("experts.*.ffn_layernorm is an RMSNorm, without bias; our experts' norm is a LayerNorm")
    return converted


def convert_decoder(official: Mapping[str, Tensor], *, rotary_heads: int | None) -> dict[str, Tensor]:
    """A whole decoder to the names of our language model.

    Args:
        official: the ``model`` of a checkpoint, experts numbered through.
        rotary_heads: attention heads if queries and keys are rotated, else None.

    Raises:
        UserError: naming all weights that have no counterpart.
    """
    converted: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    unknown = []
    for name, value in official.items():
        match = _LAYER.fullmatch(name)
        if match is not None and _is_known(match[2]):
            layers[match[1]][match[2]] = value
        elif _OUTSIDE.fullmatch(name):
            converted[name] = value
        elif name == _POSITIONS:
            converted[name] = value[_FIRST_POSITION:]
        elif not _COMPUTED.fullmatch(name):
            unknown.append(name)
    refuse_names(unknown)
    for index, layer in layers.items():
        own = _layer(layer, rotary_heads)
        converted.update({f"decoder.layers.{index}.{name}": value for name, value in own.items()})
    return {name: value.float() for name, value in converted.items()}


def moe_layers(official: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The MoE layers of a decoder by index, each converted."""
    layers: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, value in official.items():
        match = _LAYER.fullmatch(name)
        if match is not None and match[2].startswith(_MOE_PREFIX):
            layers[int(match[1])][match[2].removeprefix(_MOE_PREFIX)] = value
    return {
        index: {name: value.float() for name, value in convert_moe_layer(layer).items()}
        for index, layer in sorted(layers.items())
    }


def rows_for_rotary(weight: Tensor, num_heads: int) -> Tensor:
    """Query or key rows ``(heads * d, ...)``: feature i of a head goes to 2i, feature i + d/2 to 2i + 1."""
    halves = weight.unflatten(0, (num_heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def refuse_names(names: Iterable[str]) -> None:
    """Raise ``UserError`` naming weights without a counterpart, if there are any."""
    names = sorted(names)
    if names:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise UserError(
            f"cannot be imported, our model has no counterpart for the weights {', '.join(names[:8])}{more}"
        )


def _is_known(name: str) -> bool:
    below = name.removeprefix(_MOE_PREFIX)
    if below != name:
        return below in _ROUTER_AND_PROJECTIONS or _EXPERT.fullmatch(below) is not None
    return any(pattern.fullmatch(name) for pattern in (_ATTENTION, _NORM, _DENSE))


def _layer(layer: Mapping[str, Tensor], rotary_heads: int | None) -> dict[str, Tensor]:
    gated = "ffn.fc3.weight" in layer
    converted, moe = {}, {}
    for name, value in layer.items():
        match = _DENSE.fullmatch(name)
        if name.startswith(_MOE_PREFIX):
            moe[name.removeprefix(_MOE_PREFIX)] = value
        elif match is not None:
            converted[f"ffn.{_gated_name(match[1], gated)}.{match[2]}"] = value
        elif rotary_heads is not None and name.startswith(("self_attn.q_proj.", "self_attn.k_proj.")):
            converted[name] = rows_for_rotary(value, rotary_heads)
        else:
            converted[name] = value
    return {**converted, **{_MOE_PREFIX + name: value for name, value in convert_moe_layer(moe).items()}}


def _gated_name(module: str, gated: bool) -> str:
    return {"fc1": "gate", "fc3": "fc1"}.get(module, module) if gated else module


def _stack(name: str, values: dict[int, Tensor]) -> Tensor:
    if sorted(values) != list(range(len(values))) or len({value.shape for value in values.values()}) != 1:
        shapes = {index: tuple(values[index].shape) for index in sorted(values)}
        raise UserError(f"{name}: experts must be numbered from 0 and have one shape, not {shapes}")
    return torch.stack([values[index] for index in range(len(values))])
