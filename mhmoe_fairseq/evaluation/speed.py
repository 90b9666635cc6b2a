"""How fast language models read prompts and continue them, several models by turns, so that a slow moment hits all."""

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoints.open import Opened, read_settings
from ..common.errors import UserError
from ..common.timing import Clock, no_garbage_collection, take_turns
from .evaluate import EVALUATIONS, evaluated_data, with_origin
from .generation import next_logits
from .perplexity import evaluate_text
from .records import Metric, Record

SEED = 1


@dataclass(frozen=True)
class Workload:
    """What is timed: ``batch`` prompts of ``prompt`` tokens, each continued by ``new`` tokens; written ``4x7+16``."""

    batch: int
    prompt: int
    new: int

    @classmethod
    def parse(cls, text: str) -> "Workload":
        """Returns the workload of a text; ``UserError`` if it is none."""
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)\+([1-9]\d*)", text, flags=re.ASCII)
        if found is None:
            raise UserError(f"--speed ({text}) must be BATCHxPROMPT+NEW, three whole numbers from 1, such as 4x7+16")
        return cls(*map(int, found.groups()))

    def __str__(self) -> str:
        return f"{self.batch}x{self.prompt}+{self.new}"

    def tokens(self, metric: str) -> int:
        """Returns how many tokens of one round a rate is about."""
        return self.batch * (self.new if metric.startswith("output") else self.prompt)

    def require_room(self, opened: Opened) -> None:
        """Raises ``UserError`` if prompt and continuation are longer than the model's positions."""
        length, positions = self.prompt + self.new, opened.model.max_decoder_positions()
        if length > positions:
            raise UserError(f"--speed ({self}): {length} tokens must be at most {positions}, {opened.file}'s positions")

    def prompts(self, dictionary: Any) -> Tensor:
        """Returns ``(B, S)`` ids, the same at every call: after the leading symbol random words of the dictionary."""
        generator = torch.Generator().manual_seed(SEED)
        words = torch.randint(dictionary.nspecial, len(dictionary), (self.batch, self.prompt), generator=generator)
        words[:, 0] = dictionary.eos()
        return words


class Timing(NamedTuple):
    """Seconds of a continuation: up to each row's first new token, and of all further ones."""

    prompt: float
    steps: float

    def rates(self, workload: Workload) -> dict[str, float]:
        """Returns tokens per second by metric; output's and input's are of the whole time, the prompt's of its own."""
        whole = self.prompt + self.steps
        seconds = {"output tokens/s": whole, "input tokens/s": whole, "prompt tokens/s": self.prompt}
        return {metric: workload.tokens(metric) / seconds[metric] for metric in seconds}


@torch.no_grad()
def continue_greedily(
    decoder: nn.Module, prompts_BS: Tensor, new: int, pad: int, clock: Clock = time.perf_counter
) -> tuple[Tensor, Timing]:
    """Continues every prompt by the most probable tokens, beyond the end of a text too, so that all do the same work.

    Args:
        prompts_BS: ids with the leading symbol, on the decoder's device.
        pad: the id that is never chosen.

    Returns:
        ``(B, new)`` ids and the time. Nothing is read back from a GPU before the end.
    """
    length = prompts_BS.shape[1]
    tokens = torch.cat([prompts_BS, prompts_BS.new_full((len(prompts_BS), new), pad)], 1)
    state: dict[Any, Any] = {"is_first_step": True}

    def now() -> float:
        if tokens.is_cuda:
            torch.cuda.synchronize(tokens.device)
        return clock()

    start = first = now()
    for position in range(length, length + new):
        logits = next_logits(decoder, tokens[:, :position], state)
        logits[:, pad] = -torch.inf
        tokens[:, position] = logits.argmax(1)
        if position == length:
            first = now()
    return tokens[:, length:], Timing(first - start, now() - first)


def require_language_models(files: Sequence[Path]) -> None:
    """Raises ``UserError`` for a checkpoint that does not continue text, before any is opened."""
    for file in files:
        task = read_settings(file)["task"]["_name"]
        if EVALUATIONS.get(task) is not evaluate_text:
            raise UserError(f"--speed: {file} was trained with task {task} and must be a language model")


def measure_speed(
    models: Sequence[Opened], workload: Workload, rounds: int = 7, clock: Clock = time.perf_counter
) -> list[Record]:
    """Times one workload on every model, by turns.

    Args:
        models: of language models with one dictionary.
        rounds: that are timed, after one that is not.

    Returns:
        for each model a record whose split is the workload: medians over the rounds, whose rates are in its settings.

    Raises:
        UserError: for a model of another dictionary, or with too few positions.
    """
    first = one_dictionary(models, [workload])
    prompts = workload.prompts(first)

    def turn(opened: Opened) -> Timing:
        given = prompts.to(opened.device)
        with no_garbage_collection():
            return continue_greedily(opened.model.decoder, given, workload.new, first.pad(), clock)[1]

    timings = take_turns([partial(turn, opened) for opened in models], rounds)
    by_round = [[timing.rates(workload) for timing in found] for found in timings]
    rates = [{name: [found[name] for found in rounds] for name in rounds[0]} for rounds in by_round]
    return [speed_record(opened, workload, of_model, len(models)) for opened, of_model in zip(models, rates)]


def one_dictionary(models: Sequence[Opened], workloads: Sequence[Workload]) -> Any:
    """Returns the models' dictionary; ``UserError`` for one of another, or with too few positions for a workload."""
    first = models[0].task.source_dictionary
    for opened in models:
        for workload in workloads:
            workload.require_room(opened)
        if opened.task.source_dictionary != first:
            raise UserError(f"--speed: {opened.file} and {models[0].file} must have one dictionary")
    return first


def speed_record(
    opened: Opened, workload: Workload, rates: Mapping[str, list[float]], models: int, engine: str = ""
) -> Record:
    """Returns the medians of one model's rates; what was done, and every round's rates, among the settings.

    Args:
        rates: of every round, by metric.
        models: that took turns.
        engine: with version and precision, where another software computed; its first word begins the split.
    """
    metrics = {
        name: Metric(statistics.median(values), "tokens/s", count=workload.tokens(name))
        for name, values in rates.items()
    }
    settings = {
        "batch": workload.batch,
        "prompt_tokens": workload.prompt,
        "new_tokens": workload.new,
        "prompts": f"random words, seed {SEED}",
        "rounds": len(next(iter(rates.values()))),
        "models_by_turns": models,
        "threads": torch.get_num_threads(),
        "by_round": dict(rates),
    }
    split = str(workload)
    if engine:
        settings["engine"], split = engine, f"{engine.split()[0].lower()}-{workload}"
    record = Record("speed", split, metrics, settings=settings, data=evaluated_data(opened, split))
    return with_origin(record, opened)
