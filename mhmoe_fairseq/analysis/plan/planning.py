"""What a training needs before it starts: an architecture and its baselines, counted without memory for weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...checkpoints.summary import count_parts
from ...common.ranges import flag
from ...models.architectures import REFERENCES, Architecture, architecture_options, named_architecture
from ...models.counts import ModelCounts, blank_dictionary, build_on_meta, count_built
from ...models.flags import context_of, expert_parallel_size, moe_config, shared_out
from ...models.options import LanguageModelOptions, MoEOptions, options_with
from ...moe.merged import MERGINGS
from .activation_memory import shape_of
from .ranks import Cluster, RankPlan, plan_ranks
from .table_11 import PAPER_VISUAL_TOKENS, PAPER_VOCAB_SIZES, SAME_MODEL, TABLE_11


@dataclass(frozen=True)
class PlanSettings:
    """What is planned: a named architecture with its baselines, with each of the numbers of experts.

    Args:
        flags: the model's, by name.
        num_visual_tokens: BEiT-3's scores for masked patches.
        cluster: the machines; None to leave out memory, traffic and time.
        cpu: activation memory as on CPUs.
    """

    arch: str
    vocab_size: int
    experts: tuple[int, ...] = (8,)
    flags: Mapping[str, Any] = field(default_factory=dict)
    tokens_per_sample: int = 1024
    num_visual_tokens: int = 0
    cluster: Cluster | None = None
    cpu: bool = False

    @property
    def architecture(self) -> Architecture:
        """``arch`` in its parts."""
        return named_architecture(self.arch)


@dataclass(frozen=True)
class PlanRow:
    """One model: its family, the experts asked for, its counts, also by part of the model.

    ``paper`` has the non-expert, expert and all parameters of P1's table 11 in millions, where it has this very model.
    With a cluster ``ranks`` is its plan there, and ``note`` says so if a budget's experts had to be rounded for it.
    """

    family: str
    experts: int | None
    counts: ModelCounts
    parts: dict[str, int]
    paper: tuple[int, int, int] | None
    ranks: RankPlan | None
    note: str | None


def plan(settings: PlanSettings) -> list[PlanRow]:
    """Count the architecture and its baselines (dense, and the one-head reference) for every number of experts.

    Raises:
        UserError: for an unknown architecture, or what building the model refuses.
    """
    architecture, dictionary = settings.architecture, blank_dictionary(settings.vocab_size)
    family = architecture.family
    families = dict.fromkeys(["dense", REFERENCES.get(family, family), family])
    sizes = architecture.size, settings.vocab_size, settings.num_visual_tokens
    papers_sizes = "base", PAPER_VOCAB_SIZES[architecture.kind], PAPER_VISUAL_TOKENS
    is_papers = sizes == papers_sizes and settings.flags.items() <= SAME_MODEL.items()
    rows = []
    for family in families:
        for experts in [None] if family == "dense" else settings.experts:
            options, size, note = _options(settings, family, experts)
            by = shared_out(options)
            model = build_on_meta(options, dictionary, settings.num_visual_tokens)
            counts, ranks = count_built(model, context_of(options)), None
            if settings.cluster is not None:
                label = family if experts is None or len(settings.experts) == 1 else f"{family} {experts:,}"
                ranks = plan_ranks(label, counts, shape_of(model), settings.cluster, size, by=by, cpu=settings.cpu)
            paper = TABLE_11.get((architecture.kind, family), {}).get(experts) if is_papers else None
            rows.append(PlanRow(family, experts, counts, count_parts(model.named_parameters()), paper, ranks, note))
    return rows


def _options(settings: PlanSettings, family: str, experts: int | None) -> tuple[MoEOptions, int, str | None]:
    """A model's options, how many ranks share its experts, and how a budget's experts were rounded for them."""
    name = settings.architecture.of_family(family).name
    flags = dict(settings.flags if name == settings.arch else _flags_of(family, settings.flags))
    asked, size, note, moe = flags.pop("mhmoe_expert_parallel_size", None), 1, None, None
    if experts is not None:
        flags["moe_expert_count"] = experts
    options = architecture_options(name, **flags)
    cluster = None if flags.get("mhmoe_routing") in MERGINGS else settings.cluster
    if experts is not None and cluster is not None and (moe := moe_config(options)) is not None:
        number, by = moe.num_banks, shared_out(options)
        if by == "experts":
            number *= experts * (options.mhmoe_granularity or 1) - (options.mhmoe_shared_experts or 0)
        size = expert_parallel_size(number, asked, cluster.ranks, "--ranks", what=f"the number of {by}")
    if moe is not None and moe.total_experts % size:
        multiple = size // math.gcd(size, moe.num_banks)
        rounded = max(round(moe.num_experts / multiple), 1) * multiple
        fixed = {"mhmoe_budget": "none", "moe_ffn_dim": moe.expert_ffn_dim, "moe_expert_count": rounded}
        if flags.pop("mhmoe_granularity", None):
            flags.pop("moe_top1_expert", None)
            fixed["moe_top_k"] = moe.top_k
        words = " ".join(f"{flag(name)} {value}" for name, value in fixed.items())
        note = f"the budget's {moe.experts_in_words} experts are rounded to what {size:,} ranks can share: {words}"
        options = architecture_options(name, **{**flags, **fixed})
    if isinstance(options, LanguageModelOptions):
        options.tokens_per_sample = settings.tokens_per_sample
    return options, size, note


def _flags_of(family: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that a baseline has: dense none of MoE's, a budget's reference no other's, nor granularity."""
    if family == "dense":
        kept = [name for name in options_with(needs="") if name != "moe_freq"]
        of_experts = ("mhmoe_quantize", "experts")
        return {name: value for name, value in flags.items() if name in kept and (name, str(value)) != of_experts}
    others = {*options_with(needs="heads"), "mhmoe_granularity", "mhmoe_shared_experts"}
    return {name: value for name, value in flags.items() if name not in others}
