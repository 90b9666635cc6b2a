"""Visual questions and statements about two images, derived from metadata, written as VQAv2's and NLVR2's files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Iterator, Mapping, Sequence

from ..archives import Say
from ..splits import SPLITS
from .images import SourceImage
from .indexes import IndexWriter
from .questions import Question, answer_vocabulary, derive_questions, describe_questions, question_only_baseline
from .statements import Statement, derive_statements, describe_statements

NOTE = "derived from the images' metadata by templates; neither VQAv2 nor NLVR2"


@dataclass(frozen=True)
class DerivedSettings:
    """How many are made.

    Args:
        min_answer_count: answers that fewer training questions have are no classes.
        statements: of the training part; each held-out part has a fifth of that.
    """

    min_answer_count: int = 3
    statements: int = 10_000


class Derivation:
    """Questions and statements of all parts; no image is in two parts."""

    def __init__(self, settings: DerivedSettings, parts: Mapping[str, Sequence[SourceImage]], seed: int):
        self._settings = settings
        self._parts = parts
        self._seed = seed

    @cached_property
    def questions(self) -> dict[str, list[Question]]:
        """By part."""
        return {split: derive_questions(self._parts[split], self._seed, split) for split in SPLITS}

    @cached_property
    def statements(self) -> dict[str, list[Statement]]:
        """By part."""
        counts = dict.fromkeys(SPLITS, self._settings.statements // 5) | {"train": self._settings.statements}
        return {split: derive_statements(self._parts[split], counts[split], self._seed, split) for split in SPLITS}

    def training_texts(self) -> Iterator[str]:
        """Each wording of the training part once."""
        texts = [question.text for question in self.questions["train"]]
        yield from dict.fromkeys([*texts, *(statement.text for statement in self.statements["train"])])

    def write(self, writer: IndexWriter, say: Say) -> dict[str, Any]:
        """Writes the indexes; returns what the manifest says, ``files`` being the lines of each file."""
        files: dict[str, Any] = {}
        record: dict[str, Any] = {"note": NOTE}
        answers = answer_vocabulary(self.questions["train"], self._settings.min_answer_count)
        if len(answers) > 1:
            files |= {**writer.write_questions(self.questions, answers), "answer2label.txt": len(answers)}
            record["questions"] = self._describe_questions(answers, say)
        if self.statements["train"]:
            files |= writer.write_statements(self.statements)
            record["statements"] = {split: describe_statements(made) for split, made in self.statements.items()}
            counts = ", ".join(f"{split} {len(made)}" for split, made in self.statements.items())
            say(f"statements about two images ({NOTE}): {counts}; each true once and false once, text alone 50 %")
        return {**record, "files": files}

    def _describe_questions(self, answers: Sequence[str], say: Say) -> dict[str, Any]:
        known = {
            split: [question for question in made if question.answer in set(answers)]
            for split, made in self.questions.items()
        }
        record: dict[str, Any] = {"answers": len(answers)}
        for split, made in known.items():
            record[split] = describe_questions(made)
            record[split]["dropped_rare_answers"] = len(self.questions[split]) - len(made)
            if split != "train":
                record[split]["question_only_accuracy"] = question_only_baseline(known["train"], made)
        say(
            f"questions ({NOTE}): {', '.join(f'{split} {len(made)}' for split, made in known.items())}; "
            f"{len(answers)} answers; without looking at the test images "
            f"{record['test']['question_only_accuracy']['by_question']:.1f} % are right"
        )
        return record
