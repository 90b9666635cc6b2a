"""Classes of sentences and pairs of sentences by a fine-tuned language model, language by language."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import utils
from fairseq.data import ListDataset

from ..checkpoints.open import Opened
from ..common.errors import UserError
from ..common.files import atomic_open, json_line, require_files
from ..common.timing import tracked
from ..data.classification import Example, Fields, Labels, given_labels, read_examples
from ..data.datasets.sentence_pairs import LabelledSentences
from ..data.identity import MANIFEST, read_manifest
from ..data.languages import get_language
from ..data.vocabularies import open_vocabulary
from ..tasks.sentence_classification import FIRST
from .expert_loads import LoadCounter
from .records import Metric, Record, mean_percent

UNLABELLED = -1
_INPUT = "input"  # the split's name where the examples are not prepared


@dataclass(frozen=True)
class Classified:
    """Examples of one language in their order.

    Attributes:
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

    def predicted(self) -> Iterator[dict[str, Any]]:
        """One JSON object per example: split, index, label, prediction, probabilities by class."""
        for index, (label, prediction, row) in enumerate(zip(self.labels, self.predictions, self.probabilities)):
            yield {
                "split": self.split,
                "index": index,
                "label": None if label == UNLABELLED else self.classes[label],
                "prediction": self.classes[prediction],
                "probabilities": {name: round(float(value), 6) for name, value in zip(self.classes, row)},
            }


def evaluate_sentences(
    opened: Opened,
    split: str,
    counter: LoadCounter,
    *,
    splits: Sequence[str] | None = None,
    input: Sequence[str] | None = None,
    text_fields: Sequence[str] | None = None,
    label_field: str | None = None,
    language_field: str | None = None,
    output: Path | None = None,
    max_tokens: int = 4096,
) -> Record:
    """Classify the prepared examples of a split, or others.

    Args:
        split: ``test`` for all of ``test_de``, ``test_en``, ...; one of these; or, where there is no ``test``,
            the validation split.
        splits: several splits in place of one.
        input: ``LANG=FILE`` of texts that are not prepared, in place of a split.
        text_fields, label_field, language_field: names in such files; the text's are by default the training's.
        output: JSON lines file to write the predictions to.
        max_tokens: of a batch, padding counted.

    Raises:
        UserError, FileNotFoundError: naming the flag, file, line or field, and the rule.
    """
    if input is not None and splits is not None:
        raise UserError("--splits has no meaning with --input")
    if input is None:
        given = {"--text-fields": text_fields, "--label-field": label_field, "--language-field": language_field}
        for flag in (flag for flag, value in given.items() if value is not None):
            raise UserError(f"{flag} needs --input")
        name, parts = ("+".join(splits), splits) if splits else _parts_of(opened, split)
    else:
        text_fields = text_fields or read_manifest(opened.data).get("fields")
        if text_fields is None:
            raise UserError(f"--input: {opened.data / MANIFEST} is missing; give --text-fields")
        fields = Fields(tuple(text_fields), label_field, language_field)
        name, parts = _INPUT, [f"{_INPUT}_{word.partition('=')[0]}" for word in input]
    languages = [part.partition("_")[2] for part in parts]
    for part, language in zip(parts, languages):
        if languages.count(language) > 1:
            rule = f"is not the only one of its language, {language or 'none'}: one at a time"
            raise UserError(f"{'--splits' if input is None else '--input'} ({part.removeprefix(f'{_INPUT}_')}) {rule}")
    if input is None:
        datasets = {part: opened.task.read_split(part) for part in parts}
    else:
        datasets = dict(_encoded(opened, fields, word, input) for word in input)
        if label_field is None and output is None:
            rule = "has no labels to score by: give --label-field NAME, or --output FILE for the predictions"
            raise UserError(f"--input ({' '.join(input)}) {rule}")
    results = {}
    for part, dataset in datasets.items():
        language = part.partition("_")[2]
        with counter.counting(language or None):
            results[language] = _classify(opened, part, dataset, max_tokens)
    if output is not None:
        with atomic_open(output) as stream:
            stream.writelines(json_line(row) for result in results.values() for row in result.predicted())
    by_language = {language: accuracies([result]) for language, result in results.items() if language}
    by_language = {language: metrics for language, metrics in by_language.items() if metrics}
    settings: dict[str, Any] = {"examples": sum(len(result.labels) for result in results.values())}
    if cut := sum(result.num_cut for result in results.values()):
        settings["examples that were too long, cut"] = cut
    return Record("classification", name, accuracies(list(results.values())), by_language, settings=settings)


def accuracies(results: Sequence[Classified]) -> dict[str, Metric]:
    """The accuracy beside always answering the most frequent class; nothing where no language has all labels.

    Where there are several languages, all examples count alike; the mean over the languages is XNLI's average.
    """
    labelled = [result for result in results if (result.labels != UNLABELLED).all()]
    if not labelled:
        return {}
    labels = np.concatenate([result.labels for result in labelled])
    is_right = [result.predictions == result.labels for result in labelled]
    majority = {"majority": 100 * float(np.bincount(labels).max()) / len(labels)}
    metrics = {"accuracy": mean_percent(np.concatenate(is_right).tolist(), majority)}
    if len(labelled) > 1:
        mean = 100 * float(np.mean([right.mean() for right in is_right]))
        metrics["mean over languages"] = Metric(mean, "%", count=len(labelled))
    return metrics


def _parts_of(opened: Opened, split: str) -> tuple[str, list[str]]:
    """The split, ``valid`` where there is no ``test``, and the prepared files that it stands for."""
    folder = opened.data / FIRST
    for name in (split, "valid") if split == "test" else (split,):
        found = sorted(file.stem for pattern in (name, f"{name}_*") for file in folder.glob(f"{pattern}.idx"))
        if found:
            return name, found
    return split, [split]  # reading it says what is missing


def _encoded(opened: Opened, fields: Fields, word: str, words: Sequence[str]) -> tuple[str, LabelledSentences]:
    """Name and examples of one ``LANG=FILE``, encoded with the vocabulary of the data.

    Args:
        words: all of ``--input``.
    """
    code, _, name = word.partition("=")
    if not name:
        raise UserError(f"--input {word}: must be LANG=FILE, such as en={word}")
    get_language(code, "--input")
    require_files([Path(name)], "--input")
    is_shared = sum(other.partition("=")[2] == name for other in words) > 1
    examples = list(read_examples(Path(name), fields, code, is_shared=is_shared))
    if not examples:
        raise UserError(f"--input {word}: no example in it")
    expected = len(opened.task.sentence_folders())
    if len(fields.texts) != expected:
        raise UserError(f"--text-fields: the model was trained with {expected} fields, here are {len(fields.texts)}")
    dictionary = opened.task.dictionary
    vocabulary = open_vocabulary(opened.data, dictionary.symbols[dictionary.nspecial :])
    if vocabulary is None:
        rule = f"{opened.data} has no vocabulary: prepare the texts as that was, and evaluate a split of theirs"
        raise UserError(f"--input {word}: {rule}")
    sentences = []
    for texts in zip(*(example.texts for example in examples)):
        encoded = [torch.tensor([*ids, dictionary.eos()]) for ids in vocabulary.encode_lines(list(texts))]
        sentences.append(ListDataset(encoded, np.array([len(tokens) for tokens in encoded])))
    split = f"{_INPUT}_{code}"
    return split, LabelledSentences(
        sentences,
        _labels(opened, fields, examples),
        np.full(len(examples), opened.task.first_token(split)),
        longest=opened.task.max_positions(),
        pad=dictionary.pad(),
    )


def _labels(opened: Opened, fields: Fields, examples: Sequence[Example]) -> np.ndarray:
    """``(examples,)`` classes in the spellings of the data's ``--labels``; only with these a number stands for one."""
    if fields.label is None:
        return np.full(len(examples), UNLABELLED)
    given = read_manifest(opened.data).get("settings", {}).get("labels")
    found = Labels(tuple((name,) for name in opened.task.classes), are_ordered=False)
    labels = found if given is None else given_labels(given, (), "label")
    return np.array([labels.find(example) for example in examples])


def _classify(opened: Opened, split: str, dataset: LabelledSentences, max_tokens: int) -> Classified:
    labels = np.empty(len(dataset), dtype=np.int64)
    probabilities = np.empty((len(dataset), len(opened.task.classes)), dtype=np.float32)
    head = opened.task.args.classification_head_name
    most = max(max_tokens, int(dataset.sizes.max()))  # a longer example makes a batch of its own
    batches = dataset.batch_by_size(dataset.ordered_indices(), max_tokens=most)
    for indices in tracked(batches, f"evaluate {split}", "batches"):
        batch = dataset.collater([dataset[index] for index in indices])
        batch = utils.apply_to_sample(lambda tensor: tensor.to(opened.device), batch)
        with torch.no_grad():
            logits, _ = opened.model(**batch["net_input"], classification_head_name=head)
        rows = batch["id"].cpu().numpy()
        labels[rows] = batch["target"].cpu().numpy()
        probabilities[rows] = logits.float().softmax(dim=1).cpu().numpy()
    return Classified(split, opened.task.classes, labels, probabilities, dataset.num_cut)
