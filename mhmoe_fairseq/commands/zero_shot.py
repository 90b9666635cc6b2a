"""``mhmoe zero-shot``: language models on tasks that they were not trained for."""

import argparse
import contextlib
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.arguments import (
    add_action,
    existing_folder,
    existing_path,
    nonempty,
    output_file,
    output_folder,
    seed,
    whole,
)
from ..common.console import quiet, say
from ..common.errors import UserError
from ..common.files import read_json, require_files, sha256_of, write_json
from ..common.tables import MISSING, markdown_table

if TYPE_CHECKING:
    from ..evaluation.probe import Item
    from ..evaluation.records import Metric, Record
    from ..evaluation.xnli import XnliSet

PROBE = "cross-lingual probe of our own, not XNLI: which of n sentences translates the one before it"
_MODEL_FLAGS = ("--model", "-M")
_OTHER_COMMANDS = ("ls", "validate")
_HELP = """mhmoe zero-shot lm-eval: lm-eval's command line with the model mhmoe, which --model need not name.

  mhmoe zero-shot lm-eval --tasks arc_easy,piqa --model_args checkpoint=DIR,data=DIR --batch_size auto [more flags]

--model_args of mhmoe, as key=value,key=value:
  checkpoint        a checkpoint, or the folder that holds one; record-zero-shot-lm-eval.json is written there
  data              folder with dict.txt and the tokenizer's model (default: the checkpoint's, or its training data)
  lang              language code whose symbol leads every text (models trained with --mhmoe-language-token)
  max_length        most tokens read at once (default: the model's positions)
  max_gen_toks      most new tokens where a task does not say (256)
  max_batch_tokens  most tokens per batch, for --batch_size auto (8192)
  clean             false: take text as it is, without mhmoe prepare's clean-up

"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The three kinds of tasks, each with its flags."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="TASKS")
    # No word is a flag of ours: --help is lm-eval's, too.
    words = kinds.add_parser(
        "lm-eval", help="any of lm-evaluation-harness, by its own flags", prefix_chars="\0", add_help=False
    )
    words.add_argument("words", nargs="*", help="lm-eval's own arguments; --model mhmoe is added")
    xnli = add_action(kinds, "xnli", "XNLI in every language, from your copy of it")
    _add_xnli_arguments(xnli)
    probe = add_action(kinds, "probe", "cross-lingual probe from aligned held-out text, not XNLI")
    _add_probe_arguments(probe)
    _add_model_arguments(xnli)
    _add_model_arguments(probe, "--out")


def _add_model_arguments(parser: argparse.ArgumentParser, *former: str) -> None:
    """The flags of both; ``former`` are other names of ``--record``."""
    parser.add_argument(
        "--checkpoint", nargs="+", type=existing_path, required=True, metavar="FILE",
        help="checkpoints of language models, or folders that hold one, to compare",
    )  # fmt: skip
    parser.add_argument(
        "--record", *former, type=output_file, metavar="FILE",
        help="where a single checkpoint's record is written; record-zero-shot-TASKS.json beside it if not given",
    )  # fmt: skip
    parser.add_argument(
        "--language-token", action=argparse.BooleanOptionalAction,
        help="begin texts with their language's symbol (default: as the model was trained)",
    )  # fmt: skip
    parser.add_argument("--max-batch-tokens", type=whole(), default=8192, metavar="N", help="most tokens per batch")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even if there is a GPU")


def _add_xnli_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=existing_folder, metavar="DIR",
        help="folder with dict.txt and sentencepiece.model (default: the checkpoint's, or its training data)",
    )  # fmt: skip
    parser.add_argument(
        "--xnli-dir", type=existing_folder, required=True, metavar="DIR",
        help="your copy of XNLI: the official files, or a JSON lines file per language",
    )  # fmt: skip
    parser.add_argument(
        "--langs", type=nonempty, metavar="CODES", help="languages, with commas in between (default: all there are)"
    )
    parser.add_argument(
        "--split", choices=("validation", "test"), default="validation", help="lm-eval and the paper use validation"
    )
    parser.add_argument("--limit", type=whole(), metavar="N", help="only N examples of each language, for a trial")
    parser.add_argument(
        "--out", type=output_folder, default=Path("outputs/xnli"), metavar="DIR",
        help="folder for the scores of every example and lm-eval's task files",
    )  # fmt: skip


def _add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=existing_folder, required=True, metavar="DIR", help="folder made by mhmoe prepare multilingual"
    )
    parser.add_argument("--split", choices=("valid", "test"), default="test", help="of the aligned text")
    parser.add_argument(
        "--pairs", metavar="PAIRS",
        help="such as en-de,de-en: context-candidates (default: English with each, both ways)",
    )  # fmt: skip
    parser.add_argument("--candidates", type=whole(at_least=2), default=4, metavar="N", help="sentences to choose from")
    parser.add_argument("--max-items", type=whole(), default=200, metavar="N", help="most questions per pair")
    parser.add_argument(
        "--min-characters", type=whole(at_least=0), default=10, metavar="N", help="shorter sentences are left out"
    )
    parser.add_argument("--seed", type=seed, default=1, help="of questions, distractors and their order")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print and write.

    Raises:
        UserError, OSError: for a bad flag, file or checkpoint; files of text are read before any model.
    """
    return {"lm-eval": _run_lm_eval, "xnli": _run_xnli, "probe": _run_probe}[args.kind](args)


def _write(args: argparse.Namespace, file: Path, record: "Record") -> None:
    from ..evaluation.records import record_file, write_record

    path = args.record or record_file(file.parent, f"zero-shot-{args.kind}")
    write_record(path, record)
    say(f"written: {path}")


def _mean(metrics: "Sequence[Metric]") -> "Metric":
    """The mean of several sets' accuracies, with the standard error of the examples alone."""
    from ..evaluation.records import Metric

    value = sum(metric.value for metric in metrics) / len(metrics)
    stderr = math.sqrt(sum((metric.stderr or 0.0) ** 2 for metric in metrics)) / len(metrics)
    return Metric(value, "%", stderr, sum(metric.count or 0 for metric in metrics), metrics[0].baselines)


def name_models(checkpoints: Sequence[Path]) -> list[str]:
    """Names for a table: as much of the folders' paths as tells one from the other, the file's too if need be.

    Raises:
        UserError: one is given twice.
    """
    paths = [path.resolve() for path in checkpoints]
    if len(set(paths)) < len(paths):
        raise UserError(f"--checkpoint: one is given twice in {' '.join(map(str, checkpoints))}")
    folders = [path.parent if path.suffix == ".pt" else path for path in paths]
    depths = range(1, 1 + max(len(path.parts) for path in paths))
    named = (["/".join(path.parts[-depth:]) for path in some] for some in (folders, paths) for depth in depths)
    return next(names for names in named if len(set(names)) == len(names))


def _record_each(args: argparse.Namespace, evaluate: "Callable[[str, Path], Record]") -> "dict[str, Record]":
    """Evaluate one checkpoint after the other and write what was found at once; the records by name."""
    from ..models.language_model import find_checkpoint

    if args.record is not None and len(args.checkpoint) > 1:
        raise UserError(f"--record {args.record}: is one file, and there are {len(args.checkpoint)} checkpoints")
    files = [find_checkpoint(path, None) for path in args.checkpoint]
    records = {}
    for name, file in zip(name_models(args.checkpoint), files):
        with quiet():
            records[name] = evaluate(name, file)
        _write(args, file, records[name])
    return records


# ---------------------------------------------------------------------- lm-eval


def _run_lm_eval(args: argparse.Namespace) -> int:
    """Hand over to lm-eval, and make a record of the results of one of our models."""
    if {"-h", "--help"} & set(args.words) and not set(args.words) & set(_OTHER_COMMANDS):
        say(_HELP.removesuffix("\n"))
    from ..evaluation.lm_eval_support import require_lm_eval

    require_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    from ..evaluation import lm_eval_model  # noqa: F401  (registers the model)

    before = sys.argv
    with _results_folder(complete(args.words)) as (folder, words):
        known = set(folder.rglob("results_*.json"))
        sys.argv = ["lm-eval", *words]
        try:
            cli_evaluate()
        except ValueError as error:  # lm-eval's word for a task or argument that there is not
            raise UserError(str(error)) from error
        finally:
            sys.argv = before
        for path in set(folder.rglob("results_*.json")) - known:
            _record_lm_eval(args, read_json(path))
    return 0


def complete(words: list[str]) -> list[str]:
    """lm-eval's arguments with our model, unless they name one or do not run a model."""
    named = any(word.split("=")[0] in _MODEL_FLAGS for word in words)
    if named or not words or words[0] in _OTHER_COMMANDS:
        return words
    return [*words, "--model", "mhmoe"]


@contextlib.contextmanager
def _results_folder(words: list[str]) -> Iterator[tuple[Path, list[str]]]:
    """Where lm-eval writes its results, a temporary folder unless the words name one; and the words that say so."""
    for word, after in zip(words, [*words[1:], ""]):
        flag, is_one_word, value = word.partition("=")
        if flag in ("--output_path", "-o"):
            yield Path(value if is_one_word else after), words
            return
    with tempfile.TemporaryDirectory() as folder:
        has_model = any(word.split("=")[0] in _MODEL_FLAGS for word in words)
        yield Path(folder), [*words, "--output_path", folder] if has_model else words


def _record_lm_eval(args: argparse.Namespace, results: dict[str, Any]) -> None:
    from ..checkpoints.open import Opened, open_text_model
    from ..evaluation.evaluate import with_origin
    from ..evaluation.lm_eval_support import record_of
    from ..models.language_model import find_checkpoint

    given = results["config"].get("model_args") or {}
    if isinstance(given, str):
        given = dict(word.split("=", 1) for word in given.split(",") if "=" in word)
    if results["config"].get("model") != "mhmoe" or "checkpoint" not in given:
        return
    file = find_checkpoint(Path(given["checkpoint"]), None)
    opened = Opened.of_text_model(open_text_model(file, given.get("data"), given.get("device")), file)
    args.record = None
    _write(args, file, with_origin(record_of(results), opened))


# ---------------------------------------------------------------------- XNLI


def _run_xnli(args: argparse.Namespace) -> int:
    from ..evaluation.lm_eval_support import require_lm_eval, stay_offline

    require_lm_eval()
    stay_offline()
    from ..data.languages import parse_languages
    from ..evaluation.xnli import read_xnli, write_tasks

    codes = None if args.langs is None else parse_languages(args.langs)
    name_models(args.checkpoint)
    sets = read_xnli(args.xnli_dir, args.split, codes)
    for path, reason in {name: why for one in sets for name, why in one.left_out.items()}.items():
        say(f"left out: {path}: {reason}")
    write_tasks(args.out / "tasks", sets, args.split)
    records = _record_each(args, lambda name, file: _evaluate_xnli(args, name, file, sets))
    say(describe_xnli(records, args.split, args.limit))
    return 0


def _evaluate_xnli(args: argparse.Namespace, name: str, file: Path, sets: "list[XnliSet]") -> "Record":
    import lm_eval

    from ..checkpoints.open import Opened, was_trained_with
    from ..data.languages import PAPER_LANGUAGES
    from ..evaluation.evaluate import with_origin
    from ..evaluation.lm_eval_model import MHMoEHarnessModel
    from ..evaluation.records import Record
    from ..evaluation.xnli import evaluate_xnli

    model = MHMoEHarnessModel(
        checkpoint=str(file),
        data=None if args.data is None else str(args.data),
        batch_size="auto",
        max_batch_tokens=args.max_batch_tokens,
        device="cpu" if args.cpu else None,
    )
    symbols = args.language_token
    if symbols is None:
        symbols = was_trained_with(model.hub, "mhmoe_language_token")
    results = {}
    codes = [one.code for one in sets]
    for result in evaluate_xnli(model, args.out / "tasks", codes, language_symbols=symbols, limit=args.limit):
        say(f"{name}: {result.code} {_cell(result.accuracy)}")
        results[result.code] = result
        rows = [{"log_probs": row, "label": label} for row, label in zip(result.log_probs, result.labels)]
        write_json(args.out / "scores" / name.replace("/", "_") / f"{result.code}.json", rows)
    metrics = {"accuracy": _mean([result.accuracy for result in results.values()])}
    if set(PAPER_LANGUAGES) <= set(results):
        metrics["mean of the paper's languages"] = _mean([results[code].accuracy for code in PAPER_LANGUAGES])
    kept = {one.code: {"path": str(one.path), "sha256": one.sha256, "left_out": one.left_out} for one in sets}
    record = Record(
        "zero-shot",
        "xnli",
        metrics,
        {code: {"accuracy": result.accuracy} for code, result in results.items()},
        settings={
            "language symbols": symbols,
            "limit": args.limit,
            "predicted": {code: result.predicted() for code, result in results.items()},
            "prompts, targets and metric": f"lm-eval {lm_eval.__version__}",
        },
        data={"path": str(args.xnli_dir), "digest": _digest(kept), "split": args.split, "files": kept},
    )
    return with_origin(record, Opened.of_text_model(model.hub, file))


def _digest(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def describe_xnli(records: "dict[str, Record]", split: str, limit: int | None) -> str:
    """Ours and the paper's, in percent."""
    from ..experiments import EXPERIMENTS

    paper = EXPERIMENTS["table3"].paper
    parts = {name: record.values("accuracy") for name, record in records.items()}
    first = next(iter(records.values()))
    counts = {metrics["accuracy"].count for metrics in first.parts.values()}
    size = " to ".join(map(str, sorted({min(counts), max(counts)})))
    codes = list(first.parts)
    rows = []
    for name, record in records.items():
        mean = record.metrics.get("mean of the paper's languages")
        cells = [f"{parts[name][code]:.1f}" for code in codes]
        rows.append([f"ours: {name}", *cells, MISSING if mean is None else f"{mean.value:.1f}"])
    for name, values in paper.values.items():
        cells = [f"{values[code]:.1f}" if code in values else MISSING for code in [*codes, "avg"]]
        rows.append([f"paper: {name}", *cells])
    trial = "" if limit is None else f"; a trial: --limit {limit}"
    return "\n".join([
        f"Zero-shot XNLI accuracy (%), {split}, {size} examples per language{trial}; chance 33.3; "
        "avg: mean of the paper's 14 languages.",
        f"The paper's rows ({paper.title}) are other models on other training data: beside ours, not mixed with them.",
        "",
        markdown_table(["model", *codes, "avg"], rows),
    ])  # fmt: skip


# ---------------------------------------------------------------------- probe


def _run_probe(args: argparse.Namespace) -> int:
    from ..evaluation.probe import default_pairs, make_items, parse_pairs, read_aligned

    path = args.data / "aligned" / f"{args.split}.jsonl"
    require_files([path], "--data")
    aligned = read_aligned(path)
    pairs = parse_pairs(args.pairs) if args.pairs is not None else default_pairs(aligned)
    items = {
        pair: make_items(
            aligned, *pair, candidates=args.candidates, seed=args.seed, most=args.max_items,
            min_characters=args.min_characters,
        )
        for pair in pairs
    }  # fmt: skip
    records = _record_each(args, lambda name, file: _probe(args, file, path, items))
    say(describe_probe(records, args.candidates, args.split))
    return 0


def _probe(args: argparse.Namespace, file: Path, path: Path, items: "dict[tuple[str, str], list[Item]]") -> "Record":
    from ..checkpoints.open import Opened, open_text_model
    from ..evaluation.evaluate import with_origin
    from ..evaluation.probe import probe
    from ..evaluation.records import Record
    from ..evaluation.scoring import TextScorer

    hub = open_text_model(file, args.data, "cpu" if args.cpu else None)
    scorer = TextScorer(hub, batch_tokens=args.max_batch_tokens)
    parts = {
        f"{source}-{target}": probe(scorer, questions, source, target, language_symbols=args.language_token)
        for (source, target), questions in items.items()
    }
    ways = next(iter(parts.values()))
    record = Record(
        "zero-shot",
        "probe",
        {way: _mean([metrics[way] for metrics in parts.values()]) for way in ways},
        parts,
        settings={
            "what": PROBE,
            **{name: getattr(args, name) for name in ("candidates", "max_items", "min_characters", "seed")},
            "language symbols": args.language_token,
        },
        data={"path": str(path), "digest": sha256_of(path), "split": args.split},
    )
    return with_origin(record, Opened.of_text_model(hub, file))


def describe_probe(records: "dict[str, Record]", candidates: int, split: str) -> str:
    """A row for every pair and their mean, two columns for every model."""
    first = next(iter(records.values()))
    header = ["pair", "items", *(f"{name}: {way}" for name in records for way in first.metrics)]
    rows = []
    for pair in [*first.parts, None]:
        of_models = [record.metrics if pair is None else record.parts[pair] for record in records.values()]
        cells = [_cell(metric) for metrics in of_models for metric in metrics.values()]
        rows.append([pair or "mean", str(next(iter(of_models[0].values())).count), *cells])
    return "\n".join([
        f"{PROBE[0].upper()}{PROBE[1:]} (n = {candidates}, {split} split).",
        f"Accuracy in percent and its standard error; chance is {100 / candidates:.1f}. Pair: language of the "
        "context - of the candidates.",
        "",
        markdown_table(header, rows),
    ])  # fmt: skip


def _cell(metric: "Metric") -> str:
    return f"{metric.value:.1f} ± {metric.stderr:.1f}"
