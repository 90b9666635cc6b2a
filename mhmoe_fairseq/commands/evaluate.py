"""``mhmoe evaluate``: how good a checkpoint is on a split, by its task's measures, or how fast checkpoints answer."""

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Sequence
from operator import truediv
from pathlib import Path

from ..common.arguments import (
    add_device_arguments,
    existing_file,
    existing_folder,
    existing_path,
    nonempty,
    output_file,
    plain_name,
    real,
    whole,
)
from ..common.console import quiet, say
from ..common.errors import UserError
from ..common.ranges import flag
from ..common.tables import MISSING, columns_table, markdown_table, number
from ..evaluation.records import Metric, Record, looks_at_test, record_file, write_record

DERIVED = "These labels are derived from the images' metadata by templates: they are neither VQAv2's nor NLVR2's."
_PARTS = {"perplexity": "domain", "masked": "masked", "classification": "language"}
_OF_SPEED = ("command", "checkpoint", "data", "record", "cpu", "precision", "speed", "rounds", "vllm")
_NOT_OPTIONS = (*_OF_SPEED, "split", "image")
_OF_ONE_SPLIT = ("record", "output", "splits", "input")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``mhmoe evaluate``; one without a meaning for the checkpoint's task is refused."""
    add = parser.add_argument
    add(
        "checkpoint", type=existing_path, nargs="+", metavar="CHECKPOINT",
        help="a checkpoint, or the folder that holds one; several with --speed",
    )  # fmt: skip
    add(
        "--data", type=existing_folder, metavar="DIR", help="folder of mhmoe prepare; that of the training if not given"
    )
    add(
        "--split", type=plain_name, action="append", metavar="NAME",
        help="train, valid, test, one language's or domain's, such as test_de, or of questions test-dev; may be "
        "repeated, for a record of each (test)",
    )  # fmt: skip
    add(
        "--record", "--json", "--scores", type=output_file, metavar="FILE",
        help="where the record is written; record-SPLIT.json beside the checkpoint if not given",
    )  # fmt: skip
    add(
        "--output", "--predictions", type=output_file, metavar="FILE",
        help="write the predictions: of sentences a JSON object a line, of questions JSON as VQAv2's server takes it, "
        "of statements NLVR2's CSV, of images' classes a CSV, captions as COCO's server takes them",
    )  # fmt: skip
    add("--batch-size", type=whole(), metavar="N", help="most examples, or blocks, per batch (32)")
    add("--max-tokens", type=whole(), metavar="N", help="most tokens per batch of text (36000; of sentences 4096)")
    add("--num-workers", type=whole(at_least=0), metavar="N", help="processes that decode images (0)")
    add_device_arguments(parser)
    speed = parser.add_argument_group("speed of language models, in place of a split")
    speed.add_argument(
        "--speed", nargs="+", metavar="BATCHxPROMPT+NEW",
        help="time greedy continuations, such as 4x7+16: 4 prompts of 7 tokens, 16 new ones for each; checkpoints take "
        "turns; a record of each and every workload",
    )  # fmt: skip
    speed.add_argument("--rounds", type=whole(), metavar="N", help="timed turns of each checkpoint (7)")
    speed.add_argument(
        "--vllm", type=existing_file, metavar="PYTHON",
        help="export the checkpoints and time vLLM: the interpreter of an environment that has it, such as "
        ".venv/vllm/bin/python of make test-vllm",
    )  # fmt: skip
    _add_text_arguments(parser)
    masked = parser.add_argument_group("masked images")
    masked.add_argument(
        "--visual-tokenizer", type=existing_file, metavar="FILE",
        help="that of the training, where it is no longer where it was then",
    )  # fmt: skip
    _add_sentence_arguments(parser.add_argument_group("classes of sentences"))
    captions = parser.add_argument_group("captions")
    captions.add_argument(
        "--beam", type=whole(), metavar="B", help="hypotheses that are kept, 1 is greedy; the training's"
    )
    add_caption_arguments(captions)
    captions.add_argument(
        "--no-java", action="store_const", const=True, help="leave out METEOR and SPICE even if they can be had"
    )
    captions.add_argument("--image", nargs="+", help=argparse.SUPPRESS)


def _add_text_arguments(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("text in several languages")
    text.add_argument("--langs", type=nonempty, metavar="CODES", help="only these languages, with commas in between")
    domains = parser.add_argument_group("text under a model with an expert for each domain")
    domains.add_argument(
        "--domain-mixture", type=nonempty, metavar="METHOD",
        help="do not tell the model the text's domain, but mix all experts' predictions: exact, by Bayes' rule from "
        "the document's tokens before; demix-code, from the one before; or a domain's name, whose expert predicts all",
    )  # fmt: skip
    domains.add_argument(
        "--domain-prior", type=nonempty, metavar="PRIOR",
        help="what a domain weighs before a document's first token: uniform, or train, its share of the training text",
    )  # fmt: skip


def _add_sentence_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--splits", type=plain_name, nargs="+", metavar="NAME", help="several splits in place of one")
    add(
        "--input", nargs="+", metavar="LANG=FILE",
        help="files of texts by language, as for mhmoe prepare classification, in place of a split",
    )  # fmt: skip
    add(
        "--text-fields", type=nonempty, nargs="+", metavar="NAME",
        help="of --input: fields of the text; the training's if not given",
    )  # fmt: skip
    add(
        "--label-field", type=nonempty, metavar="NAME",
        help="of --input: field of the label; without it there is no accuracy",
    )  # fmt: skip
    add("--language-field", type=nonempty, metavar="NAME", help="of --input: field of the language's code")


def add_caption_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags of a search for captions besides ``--beam``."""
    add = group.add_argument
    add(
        "--length-penalty", type=real(), metavar="P",
        help="captions are compared by log-probability over their length to the power P; the training's",
    )  # fmt: skip
    add("--max-len", type=whole(), metavar="N", help="most tokens of a caption; the training's")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print and write.

    Raises:
        UserError, OSError: for a bad flag, checkpoint or data folder, before the evaluation.
    """
    if args.image is not None:
        raise UserError("--image: mhmoe generate CHECKPOINT --image FILE captions single images")
    if args.speed is not None:
        return _measure_speed(args)
    given = {"several checkpoints": len(args.checkpoint) > 1, "--rounds": args.rounds, "--vllm": args.vllm}
    for name in (name for name, value in given.items() if value):
        raise UserError(f"{name}: need --speed")
    from ..checkpoints.open import open_model, read_settings
    from ..evaluation.evaluate import evaluate, split_options
    from ..models.language_model import find_checkpoint

    file = find_checkpoint(args.checkpoint[0], None)
    options = {name: value for name, value in vars(args).items() if name not in _NOT_OPTIONS}
    overrides, options = split_options(read_settings(file), options)
    splits = list(dict.fromkeys(args.split or ["test"]))
    for name in (name for name in _OF_ONE_SPLIT if len(splits) > 1 and getattr(args, name) is not None):
        raise UserError(f"{flag(name)}: takes one --split, and {len(splits)} are given")
    suffix = "".join(f"-{word}" for word in (args.domain_mixture, args.domain_prior) if word)
    if args.record is None:
        _require_writable(record_file(file.parent, split + suffix) for split in splits)
    with quiet():
        opened = open_model(file, args.data, "cpu" if args.cpu else None, overrides, args.precision)
    for split in splits:
        with quiet():
            record = evaluate(opened, split, **options)
        say(describe(record))
        if record.metrics:
            path = args.record or record_file(file.parent, record.split + suffix)
            if earlier := looks_at_test(path, record):
                say(f"evaluated before: {', '.join(earlier)}: a test set is for once, after all choices")
                record = dataclasses.replace(record, provenance={**record.provenance, "earlier": earlier})
            write_record(path, record)
            say(f"written: {path}")
    return 0


def _require_writable(files: Iterable[Path]) -> None:
    try:
        for file in files:
            output_file(str(file))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--record {error}: give --record FILE") from None


def _measure_speed(args: argparse.Namespace) -> int:
    """Time every workload, print a table of each and write a record beside each checkpoint."""
    for name in (name for name, value in vars(args).items() if value is not None and name not in _OF_SPEED):
        raise UserError(f"{flag(name)}: has no meaning with --speed")
    from ..checkpoints.open import open_model
    from ..evaluation.served import measure_served
    from ..evaluation.speed import Workload, measure_speed, require_language_models
    from ..models.language_model import find_checkpoint

    workloads = list(dict.fromkeys(map(Workload.parse, args.speed)))
    files = list(dict.fromkeys(find_checkpoint(path, None) for path in args.checkpoint))
    engine = "vllm-" if args.vllm else ""
    records = {(file, load): record_file(file.parent, f"speed-{engine}{load}") for file in files for load in workloads}
    if args.record is not None and len(records) > 1:
        raise UserError(f"--record: takes one checkpoint and one workload, not {len(records)} together")
    if args.record is not None:
        records = dict.fromkeys(records, args.record)
    if len(set(records.values())) < len(records):
        raise UserError("--speed: checkpoints of one folder would share a record: give one of them, and --record FILE")
    _require_writable(records.values())
    require_language_models(files)
    device = "cpu" if args.cpu else None
    with quiet():
        opened = [open_model(file, args.data, device, precision=args.precision) for file in files]
    for model, load in itertools.product(opened, workloads):
        load.require_room(model)
    rounds = {} if args.rounds is None else {"rounds": args.rounds}
    served = None if args.vllm is None else measure_served(opened, workloads, args.vllm, **rounds)
    for index, load in enumerate(workloads):
        found = measure_speed(opened, load, **rounds) if served is None else served[index]
        say(describe_speeds(files, found))
        for file, record in zip(files, found):
            write_record(records[file, load], record)
            say(f"written: {records[file, load]}")
    return 0


def describe_speeds(files: Sequence[Path], records: Sequence[Record]) -> str:
    """A row for each checkpoint: median rates of one workload with their ranges, and against the first's, by rounds."""
    table: dict[str, list[str]] = {"checkpoint": [str(file) for file in files]}
    for name in records[0].metrics:
        rounds = [record.settings["by_round"][name] for record in records]
        middles = [record.metrics[name].value for record in records]
        table[name] = [f"{x:,.1f} ({min(each):,.1f} to {max(each):,.1f})" for x, each in zip(middles, rounds)]
        if len(records) > 1 and name == "output tokens/s":
            ratios = (map(truediv, each, rounds[0]) for each in rounds)
            table["of the first's"] = [number(statistics.median(each)) for each in ratios]
    settings = records[0].settings
    told = ", ".join(f"{settings[name]} {name.replace('_', ' ')}" for name in ("rounds", "threads"))
    return f"{columns_table(table)}\nworkload {records[0].split}: medians of {told}; lowest to highest in brackets"


def describe(record: Record) -> str:
    """A table with a row for every part and one for all, then how it was measured, and what is absent."""
    lines = []
    settings = dict(record.settings)
    if record.metrics:
        rows = {**record.parts, f"{record.split}, all" if record.parts else record.split: record.metrics}
        columns = dict.fromkeys(column for metrics in rows.values() for column in _cells(metrics))
        table = [[name.replace("_", ", "), *(_cells(row).get(title, MISSING) for title in columns)]
                 for name, row in rows.items()]  # fmt: skip
        what = "perplexity" if "domain mixture" in settings else record.what
        parts = "language" if record.data.get("languages") else _PARTS.get(what, "split")
        head = parts if record.parts else "split"
        lines.append(markdown_table([head, *columns], table))
    if settings.pop("derived", False):
        lines.append(DERIVED)
    lines += [f"{name}: {value}" for name, value in settings.items()]
    lines += [f"{name}: absent, {reason}" for name, reason in record.absent.items()]
    return "\n".join(lines)


def _cells(metrics: dict[str, Metric]) -> dict[str, str]:
    """Column -> cell: how many were scored, the metrics, and beside each what guesses reach."""
    counts = [metric.count for metric in metrics.values() if metric.count is not None]
    cells = {"scored": f"{counts[0]:,}"} if counts else {}
    for name, metric in metrics.items():
        digits = 4 if metric.unit.startswith("bits") else 2
        error = "" if metric.stderr is None else f" ± {number(metric.stderr, digits)}"
        cells[name if metric.unit == name else f"{name} ({metric.unit})"] = number(metric.value, digits) + error
        cells |= {f"{name}, {guess}": number(value, digits) for guess, value in metric.baselines.items()}
    return cells
