"""Classes of sentences and pairs by a fine-tuned language model, one example after another."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils, utils
from fairseq.data import ListDataset

from ..checkpoints.files import read_trained
from ..common.errors import UserError
from ..common.files import read_json
from ..data.classification.examples import Example
from ..data.classification.labels import Labels, given_labels
from ..data.datasets.sentence_pairs import LabelledSentences
from ..data.sentencepiece_vocabulary import SentencePieceVocabulary
from ..models.language_model import MHMoELanguageModel, find_checkpoint
from ..prepare.workspace import MANIFEST
from ..tasks.sentence_classification import FIRST, SentenceClassificationTask

TASK = "mhmoe_sentence_classification"
UNLABELLED = -1


@dataclass(frozen=True)
class Classified:
    """A split's examples in their order.

    Args:
        split: its name, such as ``test_de``.
        classes: names, by id.
        labels: ``(examples,)`` right classes, ``UNLABELLED`` where unknown.
        probabilities: ``(examples, classes)`` float32.
        num_cut: examples that were longer than the model's inputs may be.
    """

    split: str
    classes: list[str]
    labels: np.ndarray
    probabilities: np.ndarray
    num_cut: int = 0

    @property
    def predictions(self) -> np.ndarray:
        """``(examples,)`` the most probable classes."""
        return self.probabilities.argmax(axis=1)

    @property
    def is_labelled(self) -> bool:
        """Whether every right class is known."""
        return bool((self.labels != UNLABELLED).all())

    @property
    def accuracy(self) -> float:
        """Share of right predictions in percent."""
        return 100.0 * float((self.predictions == self.labels).mean())

    @property
    def majority(self) -> float:
        """What always answering the most frequent class gives, in percent."""
        return 100.0 * float(np.bincount(self.labels, minlength=len(self.classes)).max()) / len(self.labels)

    def records(self) -> Iterator[dict[str, Any]]:
        """One JSON object per example: split, index, label, prediction, probabilities by class."""
        for index, (label, prediction, row) in enumerate(zip(self.labels, self.predictions, self.probabilities)):
            yield {
                "split": self.split,
                "index": index,
                "label": None if label == UNLABELLED else self.classes[label],
                "prediction": self.classes[prediction],
                "probabilities": {name: round(float(value), 6) for name, value in zip(self.classes, row)},
            }


class Classifier:
    """A fine-tuned model with its task.

    Args:
        checkpoint: of task ``mhmoe_sentence_classification``, or the folder that holds one.
        data: prepared data (default: those of the training).
        device: where the model works.

    Raises:
        FileNotFoundError: naming what is missing.
        ValueError: the file is no such checkpoint, or the data have another dictionary or other classes.
    """

    def __init__(self, checkpoint: str | Path, data: str | Path | None = None, device: str = "cpu") -> None:
        logging.getLogger("fairseq").setLevel(logging.WARNING)  # it logs its whole configuration at every load
        file = find_checkpoint(Path(checkpoint), None)
        _require_head(file)
        overrides = {} if data is None else {"data": str(data)}
        try:
            [model], _, task = checkpoint_utils.load_model_ensemble_and_task([str(file)], arg_overrides=overrides)
        except RuntimeError as error:
            raise UserError(f"{file}: cannot be loaded ({str(error).splitlines()[0]})") from error
        self.model: MHMoELanguageModel = model.to(device).eval()
        self.task: SentenceClassificationTask = task
        self.device = device

    @property
    def data(self) -> Path:
        """The folder of the prepared data."""
        return Path(self.task.args.data)

    def splits(self) -> list[str]:
        """Every test split of the data, or every validation split if there is none."""
        folder = self.data / FIRST
        for name in ("test", "valid"):
            found = sorted(file.stem for pattern in (name, f"{name}_*") for file in folder.glob(f"{pattern}.idx"))
            if found:
                return found
        raise UserError(f"{folder} has no test or validation split: give --splits or --input")

    def classify_split(self, split: str, max_tokens: int) -> Classified:
        """All examples of a prepared split.

        Args:
            max_tokens: of a batch, padding counted.
        """
        return self._classify(split, self.task.read_split(split), max_tokens)

    def classify_examples(self, split: str, examples: Sequence[Example], labelled: bool, max_tokens: int) -> Classified:
        """Texts that are not prepared, encoded with the ``sentencepiece.model`` of the data.

        Args:
            split: their name; ``input_de`` for German ones.
            examples: at least one.
            labelled: whether they have labels.
            max_tokens: of a batch, padding counted.

        Raises:
            ValueError: an unknown label, or texts where pairs belong.
        """
        expected = len(self.task.sentence_folders())
        found = len(examples[0].texts)
        if found != expected:
            raise UserError(f"--text-fields: the model was trained with {expected} fields, here are {found}")
        vocabulary = SentencePieceVocabulary(self.data / "sentencepiece.model")
        eos = self.task.dictionary.eos()
        sentences = []
        for texts in zip(*(example.texts for example in examples)):
            encoded = [torch.tensor([*ids, eos]) for ids in vocabulary.encode_lines(list(texts))]
            sentences.append(ListDataset(encoded, np.array([len(tokens) for tokens in encoded])))
        labels = self._labels() if labelled else None
        dataset = LabelledSentences(
            sentences,
            np.array([UNLABELLED if labels is None else labels.find(example) for example in examples]),
            np.full(len(examples), self.task.first_token(split)),
            longest=self.task.max_positions(),
            pad=self.task.dictionary.pad(),
        )
        return self._classify(split, dataset, max_tokens)

    def _labels(self) -> Labels:
        """The data's classes with the spellings of their ``--labels``; only with these does a number stand for one."""
        manifest = self.data / MANIFEST
        given = read_json(manifest).get("settings", {}).get("labels") if manifest.is_file() else None
        if given is not None:
            return given_labels(given, (), "label")
        return Labels(tuple((name,) for name in self.task.classes), are_ordered=False)

    def _classify(self, split: str, dataset: LabelledSentences, max_tokens: int) -> Classified:
        labels = np.empty(len(dataset), dtype=np.int64)
        probabilities = np.empty((len(dataset), len(self.task.classes)), dtype=np.float32)
        head = self.task.args.classification_head_name
        most = max(max_tokens, int(dataset.sizes.max()))  # a longer example makes a batch of its own
        for indices in dataset.batch_by_size(dataset.ordered_indices(), max_tokens=most):
            batch = dataset.collater([dataset[index] for index in indices])
            batch = utils.apply_to_sample(lambda tensor: tensor.to(self.device), batch)
            with torch.no_grad():
                logits, _ = self.model(**batch["net_input"], classification_head_name=head)
            places = batch["id"].cpu().numpy()
            labels[places] = batch["target"].cpu().numpy()
            probabilities[places] = logits.float().softmax(dim=1).cpu().numpy()
        return Classified(split, self.task.classes, labels, probabilities, dataset.num_cut)


def _require_head(checkpoint: Path) -> None:
    """The checkpoint is of our task; a language model's would be evaluated with a random head."""
    task = read_trained(checkpoint)["cfg"]["task"]["_name"]
    if task != TASK:
        raise UserError(
            f"{checkpoint}: was trained with task {task} and has no classification head: fine-tune it with "
            f"--task {TASK} --finetune-from-model {checkpoint}"
        )
