"""Our language models for EleutherAI's lm-evaluation-harness, registered there as ``mhmoe``.

Importing this module registers the model. lm-eval's own command line imports no third party's models, so
``mhmoe zero-shot lm-eval`` imports it first. How text becomes tokens, newlines above all, is told in ``scoring``; how a
generation ends, in ``generation``.

Several processes: lm-eval takes every one for rank 0 of 1, so each scores all requests.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.errors import UserError

try:
    import lm_eval.models  # noqa: F401  (lm-eval fills its registry of models only while it is empty)
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
    raise UserError('lm-eval is not installed: pip install "mhmoe-fairseq[lm-eval]"') from error
from tqdm import tqdm

from ..checkpoints.open import open_text_model, was_trained_with
from ..models.bases import fingerprint
from .generation import Search, StopDecoder
from .records import Metric, Record
from .scoring import DEFAULT_BATCH_TOKENS, TextScorer

logger = logging.getLogger(__name__)

_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # in lm-eval's order
_SEARCH_NAMES = ("until", "do_sample", "temperature", "top_k", "top_p", "num_beams")
_Encoded = tuple[tuple[str, str] | None, list[int], list[int]]  # context and continuation, their ids


@register_model("mhmoe")
class MHMoEHarnessModel(TemplateLM):
    """A language model of this package as lm-eval sees it. The arguments are ``--model_args``.

    Args:
        checkpoint: a checkpoint, or the folder that holds one.
        data: folder with dict.txt and the tokenizer's model (default: see ``open_text_model``).
        lang: a language's code; its symbol leads every text in place of ``</s>``.
        batch_size: most rows per batch, or ``auto`` for as many as ``max_batch_tokens`` allow.
        max_batch_size: most rows per batch under ``auto``.
        device: ``cpu``, ``cuda:0``, ... (default: the GPU if there is one).
        max_length: most tokens read at once (default: the model's positions).
        max_gen_toks: most new tokens where a task does not say.
        max_batch_tokens: most tokens per batch, padding included.
        clean: prepare text as ``mhmoe prepare`` does.
        precision: ``fp32``, ``bf16`` or ``auto`` (default: the training's).

    Attributes:
        num_scored, num_cut: texts that were scored so far, and of these texts that did not fit the model's positions.

    Raises:
        UserError, OSError: naming the argument, or the file, and the rule.
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        data: str | Path | None = None,
        lang: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        max_batch_tokens: int = DEFAULT_BATCH_TOKENS,
        clean: bool = True,
        precision: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise UserError(f"--model_args {', '.join(unknown)}: no such argument of the model mhmoe")
        if checkpoint is None:
            raise UserError("--model_args checkpoint=FILE is needed: a checkpoint, or the folder that holds one")
        if batch_size is None or str(batch_size).split(":")[0] == "auto":
            rows = max_batch_size
        elif str(batch_size).isdigit():
            rows = int(batch_size)
        else:
            raise UserError(f"--batch_size ({batch_size}) must be a positive number or auto")
        self.hub = open_text_model(checkpoint, data, device, precision)
        self.scorer = TextScorer(
            self.hub, batch_size=rows, batch_tokens=max_batch_tokens, max_length=max_length, language=lang, clean=clean
        )
        if lang is None and was_trained_with(self.hub, "mhmoe_language_token"):
            logger.warning(f"{checkpoint} was trained with --mhmoe-language-token: --model_args lang=CODE is missing")
        self.max_gen_toks = max_gen_toks
        self.num_scored = self.num_cut = 0
        self._device = self.hub.device

    @property
    def eot_token_id(self) -> int:
        """``</s>``: the end of a line, and of a text."""
        return self.hub.src_dict.eos()

    @property
    def prefix_token_id(self) -> int:
        """What every text is conditioned on: ``</s>``, or the language's symbol."""
        return self.scorer.leading_symbol

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads at once."""
        return self.scorer.max_length

    @property
    def tokenizer_name(self) -> str:
        """Tells lm-eval's request cache one vocabulary from another."""
        return "mhmoe-" + "".join(f"{number & 0xFFFFFFFFFFFFFFFF:016x}" for number in fingerprint(self.hub.src_dict))

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval keeps in its results file."""
        parameters = sum(parameter.numel() for parameter in self.hub.models[0].parameters())
        return {"model_num_parameters": parameters, "model_dtype": self.scorer.decoder.precision}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; the leading symbol is added where it is scored, so ``add_special_tokens`` says nothing."""
        return self.scorer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would give it."""
        encoded = [(request.args, *self.scorer.encode_pair(*request.args)) for request in requests]
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[_Encoded], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found: list[Any] = [None] * len(requests)
        self.num_scored += len(requests)
        self.num_cut += sum(len(context) + len(rest) > self.max_length for _, context, rest in requests)
        scores = self.scorer.scores([(context, continuation) for _, context, continuation in requests])
        for index, score in tqdm(scores, total=len(requests), desc="log-likelihoods", disable=disable_tqdm):
            found[index] = (score.log_prob, score.is_greedy)
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], found[index])
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, every token predicted once."""
        texts = [request.args[0] for request in requests]
        encoded: list[_Encoded] = [(None, [], self.scorer.encode(text)) for text in texts]
        found = [log_prob for log_prob, _ in self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)]
        for text, log_prob in zip(texts, found):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), log_prob)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, without its stop string. Contexts that are too long lose their start."""
        found: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        with tqdm(total=len(requests), desc="generations", disable=disable_tqdm) as bar:
            for indices in groups.values():
                contexts = [requests[index].args[0] for index in indices]
                texts = self._generate(contexts, requests[indices[0]].args[1], bar)
                for index, text in zip(indices, texts):
                    found[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return found

    def _generate(self, contexts: Sequence[str], arguments: dict[str, Any], bar: tqdm) -> list[str]:
        search, stops, most = read_generation_arguments(arguments, self.max_gen_toks, self.max_length)
        decoder = StopDecoder(self.hub, search, stops, most)
        prompts = [self.scorer.prompt(context, self.max_length - most) for context in contexts]
        found: list[str] = [""] * len(prompts)
        for batch in self.scorer.batches(range(len(prompts)), lambda row: len(prompts[row]) + most):
            for row, text in zip(batch, decoder.continue_prompts([prompts[row] for row in batch])):
                found[row] = text
            bar.update(len(batch))
        return found


def read_generation_arguments(
    arguments: dict[str, Any], default: int, max_length: int
) -> tuple[Search, tuple[str, ...], int]:
    """lm-eval's ``generation_kwargs`` as a search, greedy unless ``do_sample`` is true, stop strings and most tokens.

    At least half of the model's positions stay with the context, whatever length a task allows itself.

    Raises:
        UserError: an argument that would change the result and is not supported, or an impossible value.
    """
    unknown = [name for name in arguments if name not in (*_LENGTH_NAMES, *_SEARCH_NAMES)]
    if unknown:
        known = ", ".join((*_SEARCH_NAMES, *_LENGTH_NAMES))
        raise UserError(f"generation argument {unknown[0]} is not supported; known are {known}")
    most = int(next((arguments[name] for name in _LENGTH_NAMES if arguments.get(name) is not None), default))
    if most < 1:
        raise UserError(f"max_gen_toks ({most}) must be at least 1")
    until = arguments.get("until") or []
    stops = tuple(until) if isinstance(until, (list, tuple)) else (until,)
    search = Search(beam=int(arguments.get("num_beams") or 1))
    temperature, top_p = arguments.get("temperature"), arguments.get("top_p")
    if arguments.get("do_sample") and temperature != 0:
        search = dataclasses.replace(
            search,
            sampling=True,
            temperature=1.0 if temperature is None else float(temperature),
            top_k=arguments.get("top_k") or None,  # lm-eval's 0 is no limit
            top_p=None if top_p in (None, 1) else float(top_p),
        )
    return search, stops, min(most, max(1, max_length // 2))


def record_of(results: dict[str, Any]) -> Record:
    """What lm-eval wrote into its results file, task by task; the main metric is the mean of the tasks' first ones.

    Raises:
        UserError: no task has a number.
    """
    tasks = {task: of for task, of in results["results"].items() if task not in results.get("groups", {})}
    parts = {task: found for task, values in tasks.items() if (found := _metrics(results, task, values))}
    if not parts:
        raise UserError("lm-eval's results hold no number")
    firsts = [next(iter(metrics.values())) for metrics in parts.values()]
    mean = Metric(sum(metric.value for metric in firsts) / len(firsts), "", count=len(firsts))
    version = {"lm-eval": results["lm_eval_version"]}
    return Record("zero-shot", "lm-eval", {"mean over tasks": mean}, parts, settings=version)


def _metrics(results: dict[str, Any], task: str, values: dict[str, Any]) -> dict[str, Metric]:
    """``acc,none`` and the like, and their standard errors, as lm-eval names them."""
    count = results.get("n-samples", {}).get(task, {}).get("effective")
    found = {}
    for key, value in values.items():
        name, _, variant = key.partition(",")
        if variant and not name.endswith("_stderr") and isinstance(value, (int, float)):
            stderr = values.get(f"{name}_stderr,{variant}")
            title = name if variant == "none" else f"{name}, {variant}"
            found[title] = Metric(value, "", stderr if isinstance(stderr, (int, float)) else None, count)
    return found
