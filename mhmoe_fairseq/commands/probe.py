"""``mhmoe probe``: our own cross-lingual probe, which is not XNLI, of trained models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..common.arguments import existing_folder, existing_path, output_file, seed, whole
from ..common.console import quiet, say
from ..common.errors import UserError
from ..common.files import require_files, sha256_of, write_json
from ..common.tables import markdown_table
from ..data.languages import get_language
from ..evaluation.probe import Aligned, Item, ProbeResult, make_items, probe, read_aligned
from .xnli import name_models

WHAT = "cross-lingual probe of our own, not XNLI: which of n sentences translates the one before it"
_PIVOT = "en"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``mhmoe probe``."""
    parser.add_argument(
        "--checkpoint", nargs="+", type=existing_path, required=True, metavar="FILE",
        help="checkpoints of language models, or folders that hold one",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=existing_folder, required=True, metavar="DIR", help="folder made by mhmoe prepare multilingual"
    )
    parser.add_argument("--split", choices=["valid", "test"], default="test", help="of the aligned text")
    parser.add_argument(
        "--pairs",
        metavar="PAIRS",
        help="such as en-de,de-en: context-candidates (default: English with each, both ways)",
    )
    parser.add_argument("--candidates", type=whole(at_least=2), default=4, metavar="N", help="sentences to choose from")
    parser.add_argument("--max-items", type=whole(), default=200, metavar="N", help="most questions per pair")
    parser.add_argument(
        "--min-characters", type=whole(at_least=0), default=10, metavar="N", help="shorter sentences are left out"
    )
    parser.add_argument("--seed", type=seed, default=1, help="of questions, distractors and their order")
    parser.add_argument(
        "--language-token", action=argparse.BooleanOptionalAction,
        help="begin texts with their language's symbol (default: as the model was trained)",
    )  # fmt: skip
    parser.add_argument("--max-batch-tokens", type=whole(), default=8192, metavar="N", help="most tokens per batch")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even if there is a GPU")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write the figures there as JSON, too")


def run(args: argparse.Namespace) -> int:
    """Probe, print and write.

    Raises:
        ValueError, OSError: for a bad flag, text or checkpoint; the questions are made before a model is loaded.
    """
    path = args.data / "aligned" / f"{args.split}.jsonl"
    require_files([path], "--data")
    names = name_models(args.checkpoint)
    aligned = read_aligned(path)
    pairs = parse_pairs(args.pairs) if args.pairs is not None else default_pairs(aligned)
    items = {
        pair: make_items(
            aligned, *pair, candidates=args.candidates, seed=args.seed, most=args.max_items,
            min_characters=args.min_characters,
        )
        for pair in pairs
    }  # fmt: skip
    models = []
    for name, checkpoint in zip(names, args.checkpoint):
        with quiet():
            models.append(_probe(args, name, checkpoint, items))
        if args.out is not None:
            write_json(args.out, _record(args, path, models))
    say(describe(models, args.candidates, args.split))
    if args.out is not None:
        say(f"\nwritten: {args.out}")
    return 0


def parse_pairs(text: str) -> list[tuple[str, str]]:
    """``en-de,de-en`` as pairs.

    Raises:
        UserError: naming what is no pair of two different known languages, or given twice.
    """
    pairs = []
    for part in text.split(","):
        codes = tuple(part.strip().split("-"))
        if len(codes) != 2 or codes[0] == codes[1]:
            raise UserError(f"--pairs {part}: must be two different language codes with a hyphen, such as en-de")
        for code in codes:
            get_language(code, "--pairs")
        if codes in pairs:
            raise UserError(f"--pairs {part}: given twice")
        pairs.append((codes[0], codes[1]))
    return pairs


def default_pairs(aligned: list[Aligned]) -> list[tuple[str, str]]:
    """English and each other language of the text, both ways.

    Raises:
        UserError: there is no English, or nothing else.
    """
    codes = sorted({code for one in aligned if _PIVOT in one.text for code in one.text} - {_PIVOT})
    if not codes:
        raise UserError("the aligned text has no language beside English: name pairs with --pairs")
    return [(_PIVOT, code) for code in codes] + [(code, _PIVOT) for code in codes]


def _probe(
    args: argparse.Namespace, name: str, checkpoint: Path, items: dict[tuple[str, str], list[Item]]
) -> dict[str, Any]:
    from ..checkpoints.open import open_text_model
    from ..evaluation.scoring import TextScorer
    from ..models.language_model import find_checkpoint

    file = find_checkpoint(checkpoint, None)
    model = open_text_model(file, args.data, "cpu" if args.cpu else None)
    scorer = TextScorer(model, batch_tokens=args.max_batch_tokens)
    pairs = {}
    for (source, target), questions in items.items():
        result = probe(scorer, questions, source, target, language_symbols=args.language_token)
        pairs[f"{source}-{target}"] = _figures(result)
    return {
        "name": name,
        "checkpoint": str(file),
        "checkpoint_sha256": sha256_of(file),
        "pairs": pairs,
        "mean": {way: _mean(pairs, way) for way in ("per_token", "pmi")},
    }


def _figures(result: ProbeResult) -> dict[str, Any]:
    ways = {"per_token": result.by_length, "pmi": result.by_pmi}
    figures: dict[str, Any] = {"items": result.items}
    for way, correct in ways.items():
        accuracy, stderr = result.accuracy(correct)
        figures[way] = {"correct": correct, "accuracy": accuracy, "stderr": stderr}
    return figures


def _mean(pairs: dict[str, Any], way: str) -> dict[str, float]:
    """Over pairs; its standard error is that of the questions alone, as if pairs were independent."""
    accuracy = sum(figures[way]["accuracy"] for figures in pairs.values()) / len(pairs)
    stderr = sum(figures[way]["stderr"] ** 2 for figures in pairs.values()) ** 0.5 / len(pairs)
    return {"accuracy": accuracy, "stderr": stderr}


def _record(args: argparse.Namespace, path: Path, models: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "what": WHAT,
        "aligned": str(path),
        "aligned_sha256": sha256_of(path),
        "split": args.split,
        "candidates": args.candidates,
        "chance": 1 / args.candidates,
        "max_items": args.max_items,
        "min_characters": args.min_characters,
        "seed": args.seed,
        "language_symbols": args.language_token,
        "models": models,
    }


def describe(models: list[dict[str, Any]], candidates: int, split: str) -> str:
    """A row for every pair, two columns for every model."""
    header = ["pair", "items"]
    for model in models:
        header += [f"{model['name']}: per token", f"{model['name']}: PMI"]
    rows = []
    for pair, figures in models[0]["pairs"].items():
        cells = [_cell(model["pairs"][pair][way]) for model in models for way in ("per_token", "pmi")]
        rows.append([pair, str(figures["items"]), *cells])
    means = [_cell(model["mean"][way]) for model in models for way in ("per_token", "pmi")]
    rows.append(["mean", str(sum(int(row[1]) for row in rows)), *means])
    return "\n".join([
        f"{WHAT[0].upper()}{WHAT[1:]} (n = {candidates}, {split} split).",
        f"Accuracy in percent and its standard error; chance is {100 / candidates:.1f}. Pair: language of the "
        "context - of the candidates.",
        "",
        markdown_table(header, rows),
    ])  # fmt: skip


def _cell(figures: dict[str, float]) -> str:
    return f"{100 * figures['accuracy']:.1f} ± {100 * figures['stderr']:.1f}"
