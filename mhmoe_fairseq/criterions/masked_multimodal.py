"""Cross entropy of masked patches and masked words, plus the MoE layers' balance loss and z-loss."""

import functools
from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from typing import Any, NamedTuple

import torch
from fairseq.criterions import register_criterion
from fairseq.dataclass import ChoiceEnum
from fairseq.logging import metrics
from fairseq.models import BaseFairseqModel
from torch import Tensor

from ..moe.layer import taken_for_padding
from .base import GateLossConfig, MoECriterion, Outcome, log_bits, log_layers, log_perplexity, total

MODALITIES = ("image", "text", "pair")
# What is predicted: part -> the modality of its sub-batch, and whether its patches or its words.
PARTS = {
    "image": ("image", "patches"),
    "text": ("text", "words"),
    "pair_image": ("pair", "patches"),
    "pair_text": ("pair", "words"),
}
AVERAGE_CHOICES = ChoiceEnum(["part", "target"])


class MaskedPart(NamedTuple):
    """Sums over one kind of masked positions in a batch: cross entropy in nats, positions, and right answers."""

    loss: Tensor
    targets: Tensor
    correct: Tensor


@dataclass
class MaskedMultimodalConfig(GateLossConfig):
    """Flags of the criterion."""

    masked_loss_average: AVERAGE_CHOICES = field(
        default="part",
        metadata={
            "help": "part: mean of the four mean losses, of patches of images, words of texts, patches of pairs and "
            "words of pairs; target: mean of all masked positions, most of which are patches"
        },
    )


@register_criterion("mhmoe_masked_multimodal", dataclass=MaskedMultimodalConfig)
class MaskedMultimodalCriterion(MoECriterion):
    """Masked data modelling: the tokenizer's ids of masked patches, and masked words, from one model.

    A batch holds a sub-batch of each modality, and the model is called once for each. With mean cross entropies
    ``c_p`` of the parts ``p``, in nats, and n samples of each modality in the batch,

    ``loss = n * (mean_p c_p + mean over the calls of (w_b * balance + w_z * z))``, divided by n later. With
    ``--masked-loss-average target`` n is the number of masked positions and all of them weigh the same.

    Logged, in bits (``loss`` without the balance and z-losses):

    - ``image_loss``, ``text_loss``, ``pair_image_loss``, ``pair_text_loss``: per masked patch or word; and with the
      same beginnings ``_ppl``, perplexity, and ``_accuracy``, in percent.
    - ``loss``: what training minimises: by default the mean of these.
    - ``nll_loss`` and ``ppl``: per masked position, all together. This perplexity is that of table 1.
    - ``replaced``: samples that stood for one with a bad image, where there are such.

    All come from sums over the whole set, so that a validation's do not depend on its batches.
    """

    def forward(self, model: BaseFairseqModel, sample: dict[str, Any], reduce: bool = True) -> Outcome:
        """Return the loss of one batch, in nats, the number that it is later divided by, and what to log.

        Args:
            model: called with each sub-batch's ``net_input``; has ``predict_patches`` and ``predict_words``.
            sample: a sub-batch for each modality under its name, with the keys of ``MaskedDataset``. Where
                ``counted`` is False a sub-batch is only there for its experts' calls, which all ranks make together,
                and enters no metric.
            reduce: there is one loss for the batch either way.
        """
        batches = {modality: sample[modality] for modality in MODALITIES if modality in sample}
        counted = [batch.get("counted", True) for batch in batches.values()]
        parts: dict[str, MaskedPart] = {}
        extras = []
        for (modality, batch), is_counted in zip(batches.items(), counted):
            with taken_for_padding(model, not is_counted):
                features, extra = model(**batch["net_input"])
            extras.append(extra)
            first_word = extra["image_positions"]
            for part, (indices, targets) in masked_targets(self.task, modality, batch).items():
                if PARTS[part][1] == "patches":
                    found = model.predict_patches(_features_at(features, 1, first_word, indices), targets)
                else:
                    found = model.predict_words(_features_at(features, first_word, features.size(1), indices), targets)
                # Filled on the device: torch.tensor would copy from the host.
                count = torch.full((), targets.numel(), device=targets.device)
                parts[part] = MaskedPart(found.losses.sum(), count, found.is_best.sum())
        losses, targets, _ = (torch.stack(sums) for sums in zip(*parts.values()))
        averages_parts = str(self.cfg.masked_loss_average) == "part"
        sample_size = sample["nsentences"] if averages_parts else targets.sum()
        loss = sample_size * (losses / targets.clamp(min=1)).mean() if averages_parts else losses.sum()
        loss, log = self.add_gate_losses(loss, extras, sample_size, counted)
        scored = [batch for batch, is_counted in zip(batches.values(), counted) if is_counted]
        log |= {
            "ntokens": sum(batch["num_positions"] for batch in scored),
            "nsentences": sample["nsentences"],
            "sample_size": sample_size,
            "averages_parts": int(averages_parts),
            "num_replaced": sum(batch.get("num_replaced", 0) for batch in scored),
        }
        sums = {f"{part}_{key}": value for part, found in parts.items() for key, value in found._asdict().items()}
        return loss, sample_size, log | {key: value.detach() for key, value in sums.items()}

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Log every part, and all together."""
        sums = {part: [float(total(logging_outputs, f"{part}_{key}")) for key in MaskedPart._fields] for part in PARTS}
        for part, (loss, targets, correct) in sums.items():
            if targets > 0:
                log_bits(f"{part}_loss", loss, targets)
                metrics.log_scalar(f"{part}_accuracy", 100 * correct / targets, targets, round=2)
                log_perplexity(f"{part}_ppl", of=f"{part}_loss")
        nats, all_targets, _ = map(sum, zip(*sums.values()))
        if all_targets > 0:
            log_bits("nll_loss", nats, all_targets)
            log_perplexity("ppl", of="nll_loss")
            averages_parts = any(log["averages_parts"] for log in logging_outputs)
            metrics.log_derived("loss", functools.partial(_objective, averages_parts))
        log_layers(logging_outputs, total(logging_outputs, "sample_size"))


def masked_targets(task: Any, modality: str, batch: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what is predicted in a sub-batch of a modality: nothing where its ``counted`` is False.

    That is, by part, ``(M,)`` indices in the flattened patches or words, and ``(M,)`` ids, of patches by the task's
    ``image_targets``.
    """
    kept = slice(None) if batch.get("counted", True) else slice(0)
    found = {}
    for part, (_, kind) in ((part, of) for part, of in PARTS.items() if of[0] == modality):
        indices = batch["masked_patch_indices" if kind == "patches" else "masked_token_indices"][kept]
        targets = task.image_targets(batch) if kind == "patches" else batch["text_targets"]
        found[part] = (indices, targets.flatten().index_select(0, indices))
    return found


def _features_at(features: Tensor, start: int, end: int, indices: Tensor) -> Tensor:
    """``(M, D)``: of ``features (B, L, D)`` at indices in the flattened positions ``start`` to ``end`` of all rows.

    A mask as index would make the host wait for the number of its indices.
    """
    rows = indices.div(end - start, rounding_mode="floor")
    return features.flatten(0, 1).index_select(0, rows * features.size(1) + start + indices % (end - start))


def _objective(averages_parts: bool, meters: Any) -> float:
    """Bits per part, or per masked position, of all that was logged since the meters were reset; 0 of nothing."""
    names = [f"{part}_loss" for part in PARTS] if averages_parts else ["nll_loss"]
    losses = [float(meters[name].avg) for name in names if name in meters and meters[name].count > 0]
    return round(sum(losses) / len(losses), 3) if losses else 0.0
