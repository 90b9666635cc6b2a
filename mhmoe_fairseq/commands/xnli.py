"""``mhmoe xnli``: zero-shot XNLI of trained models in every language, beside the paper's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..analysis.reports.paper_numbers import P1, TABLE_3
from ..common.arguments import existing_folder, existing_path, nonempty, output_folder, whole
from ..common.console import quiet, say
from ..common.errors import UserError
from ..common.files import sha256_of, write_json
from ..common.tables import MISSING, markdown_table
from ..data.languages import PAPER_LANGUAGES, parse_languages
from ..evaluation.lm_eval_support import require_lm_eval
from ..evaluation.xnli_files import SPLITS, XnliSet, read_xnli

if TYPE_CHECKING:
    from ..evaluation.xnli import LanguageResult

CHANCE = 1 / 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``mhmoe xnli``."""
    parser.add_argument(
        "--checkpoint", nargs="+", type=existing_path, required=True, metavar="FILE",
        help="checkpoints of language models, or folders that hold one; each is a row of the table",
    )  # fmt: skip
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
    parser.add_argument("--split", choices=list(SPLITS), default="validation", help="lm-eval and the paper use it")
    parser.add_argument(
        "--language-token", action=argparse.BooleanOptionalAction,
        help="begin texts with their language's symbol (default: as the model was trained)",
    )  # fmt: skip
    parser.add_argument("--limit", type=whole(), metavar="N", help="only N examples of each language, for a trial")
    parser.add_argument("--max-batch-tokens", type=whole(), default=8192, metavar="N", help="most tokens per batch")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even if there is a GPU")
    parser.add_argument(
        "--out", type=output_folder, default=Path("outputs/xnli"), metavar="DIR",
        help="folder for results.json, the scores of every example and lm-eval's task files",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Evaluate, print and write.

    Raises:
        ValueError, OSError: for a bad flag, file or checkpoint; the XNLI files are read before any model.
    """
    require_lm_eval()
    codes = None if args.langs is None else parse_languages(args.langs)
    names = name_models(args.checkpoint)
    sets = read_xnli(args.xnli_dir, args.split, codes)
    for path, reason in {name: why for one in sets for name, why in one.left_out.items()}.items():
        say(f"left out: {path}: {reason}")

    from ..evaluation.xnli_tasks import write_tasks

    write_tasks(args.out / "tasks", sets, args.split)
    models = []
    for name, checkpoint in zip(names, args.checkpoint):
        with quiet():
            models.append(_evaluate(args, name, checkpoint, sets))
        write_json(args.out / "results.json", _record(args, sets, models))
    say(describe(models, args.split, args.limit))
    say(f"\nwritten: {args.out / 'results.json'}")
    return 0


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


def _evaluate(args: argparse.Namespace, name: str, checkpoint: Path, sets: list[XnliSet]) -> dict[str, Any]:
    from ..evaluation.xnli import evaluate_xnli, stay_offline

    stay_offline()
    from ..evaluation.lm_eval_adapter import MHMoEHarnessModel
    from ..models.language_model import find_checkpoint

    file = find_checkpoint(checkpoint, None)
    model = MHMoEHarnessModel(
        checkpoint=str(file),
        data=None if args.data is None else str(args.data),
        batch_size="auto",
        max_batch_tokens=args.max_batch_tokens,
        device="cpu" if args.cpu else None,
    )
    codes = [one.code for one in sets]
    languages = {}
    for result in evaluate_xnli(
        model, args.out / "tasks", codes, language_symbols=args.language_token, limit=args.limit
    ):
        say(f"{name}: {result.code} {100 * result.accuracy:.1f} +- {100 * result.stderr:.1f}")
        languages[result.code] = _figures(result)
        rows = [{"log_probs": row, "label": label} for row, label in zip(result.log_probs, result.labels)]
        write_json(args.out / "scores" / name.replace("/", "_") / f"{result.code}.json", rows)
    accuracies = [figures["accuracy"] for figures in languages.values()]
    return {
        "name": name,
        "checkpoint": str(file),
        "checkpoint_sha256": sha256_of(file),
        "languages": languages,
        "mean": sum(accuracies) / len(accuracies),
        "paper_languages_mean": paper_mean({code: figures["accuracy"] for code, figures in languages.items()}),
    }


def _figures(result: LanguageResult) -> dict[str, Any]:
    return {
        "accuracy": result.accuracy,
        "stderr": result.stderr,
        "examples": len(result.labels),
        "predicted": result.predicted(),
    }


def paper_mean(accuracies: dict[str, float]) -> float | None:
    """Mean over the paper's 14 languages; None unless all are there."""
    if not set(PAPER_LANGUAGES) <= set(accuracies):
        return None
    return sum(accuracies[code] for code in PAPER_LANGUAGES) / len(PAPER_LANGUAGES)


def _record(args: argparse.Namespace, sets: list[XnliSet], models: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "what": "zero-shot XNLI, lm-eval's packaged prompts, targets and metric (acc)",
        "lm_eval": metadata.version("lm_eval"),
        "split": args.split,
        "limit": args.limit,
        "language_symbols": args.language_token,
        "files": {one.code: {"path": str(one.path), "sha256": one.sha256, "left_out": one.left_out} for one in sets},
        "models": models,
        "paper": {"source": f"{P1}, table 3", "languages": list(PAPER_LANGUAGES), "percent": TABLE_3},
    }


def describe(models: list[dict[str, Any]], split: str, limit: int | None) -> str:
    """Ours and the paper's, in percent."""
    codes = list(models[0]["languages"])
    sizes = {figures["examples"] for figures in models[0]["languages"].values()}
    size = str(sizes.pop()) if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
    rows = [[f"ours: {model['name']}", *_ours(model, codes)] for model in models]
    rows += [[f"paper: {name}", *_papers(values, codes)] for name, values in TABLE_3.items()]
    trial = "" if limit is None else f"; a trial: --limit {limit}"
    return "\n".join([
        f"Zero-shot XNLI accuracy (%), {split}, {size} examples per language{trial}; chance {100 * CHANCE:.1f}; "
        "avg: mean of the paper's 14 languages.",
        f"The paper's rows ({P1}, table 3) are other models on other training data: beside ours, not mixed with them.",
        "",
        markdown_table(["model", *codes, "avg"], rows),
    ])  # fmt: skip


def _ours(model: dict[str, Any], codes: list[str]) -> list[str]:
    mean = model["paper_languages_mean"]
    cells = [f"{100 * model['languages'][code]['accuracy']:.1f}" for code in codes]
    return [*cells, MISSING if mean is None else f"{100 * mean:.1f}"]


def _papers(values: dict[str, float], codes: list[str]) -> list[str]:
    return [f"{values[code]:.1f}" if code in values else MISSING for code in codes] + [f"{values['avg']:.1f}"]
