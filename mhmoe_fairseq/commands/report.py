"""``mhmoe report``: trained runs side by side, as one Markdown file with figures."""

from __future__ import annotations

import argparse
from pathlib import Path

from fairseq.data import Dictionary

from ..analysis.reports import report
from ..analysis.reports.aggregate import aggregate_table, figures, find_seed_runs, group_by_model
from ..analysis.reports.language_report import draw_languages
from ..analysis.reports.modality_report import draw_modalities
from ..analysis.reports.plots import draw_activations, draw_curves, draw_error_bars, require_matplotlib
from ..analysis.reports.runs import Run, read_run, require_data, require_one_tokenizer
from ..analysis.reports.summary import Summary, summarise
from ..common.arguments import existing_folder, output_file, plain_name, whole
from ..common.console import quiet, say
from ..common.errors import UserError
from ..common.files import atomic_open
from ..data.identity import DataIdentity, identify_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``mhmoe report``."""
    parser.add_argument(
        "runs", nargs="+", type=existing_folder, metavar="RUN_DIR",
        help="folder with checkpoints, train.log, and eval-valid and eval-test (.json of mhmoe evaluate or .log)",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=existing_folder, required=True, metavar="DIR", help="data that all runs were trained on"
    )
    parser.add_argument("--out", type=output_file, default=Path("outputs/report.md"), metavar="FILE", help="the report")
    parser.add_argument(
        "--aggregate", action="store_true",
        help="mean and standard deviation over seeds; RUN_DIR is MODEL/seed-N, or a folder of such",
    )  # fmt: skip
    parser.add_argument(
        "--reference", type=plain_name, metavar="MODEL", help="with --aggregate: compare seed by seed with this model"
    )
    parser.add_argument(
        "--activation-split", type=plain_name, default="valid", metavar="SPLIT",
        help="split on which expert activation is measured; none to leave it out",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=whole(), default=32, help="blocks per batch of that measurement")
    parser.add_argument("--no-plots", action="store_true", help="tables only; needs no matplotlib")


def run(args: argparse.Namespace) -> int:
    """Write the report.

    Raises:
        UserError: for missing or unreadable runs, runs of other data, or missing matplotlib; before any measurement.
    """
    if not args.no_plots:
        require_matplotlib()
    if args.reference and not args.aggregate:
        raise UserError("--reference needs --aggregate")
    identity = identify_data(args.data)
    runs = [read_run(path) for path in (find_seed_runs(args.runs) if args.aggregate else args.runs)]
    _check_names(runs, args.aggregate)
    require_data(runs, identity, args.data)
    require_one_tokenizer(runs)
    write = _write_aggregate if args.aggregate else _write_comparison
    with quiet():
        text = write(args, identity, _summarise_all(args, runs, identity))
    with atomic_open(args.out) as stream:
        stream.write(text.encode())
    say(f"{text.split(report.END_OF_TABLE)[0].rstrip()}\n\nreport: {args.out}")
    return 0


def _check_names(runs: list[Run], aggregate: bool) -> None:
    names = [run.name for run in runs]
    if not aggregate and len(set(names)) < len(names):
        raise UserError(f"runs need different folder names, not {', '.join(names)} (several seeds: --aggregate)")


def _summarise_all(args: argparse.Namespace, runs: list[Run], identity: DataIdentity) -> list[Summary]:
    dictionary = Dictionary.load(str(args.data / "dict.txt"))
    split = None if args.activation_split == "none" else args.activation_split
    return [summarise(run, args.data, identity, dictionary, split, args.batch_size) for run in runs]


def _write_comparison(args: argparse.Namespace, identity: DataIdentity, summaries: list[Summary]) -> str:
    drawn: list[tuple[str, Path]] = []
    by_name = {summary.run.name: [summary] for summary in summaries}
    if not args.no_plots:
        drawn = _draw_comparison(args.out, summaries)
        drawn += _draw_groups(args.out, by_name)
    return report.comparison(identity, summaries, drawn, args.activation_split)


def _draw_groups(out: Path, groups: dict[str, list[Summary]]) -> list[tuple[str, Path]]:
    """Figures by language and by what is masked."""
    folder = out.parent / f"{out.stem}-figures"
    drawn = draw_languages(folder, groups) + draw_modalities(folder, groups)
    return [(title, path.relative_to(out.parent)) for title, path in drawn]


def _draw_comparison(out: Path, summaries: list[Summary]) -> list[tuple[str, Path]]:
    folder = out.parent / f"{out.stem}-figures"
    drawn = []
    for name, key, title, ylabel, is_log in (
        ("perplexity.png", "valid_ppl", "Validation perplexity", "perplexity", True),
        ("balance-loss.png", "gate_loss", "Balance loss in training (1 = uniform)", "balance loss", False),
    ):
        curves = [(summary.run.name, *summary.run.log.curve(key)) for summary in summaries]
        curves = [curve for curve in curves if curve[1]]
        if curves:
            draw_curves(folder / name, curves, title, ylabel, is_log)
            drawn.append((title, folder.relative_to(out.parent) / name))
    activations = {summary.run.name: summary.activation for summary in summaries if summary.activation}
    if activations:
        draw_activations(folder / "expert-activation.png", activations)
        drawn.append(("Expert activation", folder.relative_to(out.parent) / "expert-activation.png"))
    return drawn


def _write_aggregate(args: argparse.Namespace, identity: DataIdentity, summaries: list[Summary]) -> str:
    groups = group_by_model(summaries)
    table = aggregate_table(groups, args.reference)
    drawn: list[tuple[str, Path]] = []
    values = {model: figures(group, lambda summary: summary.perplexity("test")) for model, group in groups.items()}
    values = {model: seeds for model, seeds in values.items() if seeds}
    if values and not args.no_plots:
        title = "Test perplexity: mean, standard deviation, seeds"
        path = args.out.parent / f"{args.out.stem}-figures" / "test-perplexity.png"
        draw_error_bars(path, values, title, "perplexity")
        drawn.append((title, path.relative_to(args.out.parent)))
    if not args.no_plots:
        drawn += _draw_groups(args.out, groups)
    return report.aggregate(identity, table, groups, drawn)
