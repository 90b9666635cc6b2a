"""Zero-shot XNLI: the official prompts of lm-eval on a local copy, language by language."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.open import was_trained_with
from .xnli_files import LABELS

if TYPE_CHECKING:
    from .lm_eval_adapter import MHMoEHarnessModel


@dataclass(frozen=True)
class LanguageResult:
    """Of one language.

    Attributes:
        code: the language.
        accuracy: lm-eval's ``acc``.
        stderr: lm-eval's standard error of it.
        log_probs: of every example's three candidates, in the order of ``LABELS``.
        labels: the right answers.
    """

    code: str
    accuracy: float
    stderr: float
    log_probs: list[list[float]]
    labels: list[int]

    def predicted(self) -> dict[str, int]:
        """How often each label was chosen: near chance, most models choose one almost always."""
        chosen = [row.index(max(row)) for row in self.log_probs]
        return {label: chosen.count(index) for index, label in enumerate(LABELS)}


def stay_offline() -> None:
    """Keep lm-eval and its data library off the network; call it before they are imported."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def evaluate_xnli(
    model: MHMoEHarnessModel,
    tasks: Path,
    codes: Sequence[str],
    *,
    language_symbols: bool | None = None,
    limit: int | None = None,
) -> Iterator[LanguageResult]:
    """Evaluate one language after the other.

    Args:
        model: lm-eval's view of the model.
        tasks: folder of ``write_tasks``.
        codes: languages with a task there.
        language_symbols: lead every text with its language's symbol (default: as the model was trained).
        limit: score only so many examples of each.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if language_symbols is None:
        language_symbols = was_trained_with(model.hub, "mhmoe_language_token")
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    for code in codes:
        model.scorer.set_language(code if language_symbols else None)
        name = f"xnli_{code}"
        found = simple_evaluate(model=model, tasks=[name], task_manager=manager, limit=limit, log_samples=True)
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        yield LanguageResult(
            code=code,
            accuracy=float(found["results"][name]["acc,none"]),
            stderr=float(found["results"][name]["acc_stderr,none"]),
            log_probs=[[float(log_prob) for log_prob, _ in sample["filtered_resps"]] for sample in samples],
            labels=[int(sample["target"]) for sample in samples],
        )
