"""Named architectures ``FAMILY_KIND_SIZE``, such as ``mhmoe_lm_tiny``: every family of every kind in every size.

Each fills what the user left open (None) and may do so twice: fairseq calls it for the command line and again for the
stored configuration. ``base`` is the paper's model.
"""

import dataclasses
import functools
import itertools
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fairseq.models import register_model_architecture

from ..common.errors import UserError
from ..common.ranges import flag
from ..moe.merged import MERGINGS
from . import beit3, language_model  # noqa: F401  (models must be registered before their architectures)
from .options import BEIT3_NAME, DOMAIN, MODEL_NAME, BEiT3Options, LanguageModelOptions, MoEOptions
from .precision import device_type_of, resolve


@dataclass(frozen=True)
class Kind:
    """What is built: a language model or BEiT-3."""

    model: str  # its registered name
    options: type[MoEOptions]
    stack: str  # how its flags of sizes begin
    from_task: dict[str, Any]  # options that fairseq fills from the task, and their values without one
    defaults: dict[str, Any]  # of flags that the other kind has not


KINDS = {
    "lm": Kind(
        MODEL_NAME, LanguageModelOptions, "decoder", {"max_target_positions": None, "tokens_per_sample": 1024}, {}
    ),
    "beit3": Kind(
        BEIT3_NAME, BEiT3Options, "encoder", {"img_size": 224, "patch_size": 16, "max_text_length": 64},
        {"drop_path_rate": 0.0},
    ),
}  # fmt: skip
# Tiny trains in minutes on two CPU cores.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"layers": 4, "embed_dim": 128, "attention_heads": 4, "ffn_embed_dim": 512},
    "small": {"layers": 6, "embed_dim": 256, "attention_heads": 8, "ffn_embed_dim": 1024},
    "base": {"layers": 12, "embed_dim": 768, "attention_heads": 12, "ffn_embed_dim": 3072},
}
_OWN_ROUTERS = {"smear": "layernorm"}  # of a way to route, where --mhmoe-router does not say
_COMMON = {"activation_fn": "gelu", "dropout": 0.1, "attention_dropout": 0.0, "activation_dropout": 0.0}


def fill(args: Any, **defaults: Any) -> None:
    """Set every attribute of ``defaults`` that ``args`` leaves open."""
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


# ---------------------------------------------------------------------- families


def dense(args: Any) -> None:
    """No MoE layers; ``UserError`` if ``--moe-freq`` asks for some."""
    if getattr(args, "moe_freq", None):
        raise UserError(f"--moe-freq ({args.moe_freq}) contradicts a dense_* architecture")
    fill(args, moe_freq=0)


def sparse(args: Any, router: str) -> None:
    """GShard's sparse MoE: an MoE layer every second layer, eight experts, two per token, one head.

    Its router is linear; X-MoE's is low-dimensional and normalised. Of merged experts a token passes one network.
    """
    routing = str(getattr(args, "mhmoe_routing", None))
    top_k = 1 if getattr(args, "moe_top1_expert", None) or routing in (*MERGINGS, *DOMAIN) else 2
    fill(args, moe_freq=2, moe_expert_count=8, moe_top_k=top_k, mhmoe_heads_number=1)
    if str(getattr(args, "mhmoe_router", None) or "arch") == "arch":
        args.mhmoe_router = "xmoe" if getattr(args, "use_xmoe", None) else _OWN_ROUTERS.get(routing, router)


def mhmoe(args: Any) -> None:
    """Four heads, and experts that spend X-MoE's parameters unless their width is given."""
    fill(args, mhmoe_heads_number=4)
    fill(args, mhmoe_budget="params" if getattr(args, "moe_ffn_dim", None) is None else "none")
    sparse(args, router="xmoe")


def fine_grained(args: Any, shared_experts: int) -> None:
    """Experts a quarter as wide, four times as many and four times as many for each token, at GShard's budget.

    ``--moe-expert-count``, ``--moe-top-k`` and ``--moe-ffn-dim`` are the reference's. Gate weights are the softmax as
    it is, and the balance loss counts all choices. With shared experts this is DeepSeekMoE's layer (arXiv 2401.06066),
    without OLMoE's (2409.02060); activation, norms, biases and the weights of losses are left to a recipe.
    """
    fill(args, mhmoe_granularity=4, mhmoe_shared_experts=shared_experts)
    fill(args, mhmoe_normalize_gates="off", mhmoe_balance_assignment="topk")
    sparse(args, router="linear")


def remoe(args: Any) -> None:
    """As many and as wide experts as GShard's, each used where its logit is positive (arXiv 2412.14711)."""
    fill(args, mhmoe_routing="relu")
    sparse(args, router="linear")


FAMILIES: dict[str, Callable[[Any], None]] = {
    "dense": dense,
    "smoe": functools.partial(sparse, router="linear"),
    "xmoe": functools.partial(sparse, router="xmoe"),
    "mhmoe": mhmoe,
    "deepseekmoe": functools.partial(fine_grained, shared_experts=1),
    "olmoe": functools.partial(fine_grained, shared_experts=0),
    "remoe": remoe,
}
# Whose parameters and products a family keeps.
REFERENCES = {"mhmoe": "xmoe", "deepseekmoe": "smoe", "olmoe": "smoe", "remoe": "smoe"}


# ---------------------------------------------------------------------- architectures


@dataclass(frozen=True)
class Architecture:
    """A registered name in its parts, keys of ``FAMILIES``, ``KINDS`` and ``SIZES``; called, it fills options."""

    family: str
    kind: str
    size: str

    @property
    def name(self) -> str:
        """As given to ``--arch``."""
        return f"{self.family}_{self.kind}_{self.size}"

    def of_family(self, family: str) -> "Architecture":
        """The architecture of the same kind and size in another family."""
        return dataclasses.replace(self, family=family)

    def __call__(self, args: Any) -> None:
        """Fill what ``args`` leaves open.

        Options that a checkpoint of an earlier version does not have yet are set to None, which means "not given".
        """
        kind = KINDS[self.kind]
        FAMILIES[self.family](args)
        fill(args, **{f"{kind.stack}_{name}": value for name, value in SIZES[self.size].items()})
        fill(args, **{field.name: None for field in dataclasses.fields(kind.options) if field.default is None})
        fill(args, **_COMMON, **kind.defaults, cpu=False)
        if args.mhmoe_precision is not None:  # the configuration that a checkpoint keeps says what was computed in
            args.mhmoe_precision = resolve(args.mhmoe_precision, device_type_of(args))


ARCHITECTURES = {one.name: one for one in (Architecture(*parts) for parts in itertools.product(FAMILIES, KINDS, SIZES))}
for _name, _architecture in ARCHITECTURES.items():
    register_model_architecture(KINDS[_architecture.kind].model, _name)(_architecture)


def named_architecture(name: str) -> Architecture:
    """The architecture of a name; ``UserError`` naming all of them if there is none."""
    if name not in ARCHITECTURES:
        raise UserError(f"--arch ({name}) must be one of {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[name]


def architecture_options(arch: str, **flags: Any) -> Any:
    """The options of a named architecture with ``flags`` given, as the command line would fill them.

    Example: ``architecture_options("mhmoe_lm_base", moe_expert_count=32)``.

    Returns:
        ``LanguageModelOptions``, or ``BEiT3Options`` for ``*_beit3_*``.

    Raises:
        UserError: if there is no such architecture or flag.
    """
    architecture = named_architecture(arch)
    kind = KINDS[architecture.kind]
    options = kind.options(**kind.from_task, cpu=False, tpu=False, amp=False, fp16=False)
    for name, value in flags.items():
        if not hasattr(options, name):
            raise UserError(f"{flag(name)} is not an option of {arch}")
        setattr(options, name, value)
    architecture(options)
    return options


def stored_options(stored: Mapping[str, Any]) -> Any:
    """The options of a model that a checkpoint or an exported folder keeps; ``UserError`` as above."""
    architecture = named_architecture(stored["_name"])
    options = Namespace(**{**KINDS[architecture.kind].from_task, **stored})
    architecture(options)
    return options
