"""The text of the reports."""

from __future__ import annotations

from pathlib import Path

from ...common.tables import BITS_PER_BYTE, MISSING, markdown_table, millions, number, percent, without_column
from ...data.identity import DataIdentity
from ..routing.activation import ACTIVE_THRESHOLD
from .language_report import language_section, routing_section
from .modality_report import modality_section
from .paper_numbers import FIGURE_5_ACTIVE, P1, TABLE_1_ENGLISH, TABLE_1_MULTILINGUAL, TABLE_1_MULTIMODAL
from .summary import Summary, differing_settings

# Invisible in rendered Markdown; what stands before it is also printed on the terminal.
END_OF_TABLE = "<!-- end of table -->"

_HEADER = (
    "model", "heads", "experts x width", "parameters", "active", "MFLOPs/token", "tokens/s", "updates", "valid ppl",
    "test ppl", BITS_PER_BYTE, "active experts", "effective experts",
)  # fmt: skip


def comparison(identity: DataIdentity, summaries: list[Summary], drawn: list[tuple[str, Path]], split: str) -> str:
    """One row for every run, figures, what differs in the settings, the paper's numbers apart, the commands."""
    by_name = {summary.run.name: [summary] for summary in summaries}
    header, rows = list(_HEADER), [_row(summary) for summary in summaries]
    if identity.has_images:
        header, rows = without_column(header, rows, BITS_PER_BYTE)
    parts = [
        f"# {'Masked multimodal' if identity.has_images else 'Language'} models side by side",
        _data_line(identity),
        markdown_table(header, rows),
        language_section(by_name),
        modality_section(by_name),
        END_OF_TABLE,
        _notes(identity, summaries[0].counts.context, split),
        routing_section(by_name),
        *_differences(summaries),
        *_figures(drawn),
        _paper(identity),
        *_commands([summary.run.name for summary in summaries], summaries),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def aggregate(
    identity: DataIdentity, table: str, groups: dict[str, list[Summary]], drawn: list[tuple[str, Path]]
) -> str:
    """The table over seeds, how to read it, the figure, the commands of each model's first seed."""
    first = [group[0] for group in groups.values()]
    names = [f"{model}, {summary.run.name}" for model, summary in zip(groups, first)]
    perplexities = (
        "Perplexities are per masked position, of patches and words together, from `mhmoe evaluate`."
        if identity.has_images
        else "Perplexities are per token, from `fairseq-eval-lm`; bits/byte divides by the bytes of the text, line "
        "ends included."
    )
    notes = (
        f"Mean ± sample standard deviation over the seeds. {perplexities} MFLOPs/token: one forward pass, matrix "
        f"products only, attention within {first[0].counts.context:,} tokens. Active experts: at least "
        f"{ACTIVE_THRESHOLD:.0%} of the uniform load; effective experts: exp(entropy of the load) / number."
    )
    parts = ["# Several seeds", _data_line(identity), table, language_section(groups), modality_section(groups)]
    parts += [END_OF_TABLE, notes]
    parts += [routing_section(groups), *_figures(drawn), _paper(identity)]
    parts += _commands(names, first)
    return "\n\n".join(part for part in parts if part) + "\n"


def _data_line(identity: DataIdentity) -> str:
    files = "dictionary, training, validation and test files"
    if identity.has_images:
        files = "dictionary, texts and indexes of images"
    return f"Data: {identity.source}, SHA-256 `{identity.digest}` ({files})."


def _row(summary: Summary) -> list[str]:
    counts, moe, log = summary.counts, summary.counts.moe, summary.run.log
    return [
        summary.run.name,
        MISSING if moe is None else str(moe.num_heads),
        MISSING if moe is None else f"{moe.num_experts} x {moe.expert_ffn_dim:,}",
        millions(counts.total),
        millions(counts.active),
        f"{counts.flops_per_token / 1e6:,.2f}",
        number(log.tokens_per_second(), 0),
        f"{log.num_updates:,}",
        number(summary.perplexity("valid")),
        number(summary.perplexity("test")),
        number(summary.bits_per_byte("test"), 4),
        percent(summary.active_share()),
        percent(summary.effective_share()),
    ]


def _notes(identity: DataIdentity, context: int, split: str) -> str:
    attention = "causal attention"
    perplexities = "per token, from `fairseq-eval-lm`; bits/byte divides by the text's bytes, line ends included."
    if identity.has_images:
        attention = "attention"
        perplexities = "per masked position, patches and words together, from `mhmoe evaluate`."
    lines = [
        "parameters: all, the tied embedding once; active: without the experts that a sub-token's choices leave out.",
        f"MFLOPs/token: one forward pass, matrix products only, {attention} within {context:,} tokens.",
        "tokens/s: training on this machine, median over the log intervals without a validation.",
        f"Perplexities: {perplexities}",
        f"active experts: share with at least {ACTIVE_THRESHOLD:.0%} of the uniform load on the {split} split, mean of "
        "the MoE layers; effective experts: exp(entropy of the load) / number of experts.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _differences(summaries: list[Summary]) -> list[str]:
    runs = [summary.run for summary in summaries]
    differing = differing_settings(runs)
    updates = [str(run.log.num_updates) for run in runs]
    if len(set(updates)) > 1:
        differing = {"updates done": updates, **differing}
    if not differing:
        return ["All runs share data order (seed), updates, batch, learning rate, dropout and context."]
    rows = [[name, *values] for name, values in differing.items()]
    table = markdown_table(["setting", *(run.name for run in runs)], rows)
    return ["## Settings that differ between the runs", table]


def _figures(drawn: list[tuple[str, Path]]) -> list[str]:
    return [f"## {title}\n\n![{title}]({path.as_posix()})" for title, path in drawn]


def _paper(identity: DataIdentity) -> str:
    kind, numbers, training = "English", TABLE_1_ENGLISH, "250,000 updates on RedPajama"
    if identity.languages:
        kind, numbers, training = "multilingual", TABLE_1_MULTILINGUAL, "250,000 updates on Wikipedia in 14 languages"
    others = "Other data, another vocabulary"
    if identity.has_images:
        kind, numbers = "masked multimodal", TABLE_1_MULTIMODAL
        training = "on ImageNet-21k, 160 GB of text and 21 million pairs"
        others = (
            "Of which masked positions it is the perplexity the paper does not say; ours beside it is that of all. "
            "Other data, another vocabulary, another visual tokenizer"
        )
    rows = [
        [f"{experts} experts", *(number(ppl[name]) for name in ("dense", "xmoe", "mhmoe"))]
        for experts, ppl in numbers.items()
    ]
    table = markdown_table([f"paper, {kind}", "dense", "X-MoE", "MH-MoE"], rows)
    active = ", ".join(f"{name} {percent(share)}" for name, share in FIGURE_5_ACTIVE.items())
    return (
        "## What the paper reports, at its own scale\n\n"
        f"Validation perplexity, {P1}, table 1: 12 layers of 768, {training}. {others}, another scale: these numbers "
        f"show an order to look for, not values to reach.\n\n{table}"
        + ("" if identity.has_images else f"\n\nActive experts of 32 (figure 5 there): {active}.")
    )


def _commands(names: list[str], summaries: list[Summary]) -> list[str]:
    commands = [(name, summary.run.command()) for name, summary in zip(names, summaries)]
    kept = [f"# {name}\n{command}" for name, command in commands if command]
    return ["## Commands\n\n```bash\n" + "\n".join(kept) + "\n```"] if kept else []
