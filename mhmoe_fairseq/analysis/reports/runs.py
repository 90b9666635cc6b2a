"""A trained run on disk: a folder with checkpoints, fairseq's log file and the outputs of ``fairseq-eval-lm``.

Names: ``train.log`` (``fairseq-train --log-format json --log-file``), ``eval-valid.json`` and ``eval-test.json``
(``mhmoe evaluate --json``) or, without them, ``.log`` (what ``fairseq-eval-lm`` printed), ``checkpoint_best.pt`` or
``checkpoint_last.pt``, and ``manifest.json``, a copy of the data's at the time of training (without it the data folder
that the checkpoint names is looked at).
"""

from __future__ import annotations

import re
import shlex
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...checkpoints.files import read_checkpoint
from ...common.errors import UserError
from ...common.files import read_json
from ...data.identity import DataIdentity, identify_data, identify_manifest
from ...evaluation.modality_scores import ModalityScores, read_modality_scores
from ...evaluation.split_scores import Score, SplitScores, read_scores
from ...models.options import BEiT3Options, LanguageModelOptions, MoEOptions
from .run_logs import Evaluation, TrainingLog, read_evaluation, read_training_log

SPLITS = ("valid", "test")
_CHECKPOINTS = ("checkpoint_best.pt", "checkpoint_last.pt")
_EVALUATED_CHECKPOINT = re.compile(r"loading model\(s\) from (.+)")


@dataclass(frozen=True)
class Run:
    """One trained model.

    Attributes:
        path: its folder.
        log: the training's records.
        checkpoint: the evaluated one, else the best, else the last.
        settings: the stored configuration by section, plain values.
        data: what it was trained on.
        evaluations: by split, those that exist.
        languages: by split and language, from ``mhmoe evaluate``.
        modalities: by split, from ``mhmoe evaluate``; empty of a language model.
    """

    path: Path
    log: TrainingLog
    checkpoint: Path
    settings: dict[str, dict[str, Any]]
    data: DataIdentity
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    languages: dict[str, dict[str, Score]] = field(default_factory=dict)
    modalities: dict[str, ModalityScores] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def options(self) -> MoEOptions:
        """The model's options, as its building function takes them; newer flags at their default."""
        kind = BEiT3Options if "encoder_layers" in self.settings["model"] else LanguageModelOptions
        return kind.from_namespace(Namespace(**self.settings["model"]))

    def num_visual_tokens(self) -> int:
        """Scores for masked patches; 0 of a model without them."""
        head = read_checkpoint(self.checkpoint)["model"].get("image_head.weight")
        return 0 if head is None else len(head)

    def command(self) -> str | None:
        """The command line that trained it, if it was kept: in command.txt, or as a list of words in command.json."""
        text, words = self.path / "command.txt", self.path / "command.json"
        if text.is_file():
            return text.read_text(encoding="utf-8").partition("\n")[0].strip()
        return shlex.join(read_json(words)) if words.is_file() else None


def read_run(path: Path) -> Run:
    """Read a run's folder.

    Raises:
        UserError: naming what is missing or cannot be read.
    """
    if not path.is_dir():
        raise UserError(f"run {path} does not exist")
    log = read_training_log(path / "train.log")
    scores = {split: _read_scores(file) for split in SPLITS if (file := path / f"eval-{split}.json").is_file()}
    checkpoint = _find_checkpoint(path, [provenance["checkpoint"] for _, provenance in scores.values()])
    settings = read_settings(checkpoint)
    run = Run(path, log, checkpoint, settings, _data_of(path, settings))
    for split in SPLITS:
        if split in scores:
            _keep(run, split, *scores[split])
        elif (path / f"eval-{split}.log").exists():
            run.evaluations[split] = read_evaluation(path / f"eval-{split}.log")
    return run


def _read_scores(file: Path) -> tuple[SplitScores | ModalityScores, dict[str, Any]]:
    read = read_modality_scores if "modalities" in read_json(file) else read_scores
    return read(file)


def _keep(run: Run, split: str, found: SplitScores | ModalityScores, provenance: dict[str, Any]) -> None:
    """Give a run what ``mhmoe evaluate`` wrote of a split.

    Raises:
        UserError: if that was of other data.
    """
    if provenance["data_digest"] != run.data.digest:
        raise UserError(f"{run.path / f'eval-{split}.json'} was evaluated on other data than {run.path} was trained on")
    total = found.total
    if isinstance(found, SplitScores):
        run.evaluations[split] = Evaluation(total.loss, total.perplexity, total.tokens)
        run.languages[split] = found.languages
    else:
        run.evaluations[split] = Evaluation(total.loss, total.perplexity, total.targets)
        run.modalities[split] = found


def read_settings(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """The configuration stored in a checkpoint; its tensors are not read.

    Raises:
        UserError: if the file is missing, is no checkpoint, or holds none of our models.
    """
    stored = read_checkpoint(checkpoint)
    try:
        settings = stored["cfg"]
        model, _ = settings["model"], settings["task"]["data"]
        model["encoder_layers" if "encoder_layers" in model else "decoder_layers"]
        return settings
    except (KeyError, TypeError) as error:
        raise UserError(f"{checkpoint} is not a checkpoint of a mhmoe model") from error


def require_data(runs: list[Run], data: DataIdentity, folder: Path) -> None:
    """All runs were trained on ``data``.

    Raises:
        UserError: naming the first run that was not.
    """
    for run in runs:
        if run.data.digest != data.digest:
            raise UserError(
                f"{run.path} was trained on other data ({run.data.source}, hash {run.data.digest[:12]}) than --data "
                f"{folder} ({data.source}, hash {data.digest[:12]}): perplexities of different data do not compare"
            )


def require_one_tokenizer(runs: list[Run]) -> None:
    """All runs predict the same visual tokenizer's ids.

    Raises:
        UserError: naming the first run that does not.
    """
    digests = {run.path: read_checkpoint(run.checkpoint).get("task_state", {}).get("visual_tokenizer") for run in runs}
    for path, digest in digests.items():
        if digest != digests[runs[0].path]:
            raise UserError(
                f"{path} was trained with another visual tokenizer than {runs[0].path}: perplexities of their ids do "
                "not compare"
            )


def _find_checkpoint(path: Path, evaluated: list[str]) -> Path:
    names = [*evaluated, *_evaluated_names(path), *_CHECKPOINTS]
    for name in names:
        if (path / name).is_file():
            return path / name
    raise UserError(f"run {path} has no checkpoint ({' or '.join(_CHECKPOINTS)})")


def _evaluated_names(path: Path) -> list[str]:
    """File names of the checkpoints that the evaluation logs tell of."""
    found = []
    for log in (path / f"eval-{split}.log" for split in SPLITS):
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        match = _EVALUATED_CHECKPOINT.search(text)
        if match is not None:
            found.append(Path(match[1].strip()).name)
    return found


def _data_of(path: Path, settings: dict[str, dict[str, Any]]) -> DataIdentity:
    if (path / "manifest.json").is_file():
        return identify_manifest(path / "manifest.json")
    folder = Path(str(settings["task"]["data"]).split(":")[0])
    if not folder.is_dir():
        raise UserError(
            f"cannot tell what {path} was trained on: its data folder {folder} is gone, and the run has no copy of its "
            "manifest.json"
        )
    return identify_data(folder)
