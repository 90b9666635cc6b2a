"""``mhmoe reproduce``: the papers' tables and figures, our studies and the demo, in one command each."""

import argparse
import difflib
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..common.arguments import existing_folder, nonempty, output_folder, real, seed, whole
from ..common.console import quiet, say
from ..common.errors import UserError
from ..common.tables import markdown_table
from ..experiments import EXPERIMENTS
from ..experiments.kept import TREE, keep, unmeasured
from ..experiments.listing import details, rows
from ..experiments.plan import Plan
from ..experiments.results import check_results, require_tree, write_results
from ..experiments.run import Choice
from ..experiments.runner import Runner, describe, dry_run
from ..experiments.spec import DEVICES, MACHINES, Experiment, Recipe, parse_flags
from ..experiments.speeds import HOURS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``mhmoe reproduce``."""
    parser.rest = "flags"  # type: ignore[attr-defined]
    parser.usage = "mhmoe reproduce NAME [flags] [-- flags of fairseq-train, which win over the recipe's]"
    parser.formatter_class = argparse.HelpFormatter
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="which experiment; see --list")
    add("--list", action="store_true", help="list the experiments, or say all of NAME: cost, state, claims, verdicts")
    add("--dry-run", action="store_true", help="print the commands, run nothing")
    add("--status", action="store_true", help="show how far every run is, run nothing")
    add("--keep", action="store_true", help="copy NAME's finished runs into the tree of results, without checkpoints")
    add("--report", action="store_true", help="write RESULTS.md and docs/results, beside the tree, from its records")
    add("--check", action="store_true", help="with --report: write nothing, fail where they are not what records give")
    add("--results", type=output_folder, default=TREE, metavar="DIR", help=f"the tree of results (default: {TREE})")
    add("--scale", choices=list(MACHINES), default="cpu", help="minutes on two cores (cpu, default), or the paper's")
    add("--device", choices=DEVICES, help="where models are trained and evaluated (default: cpu; at paper scale cuda)")
    add("--models", nargs="+", default=(), metavar="MODEL", help="names or patterns, such as xmoe 'mhmoe-flops*'")
    add("--seeds", nargs="+", type=seed, default=(), metavar="N", help="one training for each (default: as planned)")
    add("--data", type=output_folder, metavar="DIR", help="prepared data (default: the experiment's, made if missing)")
    add("--out", type=output_folder, metavar="DIR", help="folder of the runs (default: outputs/ and the experiment's)")
    add("--updates", type=whole(), metavar="N", help="updates of every training")
    add("--validations", type=whole(), metavar="N", help="how often a training is validated and saved")
    add("--size", choices=("tiny", "small", "base"), help="size of the models (default: cpu tiny, paper base)")
    rates = "learning rates; of several, the best for each model (default: the plan's, and beyond them if need be)"
    add("--lrs", nargs="+", type=_rate, default=(), metavar="LR", help=rates)
    add("--search-updates", type=whole(), metavar="N", help="updates of a training that only tries a learning rate")
    add("--start", metavar="NAME", help="start fine-tuning from this: pretraining, or a task such as vqa")
    add("--xnli", type=existing_folder, metavar="DIR", help="your copy of XNLI, for table3")
    add("--jobs", type=whole(), default=1, metavar="N", help="runs at the same time, by turns on the GPUs (default 1)")
    add("--threads", type=whole(), metavar="N", help="threads of every run (default: the environment's; 1 with --jobs)")
    add("--nproc", type=whole(), metavar="N", help="processes that share a training here (default: cpu 1, paper 8)")
    add("--batch", type=whole(), metavar="N", help="samples per process and step; an update stays the same")
    add("--nnodes", type=whole(), default=1, metavar="N", help="machines; start the command on each (default 1)")
    add("--node-rank", type=whole(at_least=0), metavar="N", help="this machine's number, from 0")
    add("--master-addr", type=nonempty, metavar="HOST", help="name of machine 0")
    add("--master-port", type=whole(at_most=65535), default=29500, metavar="N", help="its port (default 29500)")


def _rate(text: str) -> str:
    """A learning rate as it is written: searches name folders after it."""
    real(at_least=0)(text)
    return text.strip()


def run(args: argparse.Namespace) -> int:
    """Does what the flags ask for, or runs; ``UserError`` for bad settings, before anything runs, and failures."""
    if args.report or args.check:
        return _report(args)
    if args.list:
        _list(args)
        return 0
    for plan in plans_of(args):
        if args.dry_run:
            for line in dry_run(plan):
                say(line)
        elif args.keep:
            _keep(plan, args)
        elif args.status:
            say(markdown_table(["run", "state", "updates"], list(describe(plan))))
        else:
            threads = args.threads or (1 if args.jobs > 1 else None)
            earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)  # or its trainings would outlive it
            try:
                Runner(plan, say, args.jobs, threads).work()
            except KeyboardInterrupt:
                say("interrupted: the same command goes on from here")
                return 130  # what a shell reports of a program that Ctrl-C ended
            finally:
                signal.signal(signal.SIGTERM, earlier)
    return 0


def _keep(plan: Plan, args: argparse.Namespace) -> None:
    """Copies the records of finished runs into the tree, and says what has not been measured."""
    if args.updates:
        raise UserError(f"--updates ({args.updates}) with --keep: only runs of the experiment's own length are kept")
    for folder in keep(plan, args.results):
        say(f"kept: {folder}")
    if missing := unmeasured(plan):
        say(f"not measured yet: {', '.join(map(str, missing))}: mhmoe reproduce {args.name} does that")


def _report(args: argparse.Namespace) -> int:
    """Writes what the tree's records give, or says where RESULTS.md and docs/results are something else."""
    if not args.report:
        raise UserError("--check has a meaning with --report alone")
    require_tree(args.results)
    if args.check:
        wrong = list(check_results(EXPERIMENTS, args.results))
        for line in wrong:
            say(line)
        say(
            "written anew by: mhmoe reproduce --report"
            if wrong
            else "RESULTS.md and docs/results are what records give"
        )
        return 1 if wrong else 0
    with quiet():
        for line in write_results(EXPERIMENTS, args.results):
            say(line)
    return 0


def _list(args: argparse.Namespace) -> None:
    """Says a line of every experiment, or all of one."""
    if args.name is not None:
        for title, value in details(experiment_of(args.name), args.results):
            say(f"  {title}: {value}" if title else value)
        return
    header = ["NAME", "from", "models x seeds x updates", "tokens", "hours", "state", "verdict"]
    table = [header, *rows(EXPERIMENTS, args.results)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    say(f"\n{HOURS}\nmhmoe reproduce NAME runs one at CPU scale; mhmoe reproduce NAME --list says more of it")


def experiment_of(name: str | None) -> Experiment:
    """Returns the experiment of that name; ``UserError`` with the nearest ones."""
    if name not in EXPERIMENTS:
        near = difflib.get_close_matches(name or "", EXPERIMENTS, n=4, cutoff=0.5) or list(EXPERIMENTS)[:4]
        raise UserError(
            f"NAME ({name or ''}) must be an experiment, such as {', '.join(near)} (mhmoe reproduce --list has all)"
        )
    return EXPERIMENTS[name]


def plans_of(args: argparse.Namespace) -> Iterator[Plan]:
    """Yields the plan of the experiment, or of each of its parts; ``UserError`` for a bad name or combination."""
    experiment = experiment_of(args.name)
    if args.jobs > 1 and (args.scale != "cpu" or args.nnodes > 1):
        raise UserError(f"--jobs ({args.jobs}) must be 1 on several machines and at paper scale: a run takes all GPUs")
    if experiment.alone and args.jobs > 1:
        raise UserError(f"--jobs ({args.jobs}) must be 1 for {experiment.name}: it measures speed")
    models = tuple(args.models) or (experiment.models if experiment.parts and args.scale == "cpu" else ())
    choice = Choice(
        args.scale, args.size, args.device, args.batch, args.nproc or MACHINES[args.scale].nproc, args.nnodes,
        args.node_rank, args.master_addr, args.master_port, parse_flags(args.flags),
    )  # fmt: skip
    fields = ("seeds", "lrs", "search_updates", "updates", "validations")
    chosen = {field: value for field in fields if (value := getattr(args, field))}
    for part in (EXPERIMENTS[name] for name in experiment.parts or (experiment.name,)):
        out, start = args.out or Path("outputs") / part.folder, _start(part, args.start)
        yield Plan(replace(part, **chosen), out, choice, args.data, models, start, args.xnli)


def _start(experiment: Experiment, name: str | None) -> Recipe | None:
    """The recipe of that name among those of the experiment's folder."""
    if name is None:
        return None
    neighbours = [other for other in EXPERIMENTS.values() if other.folder == experiment.folder]
    recipes = {stage.recipe.name or "pretraining": stage.recipe for other in neighbours for stage in other.stages}
    if name not in recipes:
        raise UserError(f"--start ({name}) must be one of {', '.join(recipes)}")
    return recipes[name]
