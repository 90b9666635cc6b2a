"""RESULTS.md and docs/results, written from the tree of kept results alone: the same tree gives the same bytes."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from ..analysis.reports import tables
from ..analysis.reports.claims import (
    CONFIDENCE,
    MIN_SEEDS,
    NOT_RUN,
    NOT_SEEN,
    REFUTED,
    RULE,
    SEEN,
    Claim,
    Finding,
    judge,
    scale_of,
)
from ..analysis.reports.plots import draw_changes, file_of
from ..analysis.reports.report import Report, compose, write
from ..analysis.reports.runs import Model, read_model, require_one_data
from ..common.errors import UserError
from ..common.files import atomic_open, read_json
from ..common.tables import MISSING, columns_table, markdown_table
from ..evaluation.records import read_record
from .kept import CHOICE, kept_runs, others_of, too_early
from .plan import read_search
from .run import STATE
from .spec import Experiment

_HEAD = """# Results

Written by `mhmoe reproduce --report` from the records in [results/](results/); with `--check` it says whether this is
what they give. Each number is measured, by the command beside it. The papers' own (P1: arXiv 2404.15045, P2: arXiv
2411.16205) are labelled so and of other data: they show an order to look for, not values to reach."""
_MORE = """## Elsewhere

- [Parameters of the paper's models](docs/results/table11.md) (P1's table 11), counted.
- [Speed and memory](docs/benchmarks/README.md), dated reports of single machines.
- [Earlier studies](docs/results/earlier-studies.md), from before records were kept: not checked by anything."""

_SCALE = (
    "Unless a name says otherwise, models at CPU scale have four layers, of those with experts two have them, and "
    "TorchScale's router in place of the first paper's, without the sub-token residual of its equation 6 (`causes` has "
    "both layers as that paper has them). Learning rates are searched for the models in a page's table of the search; "
    "others of one experiment have one rate, which in fine-tuning on images and text was chosen with the dense model. "
    "As in the papers a rate is one for all parameters, which costs models with wide experts most: `expert-rates`."
)
_CHANGES = Path("docs/results/claims.png")


@dataclass(frozen=True)
class Page:
    """What is known of an experiment that has kept runs.

    Attributes:
        findings: a verdict on each of its claims, in their order.
    """

    experiment: Experiment
    models: dict[str, Model]
    findings: list[Finding]

    @property
    def command(self) -> str:
        """What runs it again, with the flags that its runs were kept with."""
        states = [run.path / STATE for model in self.models.values() for run in model.runs]
        flags = dict.fromkeys(read_json(state).get(CHOICE, "") for state in states if state.is_file())
        return " or ".join(f"mhmoe reproduce {self.experiment.name} {words}".rstrip() for words in flags or [""])

    def command_of(self, claim: Claim) -> str:
        """What judges a claim: at paper scale, where the CPU scale has not its models."""
        if {claim.model, claim.reference} <= {*self.experiment.models}:
            return self.command
        return f"mhmoe reproduce {self.experiment.name} --scale paper"

    @property
    def file(self) -> str:
        """Its page below the folder of RESULTS.md."""
        return f"docs/results/{self.experiment.name}.md"


def read_page(experiment: Experiment, tree: Path) -> Page:
    """Returns an experiment's kept runs and what they say of its claims; ``UserError`` for a broken record."""
    models = {name: read_model(name, folders) for name, folders in kept_runs(experiment, tree).items()}
    require_one_data(models.values(), None)
    return Page(experiment, models, [judge(claim, models) for claim in experiment.claims])


def write_results(experiments: Mapping[str, Experiment], tree: Path) -> Iterator[str]:
    """Writes RESULTS.md beside the tree, and docs/results with plots below it; yields what was written or removed."""
    pages = [read_page(experiment, tree) for experiment in experiments.values()]
    root, reports = tree.parent, _reports(pages, tree)
    for page, report in reports:
        write(report, root / page.file, _plots_of(page))
        yield f"written: {root / page.file}"
    for path in _stale(reports, root):
        path.unlink()
        if path.suffix == ".png" and not any(path.parent.iterdir()):
            path.parent.rmdir()
        yield f"removed: {path}, which no record gives"
    if rows := _changes(pages):
        draw_changes(root / _CHANGES, rows, "Model / reference: mean and 95 % interval", "change in %")
        yield f"written: {root / _CHANGES}"
    with atomic_open(root / "RESULTS.md") as stream:
        stream.write(summary(pages).encode())
    yield f"written: {root / 'RESULTS.md'}"


def check_results(experiments: Mapping[str, Experiment], tree: Path) -> Iterator[str]:
    """Yields what is not as the records give it: the first line of a file that differs, what is missing or stale.

    And a record of the test split from before its model's learning rate was chosen.
    """
    pages = [read_page(experiment, tree) for experiment in experiments.values()]
    root, reports = tree.parent, _reports(pages, tree)
    yield from _difference(root / "RESULTS.md", summary(pages))
    if _changes(pages) and not (root / _CHANGES).is_file():
        yield f"{root / _CHANGES}: is missing"
    for page, report in reports:
        file = root / page.file
        yield from _difference(file, f"{report.text}\n")
        yield from (f"{plot}: is missing" for plot in _linked_plots(page, report, root) if not plot.is_file())
    yield from (f"{path}: no record gives it" for path in _stale(reports, root))
    yield from dict.fromkeys(_too_early(pages, tree))


def _reports(pages: list[Page], tree: Path) -> list[tuple[Page, Report]]:
    return [(page, _report(page, tree)) for page in pages if page.models]


def _stale(reports: list[tuple[Page, Report]], root: Path) -> list[Path]:
    """Pages and plots that were written from records which are no longer there."""
    wanted = {root / page.file for page, _ in reports}
    wanted |= {plot for page, report in reports for plot in _linked_plots(page, report, root)}
    folder = root / "docs" / "results"
    found = [*filter(_is_written, folder.glob("*.md")), *folder.glob("*-plots/*.png")]
    return sorted(path for path in found if path not in wanted)


def _is_written(page: Path) -> bool:
    """Whether a page is of :func:`write_results`, and not a person's."""
    text = page.read_text(encoding="utf-8")
    return text.startswith(f"# {page.stem}: ") and "\n## Records\n" in text


def _too_early(pages: list[Page], tree: Path) -> Iterator[str]:
    for page in pages:
        folder = tree / page.experiment.folder
        search = read_search(folder)
        for run in (run for model in page.models.values() for run in model.runs):
            name, test = run.path.parent.relative_to(folder).as_posix(), run.path / "record-test.json"
            if test.is_file() and (problem := too_early(read_record(test), name, search)):
                yield f"{test}: {problem}"


def _difference(file: Path, expected: str) -> Iterator[str]:
    found = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    lines = expected.splitlines()
    for number, (line, wanted) in enumerate(zip(found, lines), start=1):
        if line != wanted:
            yield f"{file}:{number}: {line!r} must be {wanted!r}"
            return
    if len(found) != len(lines):
        yield f"{file}: has {len(found)} lines, the records give {len(lines)}"


def summary(pages: list[Page]) -> str:
    """Returns the text of RESULTS.md: the claims, then a table of each experiment that was run."""
    rows = [
        [*_claim_row(page, claim, finding), f"`{page.command_of(claim)}`"] for page, claim, finding in _claims(pages)
    ]
    header = ["claim", "paper", "ours", "verdict", "at", "command"]
    sections = [_section(page) for page in pages if page.models]
    missing = [f"`{page.experiment.name}`" for page in pages if not page.models and page.experiment.stages]
    told = f"Without records yet: {', '.join(missing)} (`mhmoe reproduce --list`)." if missing else ""
    claims = [markdown_table(header, rows), _number(pages)] if rows else []
    plot = f"![Claims and what we measured]({_CHANGES.as_posix()})" if _changes(pages) else ""
    text = [_HEAD, "## Claims", plot, *claims, RULE, _SCALE, *sections, told, _MORE]
    return "\n\n".join(filter(None, text)) + "\n"


def _number(pages: list[Page]) -> str:
    """How many comparisons there are, each pair counted once, and how many would have a verdict by chance alone."""
    found = {
        (claim.model, claim.reference, finding.values): finding
        for _, claim, finding in _claims(pages) if finding.verdict in (SEEN, REFUTED, NOT_SEEN)
    }  # fmt: skip
    if not found:
        return ""
    outside = sum(finding.verdict != NOT_SEEN for finding in found.values())
    by_chance = (1 - CONFIDENCE) * len(found)
    return (
        f"Different comparisons of at least {MIN_SEEDS} seeds: {len(found)}, of which {outside} are seen or refuted; "
        f"of as many pairs of equal models {by_chance:.1f} would be."
    )


def _changes(pages: list[Page]) -> dict[str, tuple[str, list[float]]]:
    """What :func:`draw_changes` draws: each pair of models once, where several seeds differ by so many percent."""
    rows: dict[str, tuple[str, list[float]]] = {}
    drawn = set()
    for page, claim, finding in _claims(pages):
        told = (claim.model, claim.reference, finding.values)
        if finding.bounds is None or finding.unit != "%" or told in drawn:
            continue
        drawn.add(told)
        low, high = finding.bounds
        paper = [float(claim.paper.split()[0])] if "%" in claim.paper else []
        name = f"{page.experiment.name}: {claim.model} / {claim.reference}"
        rows[name] = finding.verdict, [low, (low + high) / 2, high, *paper]
    return rows


def _claims(pages: list[Page]) -> list[tuple[Page, Claim, Finding]]:
    """All claims, those that our runs speak of first."""
    found = [row for page in pages for row in zip(repeat(page), page.experiment.claims, page.findings)]
    return sorted(found, key=lambda row: row[2].verdict == NOT_RUN)


def _claim_row(page: Page, claim: Claim, finding: Finding) -> list[str]:
    """Claim, paper, ours with the change's interval, verdict, and at what scale."""
    experiment = page.experiment
    source = f"{experiment.source} ({experiment.name}): {claim.text}"
    ours = MISSING
    if finding.changes:
        ours = f"{finding.values[0]} against {finding.values[1]}: {finding.told}"
    link = f"[{finding.verdict}]({page.file})" if finding.verdict != NOT_RUN else NOT_RUN
    return [source, claim.paper or MISSING, ours, link, finding.scale]


def _section(page: Page) -> str:
    """The table of models of an experiment, and a link to its page."""
    experiment, models = page.experiment, list(page.models.values())
    columns = tables.columns_of(models, "test")
    counted = f"{', '.join(dict.fromkeys(f'n = {len(model.runs)}' for model in models))}; {scale_of(models)}"
    title = f"## {experiment.name}: {experiment.summary}"
    told = (
        f"{experiment.source}; `{page.command}`; {counted}; mean ± sample standard deviation over seeds. "
        f"[Tables, plots, records]({page.file})"
    )
    return "\n\n".join([title, told, tables.overview(models, columns, "test", _reference(page))])


def _reference(page: Page) -> str | None:
    return page.experiment.reference if page.experiment.reference in page.models else None


def _plots_of(page: Page) -> str:
    """The folder of a page's plots, beside it."""
    return f"{page.experiment.name}-plots"


def _report(page: Page, tree: Path) -> Report:
    """The page of an experiment: what it is, its claims with their test, and the report of its runs."""
    experiment, models = page.experiment, list(page.models.values())
    paper = experiment.paper
    intro = f"# {experiment.name}: {experiment.summary}\n\n{experiment.source}. `{page.command}`; {scale_of(models)}."
    report = compose(
        models, "test", _reference(page), paper, _plots_of(page), "\n\n".join(filter(None, [intro, _tests(page)]))
    )
    text = "\n\n".join(filter(None, [report.text, _search(page, tree), _links(page, tree)]))
    return Report(report.head, text, report.plots)


def _tests(page: Page) -> str:
    """A row for each claim with what its verdict comes from."""
    if not page.experiment.claims:
        return ""
    columns: dict[str, list[str]] = {
        "claim": [claim.text for claim in page.experiment.claims],
        "paper": [claim.paper or MISSING for claim in page.experiment.claims],
        "ours": [finding.values[0] for finding in page.findings],
        "reference": [finding.values[1] for finding in page.findings],
        "n": [str(len(finding.changes) or MISSING) for finding in page.findings],
        "change": [finding.change for finding in page.findings],
        "95 % interval": [finding.interval for finding in page.findings],
        "verdict": [finding.verdict for finding in page.findings],
    }
    return f"## Claims\n\n{columns_table(columns)}\n\n{RULE}"


def _search(page: Page, tree: Path) -> str:
    """The learning rates that were tried, with the last validation loss of each."""
    search = read_search(tree / page.experiment.folder)
    if not search:
        return ""
    own = {stage.recipe.name_of(model) for stage in page.experiment.stages for model in page.models}
    losses = {name: of for name, of in search["valid_loss_bits"].items() if name in own}
    lrs = sorted(dict.fromkeys(lr for of in losses.values() for lr in of), key=float)
    cells = [[name, *(_tried(lr, of, search["best_lr"].get(name)) for lr in lrs)] for name, of in losses.items()]
    margin = max((stage.recipe.scales["cpu"].search_margin for stage in page.experiment.stages), default=0.0)
    rule = f"smallest rate within {margin:g} bits of the best" if margin else "smallest"
    told = (
        f"Validation loss in bits of a shorter training with each learning rate, one seed; the {rule} was taken. "
        "Where that is at the edge, one or two further rates are tried; of what still is, or was tried before that "
        "rule, it is not known whether a further one would be better."
    )
    return f"## Search of the learning rate\n\n{told}\n\n{markdown_table(['model', *lrs], cells)}" if cells else ""


def _tried(lr: str, losses: Mapping[str, float | None], best: str | None) -> str:
    """The loss with a rate, bold with the best, which is said to be at the edge of several if it is."""
    loss, tried = losses.get(lr), sorted(losses, key=float)
    if loss is None or lr != best:
        return MISSING if loss is None else f"{loss:.3f}"
    return f"**{loss:.3f}**{' (edge)' if len(tried) > 1 and lr in (tried[0], tried[-1]) else ''}"


def _links(page: Page, tree: Path) -> str:
    """A line for each model with links to its runs in the tree."""
    beside = (tree.parent / page.file).parent
    lines = []
    for name, model in page.models.items():
        runs = [(run.path.relative_to(tree).as_posix(), os.path.relpath(run.path, beside)) for run in model.runs]
        lines.append(f"- {name}: " + ", ".join(f"[{told}]({link})" for told, link in runs))
    folders = [tree / page.experiment.folder / name for name in others_of(page.experiment)]
    plots = [os.path.relpath(plot, beside) for folder in folders for plot in sorted(folder.glob("*.png"))]
    shown = [f"![{Path(plot).stem}]({plot})" for plot in plots]
    return "\n\n".join([*shown, "\n".join(["## Records", "", *lines])])


def _linked_plots(page: Page, report: Report, root: Path) -> list[Path]:
    return [(root / page.file).parent / _plots_of(page) / file_of(plot) for plot in report.plots]


def require_tree(tree: Path) -> None:
    """``UserError`` if there is no tree of results."""
    if not tree.is_dir():
        raise UserError(f"--results ({tree}) is no folder: mhmoe reproduce NAME --keep makes it of finished runs")
