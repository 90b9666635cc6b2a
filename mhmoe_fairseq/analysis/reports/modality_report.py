"""The reports' part on masked multimodal models: perplexity and accuracy of every kind of masked positions."""

from __future__ import annotations

from pathlib import Path

from ...common.tables import markdown_table
from ...criterions.masked_multimodal import PARTS
from ...evaluation.modality_scores import ModalityScores, PartScore, together
from .aggregate import spread
from .language_plots import draw_language_bars
from .plots import draw_curves
from .runs import SPLITS
from .summary import Summary

# Part -> its name in tables.
PART_NAMES = {
    "image": "patches of images",
    "text": "words of texts",
    "pair_image": "patches of pairs",
    "pair_text": "words of pairs",
}
_TOTAL = "all masked positions"


def modality_section(groups: dict[str, list[Summary]]) -> str:
    """Tables of parts by models, mean and deviation where there are several seeds; empty without images.

    Args:
        groups: model -> its runs.
    """
    sections = [_split_section(groups, split) for split in reversed(SPLITS)]
    return "\n\n".join(section for section in sections if section)


def _split_section(groups: dict[str, list[Summary]], split: str) -> str:
    scores = {
        model: [summary.run.modalities[split] for summary in group if split in summary.run.modalities]
        for model, group in groups.items()
    }
    found = {part for seeds in scores.values() for seed in seeds for part in seed.parts}
    if not found:
        return ""
    header = ["masked", "positions", *(f"{model}, ppl" for model in groups), "no context, ppl"]
    header += [*(f"{model}, right" for model in groups), "no context, right"]
    rows = [_row(PART_NAMES[part], scores, part) for part in PARTS if part in found]
    rows.append(_row(_TOTAL, scores, None))
    seeds = max(map(len, scores.values()))
    note = (
        f"On the {split} split, from `mhmoe evaluate`: every image and text once, with the same masks for every "
        "model. ppl: perplexity per masked position, of patches among the visual tokenizer's ids and of words among "
        f"the dictionary; {_TOTAL}: of patches and words together, which the paper's table is compared with; right: "
        "share of masked positions whose most probable symbol is the right one; no context: a guess that sees nothing "
        "but knows how often every symbol is masked in this split."
        + (" Mean ± sample standard deviation over the seeds." if seeds > 1 else "")
    )
    return f"## Masked positions, {split} split\n\n{markdown_table(header, rows)}\n\n{note}"


def _row(name: str, scores: dict[str, list[ModalityScores]], part: str | None) -> list[str]:
    measured = {model: [_score(seed.parts, part) for seed in seeds] for model, seeds in scores.items()}
    kept = {model: [score for score in seeds if score is not None] for model, seeds in measured.items()}
    # The same masks, so the same for all models that have the part.
    guesses = [_score(seed.without_context, part) for seeds in scores.values() for seed in seeds]
    guessed = [score for score in guesses if score is not None][:1]
    counts = dict.fromkeys(f"{score.targets:,}" for seeds in kept.values() for score in seeds)
    return [
        name,
        " / ".join(counts),
        *(spread([score.perplexity for score in seeds]) for seeds in (*kept.values(), guessed)),
        *(_percentages([score.accuracy for score in seeds]) for seeds in (*kept.values(), guessed)),
    ]


def _score(parts: dict[str, PartScore], part: str | None) -> PartScore | None:
    return together(list(parts.values())) if part is None else parts.get(part)


def _percentages(shares: list[float]) -> str:
    return spread([100 * share for share in shares], digits=1) + (" %" if shares else "")


def draw_modalities(folder: Path, groups: dict[str, list[Summary]]) -> list[tuple[str, Path]]:
    """Perplexity of the parts as bars and over the updates of each model's first run: title and file of each figure."""
    drawn = []
    for split in SPLITS:
        values = {model: _perplexities(group, split) for model, group in groups.items()}
        if any(values.values()):
            title = f"Perplexity by what is masked, {split} split"
            path = folder / f"masked-perplexity-{split}.png"
            draw_language_bars(path, values, title, "perplexity")
            drawn.append((title, path))
    return drawn + _draw_part_curves(folder, groups)


def _perplexities(group: list[Summary], split: str) -> dict[str, list[float]]:
    """Name of a part -> its perplexity in every seed."""
    found: dict[str, list[float]] = {}
    for summary in group:
        scores = summary.run.modalities.get(split)
        for part, score in (scores.parts if scores else {}).items():
            found.setdefault(PART_NAMES[part], []).append(score.perplexity)
    return found


def _draw_part_curves(folder: Path, groups: dict[str, list[Summary]]) -> list[tuple[str, Path]]:
    drawn = []
    for part in PARTS:
        curves = [(model, *group[0].run.log.curve(f"valid_{part}_ppl")) for model, group in groups.items()]
        curves = [curve for curve in curves if curve[1]]
        if curves:
            path = folder / f"masked-{part.replace('_', '-')}.png"
            title = f"Validation perplexity, masked {PART_NAMES[part]}"
            draw_curves(path, curves, title, "perplexity", log_scale=True)
            drawn.append((title, path))
    return drawn
