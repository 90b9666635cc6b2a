"""One run's figures for the tables: sizes, costs, perplexities, expert use."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fairseq.data import Dictionary

from ...common.files import sha256_of
from ...data.identity import DataIdentity
from ...models.counts import ModelCounts, count_model
from ..routing.activation import Activation, mean, measured_activation
from ..routing.language_routing import LanguageRouting, activation_file, is_multilingual, measured_languages
from .runs import Run

# Settings that a fair comparison keeps equal, by section of the stored configuration.
COMPARED_SETTINGS = (
    ("optimization", "max_update"),
    ("optimization", "update_freq"),
    ("optimization", "lr"),
    ("optimization", "clip_norm"),
    ("dataset", "batch_size"),
    ("dataset", "max_tokens"),
    ("task", "tokens_per_sample"),
    ("task", "sample_break_mode"),
    ("task", "langs"),
    ("task", "multilang_sampling_alpha"),
    ("task", "mhmoe_language_token"),
    ("task", "modalities"),
    ("task", "img_size"),
    ("task", "patch_size"),
    ("task", "max_text_length"),
    ("task", "image_mask_prob"),
    ("task", "text_mask_prob"),
    ("task", "pair_text_mask_prob"),
    ("common", "seed"),
    ("model", "dropout"),
    ("model", "mhmoe_precision"),
    ("criterion", "moe_gate_loss_wt"),
    ("criterion", "masked_loss_average"),
    ("lr_scheduler", "warmup_updates"),
)


@dataclass(frozen=True)
class Summary:
    """A run, what its model costs, and which experts it, and each language, uses (None if dense or not measured)."""

    run: Run
    counts: ModelCounts
    activation: Activation | None
    language_routing: LanguageRouting | None = None

    def perplexity(self, split: str) -> float | None:
        """Perplexity per token, as ``fairseq-eval-lm`` printed it."""
        evaluation = self.run.evaluations.get(split)
        return None if evaluation is None else evaluation.perplexity

    def bits_per_byte(self, split: str) -> float | None:
        """Comparable across vocabularies; None without a manifest or where not every token was evaluated."""
        evaluation = self.run.evaluations.get(split)
        if evaluation is None:
            return None
        return self.run.data.bits_per_byte(split, evaluation.loss, evaluation.tokens)

    def language_figures(self, figure: str, split: str) -> dict[str, float]:
        """``perplexity`` or ``bits_per_character`` of every language that has it."""
        scores = self.run.languages.get(split, {})
        found = {language: getattr(score, figure) for language, score in scores.items()}
        return {language: value for language, value in found.items() if value is not None}

    def active_share(self) -> float | None:
        """Mean over the MoE layers."""
        return None if self.activation is None else mean(self.activation.active())

    def effective_share(self) -> float | None:
        """Mean over the MoE layers."""
        return None if self.activation is None else mean(self.activation.effective())


def summarise(
    run: Run, data: Path, identity: DataIdentity, dictionary: Dictionary, split: str | None, batch_size: int
) -> Summary:
    """Count the model, and measure its experts on ``split`` unless that is None (kept in the run's folder)."""
    counts = count_model(run.options, dictionary, run.num_visual_tokens())
    if split is None or counts.moe is None:
        return Summary(run, counts, None)
    if run.data.has_images:
        return Summary(run, counts, _routed_experts(run, split))
    if is_multilingual(run.settings):
        measured = measured_languages(run.path, run.checkpoint, data, split, identity.digest, batch_size)
        return Summary(run, counts, *measured)
    cache = activation_file(run.path, split)
    return Summary(run, counts, measured_activation(cache, run.checkpoint, data, split, identity.digest, batch_size))


def _routed_experts(run: Run, split: str) -> Activation | None:
    """Which experts ``mhmoe evaluate`` saw in use; None without an evaluation of the split."""
    scores = run.modalities.get(split)
    if scores is None or scores.experts is None:
        return None
    return Activation(
        checkpoint_sha256=sha256_of(run.checkpoint),
        data_digest=run.data.digest,
        split=split,
        tokens=scores.total.targets,
        loss=scores.total.loss,
        **asdict(scores.experts),
    )


def differing_settings(runs: list[Run]) -> dict[str, list[str]]:
    """Compared settings that are not the same in all runs: flag -> value in each run."""
    differing = {}
    for section, name in COMPARED_SETTINGS:
        values = [_text(run.settings.get(section), name) for run in runs]
        if len(set(values)) > 1:
            differing["--" + name.replace("_", "-")] = values
    return differing


def _text(section: Any, name: str) -> str:
    value = None if section is None else section.get(name)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
