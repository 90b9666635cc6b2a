"""The reports' part on languages: perplexity and bits per character of each, and how routing treats them."""

from __future__ import annotations

from pathlib import Path

from ...common.tables import MISSING, markdown_table, number, percent
from ...evaluation.split_scores import total_of
from ..routing.language_routing import LanguageRouting
from .aggregate import figures, spread
from .language_plots import draw_language_bars, draw_language_loads, draw_language_matrices
from .summary import Summary

_FIGURES = {"perplexity": ("ppl", 2), "bits_per_character": ("bits/char", 4)}  # name in the table, digits


def evaluated_split(groups: dict[str, list[Summary]]) -> str | None:
    """The split whose languages the report shows: test, else valid; None if no run has languages."""
    for split in ("test", "valid"):
        if any(summary.run.languages.get(split) for group in groups.values() for summary in group):
            return split
    return None


def language_section(groups: dict[str, list[Summary]]) -> str:
    """Tables of languages by models, mean and deviation where there are several seeds; empty without languages.

    Args:
        groups: model -> its runs.
    """
    split = evaluated_split(groups)
    if split is None:
        return ""
    header = ["language", *(f"{model}, {short}" for short, _ in _FIGURES.values() for model in groups)]
    values = {figure: by_model(groups, figure, split) for figure in _FIGURES}
    languages = list(dict.fromkeys(name for by_language in values["perplexity"].values() for name in by_language))
    rows = [
        [
            language,
            *(
                spread(values[figure][model].get(language, []), digits)
                for figure, (_, digits) in _FIGURES.items()
                for model in groups
            ),
        ]
        for language in languages
    ]
    total = ["all, by tokens"]
    for figure, (_, digits) in _FIGURES.items():
        total += [
            spread(figures(group, lambda summary, figure=figure: _of_all(summary, figure, split)), digits)
            for group in groups.values()
        ]
    seeds = max(map(len, groups.values()))
    note = (
        f"On the {split} split, from `mhmoe evaluate`. Perplexities are per token of one vocabulary: compare models, "
        "not languages; bits/char divide by the characters of the text, line ends included."
        + (" Mean ± sample standard deviation over the seeds." if seeds > 1 else "")
    )
    return f"## Languages\n\n{markdown_table(header, [*rows, total])}\n\n{note}"


def _of_all(summary: Summary, figure: str, split: str) -> float | None:
    scores = list(summary.run.languages.get(split, {}).values())
    return getattr(total_of(scores), figure) if scores else None


def by_model(groups: dict[str, list[Summary]], figure: str, split: str) -> dict[str, dict[str, list[float]]]:
    """Model -> language -> one figure of each seed that has it."""
    found: dict[str, dict[str, list[float]]] = {}
    for model, group in groups.items():
        found[model] = {}
        for summary in group:
            for language, value in summary.language_figures(figure, split).items():
                found[model].setdefault(language, []).append(value)
    return found


def draw_languages(folder: Path, groups: dict[str, list[Summary]]) -> list[tuple[str, Path]]:
    """The figures of the languages: title and file of each. Routing is drawn of a model's first seed."""
    drawn = []
    split = evaluated_split(groups)
    for figure, ylabel in (("perplexity", "perplexity"), ("bits_per_character", "bits per character")):
        values = {} if split is None else by_model(groups, figure, split)
        if any(values.values()):
            title = f"{ylabel.capitalize()} by language, {split} split"
            path = folder / f"languages-{figure.replace('_', '-')}.png"
            draw_language_bars(path, values, title, ylabel)
            drawn.append((title, path))
    for model, group in groups.items():
        routing = group[0].language_routing
        if routing is not None:
            for kind, draw in (("load", draw_language_loads), ("overlap", draw_language_matrices)):
                path = folder / f"languages-{kind}-{model}.png"
                draw(path, routing, model)
                drawn.append(
                    (f"{model}: {'expert load by language' if kind == 'load' else 'languages in routing'}", path)
                )
    return drawn


def routing_section(groups: dict[str, list[Summary]]) -> str:
    """A row for every MoE model, its first seed: how much languages share, and how well routing tells them apart."""
    measured = {model: group[0].language_routing for model, group in groups.items()}
    rows = [[model, *summary_cells(routing)] for model, routing in measured.items() if routing is not None]
    if not rows:
        return ""
    routing = next(routing for routing in measured.values() if routing is not None)
    table = markdown_table(["model", "load in common", "language guessed right"], rows)
    return f"## Languages in routing\n\n{table}\n\n{explanation(routing)}"


def summary_cells(routing: LanguageRouting) -> list[str]:
    """Mean overlap of the layers, and the accuracy of guesses from all layers."""
    shared = routing.mean_overlap()
    return [percent(sum(shared) / len(shared)), percent(routing.accuracy()[-1])]


def explanation(routing: LanguageRouting) -> str:
    """What the figures are."""
    return (
        f"On the {routing.split} split. Load in common: the share of their assignments that two languages give to the "
        "same experts, sum of min(p, q), mean of all pairs of languages. Language guessed right: naive Bayes on the "
        f"experts that a block's first {routing.piece_tokens} tokens went to, learnt on every second block; chance is "
        f"{percent(1 / len(routing.languages))}."
    )


def describe_languages(routing: LanguageRouting) -> str:
    """Tables for the terminal: a row for every language, then one for every MoE layer."""
    shared = routing.overlap_LGG().mean(0)
    guesses = routing.guesses[-1]
    by_language = []
    for place, language in enumerate(routing.languages):
        others = [other for other in range(len(routing.languages)) if other != place]
        nearest = max(others, key=lambda other: float(shared[place, other]), default=place)
        wrong = max(others, key=lambda other: guesses[place][other], default=place)
        by_language.append([
            language,
            f"{routing.tokens[place]:,}",
            number(routing.loss[place], 4),
            f"{routing.languages[nearest]} {percent(float(shared[place, nearest]))}",
            percent(guesses[place][place] / max(sum(guesses[place]), 1)),
            routing.languages[wrong] if others and guesses[place][wrong] else MISSING,
        ])  # fmt: skip
    names = [*(str(layer + 1) for layer in routing.layers), "all"]
    overlaps = routing.mean_overlap()
    columns = [*overlaps, sum(overlaps) / len(overlaps)]
    by_layer = [[name, percent(columns[place]), percent(routing.accuracy()[place])] for place, name in enumerate(names)]
    header = ["language", "tokens", "bits per token", "most in common", "guessed right", "most often taken for"]
    return "\n\n".join([
        markdown_table(header, by_language),
        markdown_table(["layer", "load in common", "language guessed right"], by_layer),
        explanation(routing),
    ])  # fmt: skip
