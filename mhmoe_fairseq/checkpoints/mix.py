"""Branch-Train-MiX (Sukhbaatar et al., arXiv 2403.07816): dense models of one seed become one mixture of experts.

The branches' feed-forward networks become experts; everything else is the branches' mean; the router is new. Gates are
renormalised over the chosen experts, so that branches that are all equal give a model that computes what they compute,
whatever its router says. One branch given several times is sparse upcycling: equal experts.
"""

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import UserError
from ..common.files import sha256_of
from ..models.architectures import named_architecture
from ..models.counts import blank_dictionary, build_on_meta
from ..models.options import LanguageModelOptions
from .average import mean_weights, weights_of_one_model
from .files import read_checkpoint
from .official.importing import stored_checkpoint

_EXPERTS = re.compile(r"(.*\.layers\.\d+)\.moe_layer\.experts\.(fc1|gate|layernorm|fc2)_(weight|bias)")


def mix(
    seed: Path, branches: Sequence[Path], *, moe_freq: int = 1, top_k: int = 2, router_seed: int = 1
) -> dict[str, Any]:
    """A checkpoint of an ``smoe_lm_*`` model that begins a training.

    Args:
        seed: what the branches were trained from, which says what they have to be.
        branches: at least two, of which each becomes an expert; the seed may be one of them.
        moe_freq: every n-th layer gets experts; the networks of the others are averaged like everything else.
        top_k: experts per token.
        router_seed: of the routers' random initial values.

    Raises:
        UserError: naming the file or flag, its value and the rule.
    """
    if top_k < 2:
        raise UserError(
            f"--moe-top-k ({top_k}) must be at least 2: the weight of a single expert is its raw probability, with "
            "which not even equal branches would compute what they computed"
        )
    if len(branches) < top_k:
        raise UserError(f"--branch: {len(branches)} of them cannot be --moe-top-k ({top_k}) experts for every token")
    paths = [seed, *branches]
    checkpoints = [read_checkpoint(path) for path in paths]
    of_seed, *weights = weights_of_one_model(paths, checkpoints)
    sizes = {"moe_freq": moe_freq, "moe_expert_count": len(branches), "moe_top_k": top_k}
    options = _sparse_options(seed, checkpoints[0], sizes)
    model = build_on_meta(options, blank_dictionary(len(of_seed["decoder.embed_tokens.weight"])))
    means = mean_weights(branches, weights)
    means |= {name: value for name, value in of_seed.items() if not value.is_floating_point()}
    routers = _new_routers(model, router_seed)
    state = {name: _mixed(name, means, weights, routers) for name in model.state_dict()}
    files = [{"path": str(path), "sha256": sha256_of(path)} for path in paths]
    origin = {
        "method": "branch-train-mix",
        "seed": files[0],
        "branches": files[1:],
        "router_seed": router_seed,
        **sizes,
    }
    return {**stored_checkpoint(state, options, checkpoints[0]["cfg"]["task"]), "mixed_from": origin}


def _sparse_options(path: Path, checkpoint: Mapping[str, Any], sizes: Mapping[str, int]) -> LanguageModelOptions:
    """The seed's options with experts in place of its dense networks; ``UserError`` if it is no such model."""
    stored = (checkpoint.get("cfg") or {}).get("model") or {}
    arch = str(stored.get("_name"))
    if not arch.startswith("dense_lm_"):
        raise UserError(f"--seed {path}: its --arch ({arch}) must be a dense language model's, dense_lm_*")
    options = LanguageModelOptions.from_namespace(Namespace(**{**stored, **sizes}))
    if not 1 <= sizes["moe_freq"] <= options.decoder_layers:
        layers = f"the model's {options.decoder_layers} layers"
        raise UserError(f"--moe-freq ({sizes['moe_freq']}) must be at least 1 and at most {layers}")
    if options.rms_norm and options.subln:
        raise UserError(
            f"--seed {path}: was trained with --rms-norm and --subln, whose inner norm is an RMSNorm in dense networks "
            "and a LayerNorm in experts: no experts compute what the branches' networks compute"
        )
    sparse = named_architecture(arch).of_family("smoe")
    sparse(options)
    options._name = sparse.name
    return options


def _new_routers(model: Any, seed: int) -> dict[str, Tensor]:
    """The routers' weights by their names in the model, drawn as those of a new model are."""
    found: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index, layer in enumerate(model.decoder.layers):
            if layer.is_moe_layer:
                router = layer.moe_layer.router.to_empty(device="cpu")
                router.reset_parameters()
                prefix = f"decoder.layers.{index}.moe_layer.router."
                found |= {prefix + name: value for name, value in router.state_dict().items()}
    return found


def _mixed(
    name: str, means: Mapping[str, Tensor], weights: Sequence[Mapping[str, Tensor]], routers: Mapping[str, Tensor]
) -> Tensor:
    """One tensor of the mixed model: an expert's from each branch, the router's, or else the mean."""
    if match := _EXPERTS.fullmatch(name):
        layer, part, kind = match.groups()
        source = f"{layer}.ffn.{'ffn_layernorm' if part == 'layernorm' else part}.{kind}"
        return torch.stack([state[source] for state in weights])
    return routers[name] if name in routers else means[name]
