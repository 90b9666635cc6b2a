"""``mhmoe zero-shot``: language models on tasks that they were not trained for."""

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..common.arguments import (
    add_action,
    add_device_arguments,
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
from ..common.files import read_json, require_files, sha256_of
from ..evaluation.records import Record, mean_of, read_kept, record_file, write_record

_OTHER_COMMANDS = ("ls", "validate")
_HELP = """mhmoe zero-shot lm-eval: lm-eval's command line with the model mhmoe, which --model need not name.

  mhmoe zero-shot lm-eval --tasks arc_easy,piqa --model_args checkpoint=DIR,data=DIR --batch_size auto [more flags]

--model_args of mhmoe, as key=value,key=value:
  checkpoint        a checkpoint, or the folder that holds one; record-zero-shot-lm-eval.json is written there
  data              folder with dict.txt and the tokenizer's model (default: the checkpoint's, or its training data)
  lang              language code whose symbol leads every text (models trained with --mhmoe-language-token)
  precision         fp32, bf16 or auto (default: as in the training)
  max_length        most tokens read at once (default: the model's positions)
  max_gen_toks      most new tokens where a task does not say (256)
  max_batch_tokens  most tokens per batch, for --batch_size auto (8192)
  clean             false: take text as it is, without mhmoe prepare's clean-up

"""

_ENGLISH_EXAMPLES = """\
  mhmoe prepare zero-shot --dest data/zero-shot
  mhmoe zero-shot english --checkpoint RUN1 RUN2 --tasks-dir data/zero-shot
  mhmoe zero-shot english --checkpoint RUN --tasks-dir data/zero-shot --tasks piqa,rte --limit 50

Each score stands beside what the commonest answer and chance reach; a small model is near them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The three kinds of tasks, each with its flags."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="TASKS")
    # No word is a flag of ours: --help is lm-eval's, too.
    words = kinds.add_parser(
        "lm-eval", help="any of lm-evaluation-harness, by its own flags", prefix_chars="\0", add_help=False
    )
    words.add_argument("words", nargs="*", help="lm-eval's own arguments; --model mhmoe is added")
    words.set_defaults(record=None)
    _add_english_arguments(
        add_action(kinds, "english", "English questions, as the paper's table 2", examples=_ENGLISH_EXAMPLES)
    )
    _add_xnli_arguments(add_action(kinds, "xnli", "XNLI in every language, from your copy of it"))
    _add_probe_arguments(add_action(kinds, "probe", "cross-lingual probe from aligned held-out text, not XNLI"))


def _add_english_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_data_argument(parser)
    add("--tasks-dir", type=existing_folder, required=True, metavar="DIR", help="folder of mhmoe prepare zero-shot")
    add("--tasks", type=nonempty, metavar="NAMES", help="with commas in between (default: all that DIR has)")
    add("--limit", type=whole(), metavar="N", help="only the first N questions of each task, for a trial")
    add(
        "--out", type=output_folder, default=Path("outputs/zero-shot"), metavar="DIR",
        help="folder for the scores of every answer and lm-eval's task files",
    )  # fmt: skip
    _add_model_arguments(parser)


def _add_data_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=existing_folder, metavar="DIR",
        help="folder with dict.txt and the vocabulary (default: the checkpoint's, or its training data)",
    )  # fmt: skip


def _add_xnli_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_data_argument(parser)
    add(
        "--xnli-dir", type=existing_folder, required=True, metavar="DIR",
        help="your copy of XNLI: the official files, or a JSON lines file per language",
    )  # fmt: skip
    add("--langs", type=nonempty, metavar="CODES", help="languages, with commas in between (default: all there are)")
    add("--split", choices=("validation", "test"), default="validation", help="lm-eval and the paper use validation")
    add("--limit", type=whole(), metavar="N", help="only N examples of each language, for a trial")
    add(
        "--out", type=output_folder, default=Path("outputs/xnli"), metavar="DIR",
        help="folder for the scores of every example and lm-eval's task files",
    )  # fmt: skip
    _add_model_arguments(parser)


def _add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=existing_folder, required=True, metavar="DIR", help="folder made by mhmoe prepare multilingual")
    add("--split", choices=("valid", "test"), default="test", help="of the aligned text")
    add(
        "--pairs", metavar="PAIRS",
        help="such as en-de,de-en: context-candidates (default: English with each, both ways)",
    )  # fmt: skip
    add("--candidates", type=whole(at_least=2), default=4, metavar="N", help="sentences to choose from")
    add("--max-items", type=whole(), default=200, metavar="N", help="most questions per pair")
    add("--min-characters", type=whole(at_least=0), default=10, metavar="N", help="shorter sentences are left out")
    add("--seed", type=seed, default=1, help="of questions, distractors and their order")
    _add_model_arguments(parser, "--out")


def _add_model_arguments(parser: argparse.ArgumentParser, *former: str) -> None:
    """The flags of both; ``former`` are other names of ``--record``."""
    add = parser.add_argument
    add(
        "--checkpoint", nargs="+", type=existing_path, required=True, metavar="FILE",
        help="checkpoints of language models, or folders that hold one, to compare",
    )  # fmt: skip
    add(
        "--record", *former, type=output_file, metavar="FILE",
        help="where a single checkpoint's record is written; record-zero-shot-TASKS.json beside it if not given",
    )  # fmt: skip
    add(
        "--language-token", action=argparse.BooleanOptionalAction,
        help="begin texts with their language's symbol (default: as the model was trained)",
    )  # fmt: skip
    add("--max-batch-tokens", type=whole(), default=8192, metavar="N", help="most tokens per batch")
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print and write.

    Raises:
        UserError, OSError: for a bad flag, file or checkpoint; files of text are read before any model.
    """
    return {"lm-eval": _run_lm_eval, "english": _run_english, "xnli": _run_xnli, "probe": _run_probe}[args.kind](args)


def _path(args: argparse.Namespace, file: Path) -> Path:
    """Where a checkpoint's record is written."""
    return args.record or record_file(file.parent, f"zero-shot-{args.kind}")


def _write(args: argparse.Namespace, record: Record, file: Path, hub: Any) -> Record:
    """Write what a checkpoint's model was found to do, with what it was measured with."""
    from ..checkpoints.open import Opened
    from ..evaluation.evaluate import with_origin

    record, path = with_origin(record, Opened.of_text_model(hub, file)), _path(args, file)
    write_record(path, record)
    say(f"written: {path}")
    return record


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


def _kept(args: argparse.Namespace, file: Path, digest: str) -> Record | None:
    """What was recorded earlier of a checkpoint on these data, in this precision, with its experts; None if nothing."""
    from ..checkpoints.open import precision_of

    with contextlib.suppress(UserError):  # half a record is none
        precision = precision_of(file, args.precision, "cpu" if args.cpu else None)
        record = read_kept(_path(args, file), (sha256_of(file), digest, args.kind, precision))
        if record is not None and (record.experts or not record.model["counts"].get("experts")):
            return record
    return None


def _record_each(
    args: argparse.Namespace, digest: str, evaluate: Callable[[str, Path, Record | None], tuple[Record, Any]]
) -> dict[str, Record]:
    """Evaluate one checkpoint after the other, by name and file, and write each record at once; they come by name.

    Args:
        evaluate: from name, file and an earlier record to the record and the model, or to that one and None.
    """
    from ..models.language_model import find_checkpoint

    if args.record is not None and len(args.checkpoint) > 1:
        raise UserError(f"--record {args.record}: is one file, and there are {len(args.checkpoint)} checkpoints")
    files = [find_checkpoint(path, None) for path in args.checkpoint]
    for file, other in itertools.combinations(files, 2):
        if _path(args, file) == _path(args, other):
            raise UserError(
                f"--checkpoint: {file} and {other} would share a record: give one of them, and --record FILE"
            )
    records = {}
    for name, file in zip(name_models(args.checkpoint), files):
        with quiet():
            record, hub = evaluate(name, file, _kept(args, file, digest))
        if hub is None:
            say(f"{name}: scored already, {_path(args, file)}")
        records[name] = record if hub is None else _write(args, record, file, hub)
    return records


def _run_lm_eval(args: argparse.Namespace) -> int:
    """Hand over to lm-eval, and make a record of the results of one of our models."""
    if {"-h", "--help"} & set(args.words) and not set(args.words) & set(_OTHER_COMMANDS):
        say(_HELP.removesuffix("\n"))
    from ..evaluation.lm_eval_model import record_of  # registers the model, or says how to install lm-eval

    before, words = sys.argv, complete(args.words)
    from lm_eval.__main__ import cli_evaluate

    with tempfile.TemporaryDirectory() as temporary:
        given = _read_words(words)
        known = set(_results(given.output_path or temporary))
        sys.argv = ["lm-eval", *words, *(["--output_path", temporary] if given.model and not given.output_path else [])]
        try:
            cli_evaluate()
        except ValueError as error:  # lm-eval's word for a task or argument that there is not
            raise UserError(str(error)) from error
        finally:
            sys.argv = before
        for path in set(_results(given.output_path or temporary)) - known:
            results = read_json(path)
            if (found := _open_evaluated(results["config"])) is not None:
                _write(args, record_of(results), *found)
    return 0


def _results(output_path: str) -> Iterable[Path]:
    """Where lm-eval writes its results: below a folder, or beside a file's name with the date behind it."""
    path = Path(output_path)
    return path.parent.glob(f"{path.stem}_*.json") if path.suffix == ".json" else path.rglob("results_*.json")


def complete(words: list[str]) -> list[str]:
    """lm-eval's arguments with our model, unless they name one or do not run a model."""
    if _read_words(words).model or not words or words[0] in _OTHER_COMMANDS:
        return words
    return [*words, "--model", "mhmoe"]


def _read_words(words: list[str]) -> argparse.Namespace:
    """What lm-eval's arguments say of the model and of the folder of its results."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", "-M", nargs="?")  # lm-eval says itself that a value is missing
    parser.add_argument("--output_path", "-o", nargs="?")
    return parser.parse_known_args(words)[0]


def _open_evaluated(config: dict[str, Any]) -> tuple[Path, Any] | None:
    """Our checkpoint that lm-eval's results are of, and its model; None if they are of another's model."""
    from ..checkpoints.open import open_text_model
    from ..models.language_model import find_checkpoint

    given = config.get("model_args") or {}
    if isinstance(given, str):
        given = dict(word.split("=", 1) for word in given.split(",") if "=" in word)
    if config.get("model") != "mhmoe" or "checkpoint" not in given:
        return None
    file = find_checkpoint(Path(given["checkpoint"]), None)
    return file, open_text_model(file, given.get("data"), given.get("device"), given.get("precision"))


def _harness_model(args: argparse.Namespace, file: Path) -> tuple[Any, Any]:
    """A checkpoint's model as lm-eval sees it, and a counter of its experts."""
    from ..checkpoints.open import Opened
    from ..evaluation.expert_loads import LoadCounter
    from ..evaluation.lm_eval_model import MHMoEHarnessModel

    device, rows = "cpu" if args.cpu else None, args.max_batch_tokens
    model = MHMoEHarnessModel(
        file, args.data, batch_size="auto", max_batch_tokens=rows, device=device, precision=args.precision
    )
    return model, LoadCounter(Opened.of_text_model(model.hub, file).layers)


def _language_symbols(args: argparse.Namespace, file: Path) -> bool:
    """Whether texts begin with their language's symbol."""
    from ..checkpoints.open import read_settings

    trained = bool(read_settings(file)["task"].get("mhmoe_language_token"))
    return trained if args.language_token is None else args.language_token


def _scores(args: argparse.Namespace, name: str, file: Path) -> Path:
    """The folder for a model's scores: of the same name there may be others, from other calls."""
    return args.out / "scores" / f"{name.replace('/', '_')}-{sha256_of(file)[:8]}"


def _run_english(args: argparse.Namespace) -> int:
    from ..data.zero_shot_tasks import choose_tasks, digest_of, open_tasks
    from ..evaluation.packaged_tasks import stay_offline

    files = open_tasks(args.tasks_dir, choose_tasks(args.tasks))
    name_models(args.checkpoint)
    stay_offline()
    from ..evaluation.english_tasks import evaluate_english, known_answers
    from ..evaluation.lm_eval_model import MHMoEHarnessModel  # noqa: F401  (says how to install lm-eval, before any model)

    digest = digest_of(args.tasks_dir, args.limit)

    def evaluate(name: str, file: Path, kept: Record | None) -> tuple[Record, Any]:
        symbols = _language_symbols(args, file)
        known = known_answers(kept, files, symbols)
        if kept is not None and known.keys() >= files.keys():
            return kept, None
        model, counter = _harness_model(args, file)
        record = evaluate_english(
            model, counter, files, args.tasks_dir, args.out / "tasks", known=known, digest=digest,
            scores=_scores(args, name, file), limit=args.limit, language_symbols=symbols,
            say=lambda line: say(f"{name}: {line}"),
        )  # fmt: skip
        return record, model.hub

    from ..analysis.reports.zero_shot import describe_english

    say(describe_english(_record_each(args, digest, evaluate), list(files)))
    return 0


def _run_xnli(args: argparse.Namespace) -> int:
    from ..evaluation.packaged_tasks import LANGUAGE_SYMBOLS, RELEASE, release, stay_offline

    stay_offline()
    from ..analysis.reports.zero_shot import describe_xnli
    from ..data.languages import parse_languages
    from ..data.xnli import read_xnli
    from ..evaluation.lm_eval_model import MHMoEHarnessModel  # noqa: F401  (says how to install lm-eval, before any file is read)
    from ..evaluation.xnli import evaluate_xnli, write_tasks
    from ..experiments.language_models import TABLE_3

    codes = None if args.langs is None else parse_languages(args.langs)
    name_models(args.checkpoint)
    sets = read_xnli(args.xnli_dir, args.split, codes)
    for path, reason in {name: why for one in sets for name, why in one.left_out.items()}.items():
        say(f"left out: {path}: {reason}")
    write_tasks(args.out / "tasks", sets, args.split)
    files = {one.code: {"path": str(one.path), "sha256": one.sha256, "left_out": one.left_out} for one in sets}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    data = {"path": str(args.xnli_dir), "digest": digest, "split": args.split, "files": files}

    def evaluate(name: str, file: Path, kept: Record | None) -> tuple[Record, Any]:
        how = {"limit": args.limit, LANGUAGE_SYMBOLS: _language_symbols(args, file)}
        if kept is not None and {**kept.settings, **how, RELEASE: release()} == kept.settings:
            return kept, None
        model, counter = _harness_model(args, file)
        record = evaluate_xnli(
            model, counter, [one.code for one in sets], args.out / "tasks",
            _scores(args, name, file), language_symbols=how[LANGUAGE_SYMBOLS], limit=args.limit,
            say=lambda line: say(f"{name}: {line}"),
        )  # fmt: skip
        return dataclasses.replace(record, data=data), model.hub

    records = _record_each(args, digest, evaluate)
    say(describe_xnli(records, args.split, args.limit, TABLE_3))
    return 0


def _run_probe(args: argparse.Namespace) -> int:
    from ..analysis.reports.zero_shot import PROBE, describe_probe
    from ..checkpoints.open import open_text_model
    from ..evaluation.packaged_tasks import LANGUAGE_SYMBOLS
    from ..evaluation.probe import default_pairs, make_items, parse_pairs, probe, read_aligned
    from ..evaluation.scoring import TextScorer

    path = args.data / "aligned" / f"{args.split}.jsonl"
    require_files([path], "--data")
    aligned = read_aligned(path)
    how = {"candidates": args.candidates, "seed": args.seed, "min_characters": args.min_characters}
    pairs = parse_pairs(args.pairs) if args.pairs is not None else default_pairs(aligned)
    items = {pair: make_items(aligned, *pair, most=args.max_items, **how) for pair in pairs}
    settings = {"what": PROBE, **how, "max_items": args.max_items, LANGUAGE_SYMBOLS: args.language_token}
    data = {"path": str(path), "digest": sha256_of(path), "split": args.split}

    def evaluate(name: str, file: Path, kept: Record | None) -> tuple[Record, Any]:
        hub = open_text_model(file, args.data, "cpu" if args.cpu else None, args.precision)
        scorer = TextScorer(hub, batch_tokens=args.max_batch_tokens)
        parts = {
            f"{source}-{target}": probe(scorer, questions, source, target, language_symbols=args.language_token)
            for (source, target), questions in items.items()
        }
        metrics = {way: mean_of([found[way] for found in parts.values()]) for way in next(iter(parts.values()))}
        return Record("zero-shot", "probe", metrics, parts, settings=settings, data=data), hub

    records = _record_each(args, data["digest"], evaluate)
    say(describe_probe(records, args.candidates, args.split))
    return 0
