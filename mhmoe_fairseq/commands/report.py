"""``mhmoe report``: trained models side by side, as Markdown or HTML with plots; reads records and logs alone."""

import argparse
from pathlib import Path

from ..analysis.reports.report import write_report
from ..analysis.reports.runs import find_runs
from ..common.arguments import existing_folder, output_file, plain_name
from ..common.console import quiet, say
from ..common.errors import UserError
from ..experiments import EXPERIMENTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``mhmoe report``."""
    parser.add_argument(
        "runs", nargs="+", type=existing_folder, metavar="RUN_DIR",
        help="folder with train.log and record-SPLIT.json (mhmoe evaluate writes it beside the checkpoint), "
        "MODEL/seed-N of several seeds, TASK/MODEL of several tasks, or a folder of such",
    )  # fmt: skip
    parser.add_argument("--out", type=output_file, default=Path("outputs/report.md"), metavar="FILE", help="the report")
    parser.add_argument(
        "--html", type=output_file, metavar="FILE", help="write it as one HTML file, too, with the plots inside"
    )
    parser.add_argument(
        "--split", type=plain_name, default="test", help="whose languages, modalities and experts are shown"
    )
    parser.add_argument("--names", type=plain_name, nargs="+", metavar="MODEL", help="only these models, in this order")
    parser.add_argument("--reference", type=plain_name, metavar="MODEL", help="compare seed by seed with this model")
    parser.add_argument(
        "--paper", type=plain_name, metavar="NAME", help="end with the paper's table of an experiment, such as table5"
    )
    parser.add_argument(
        "--data", type=existing_folder, metavar="DIR", help="refuse records of other data than this folder's"
    )
    parser.add_argument("--aggregate", action="store_true", help=argparse.SUPPRESS)  # seeds are told by their folders
    parser.add_argument("--no-plots", action="store_true", help="tables only; needs no matplotlib")


def run(args: argparse.Namespace) -> int:
    """Write the report; ``UserError`` for runs that are missing, broken or of other data, or an unknown table."""
    tables = {name: experiment.paper for name, experiment in EXPERIMENTS.items() if experiment.paper is not None}
    if args.paper is not None and args.paper not in tables:
        raise UserError(f"--paper ({args.paper}) must be one of {', '.join(tables)}")
    with quiet():
        write_report(
            find_runs(args.runs, args.names),
            args.out,
            split=args.split,
            reference=args.reference,
            paper=tables.get(args.paper),
            data=args.data,
            plots=not args.no_plots,
            html=args.html,
            say=say,
        )
    return 0
