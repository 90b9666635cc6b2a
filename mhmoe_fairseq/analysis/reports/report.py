"""Write a report: models side by side, from their runs' records and logs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...common.files import atomic_open
from ...evaluation.records import ACTIVE_THRESHOLD
from . import tables
from .page import html_page
from .plots import Plot, draw_all, draw_bars, draw_curves, draw_scaling, draw_seeds, file_of, require_matplotlib
from .routing import activation_plot, part_plots, routing_section
from .runs import Model, all_records, evaluations, read_model, require_one_data

_NOTES = {
    "perplexity": "ppl: perplexity per token of one vocabulary: compare models, not languages or domains. bits/byte "
    "and bits/char divide by the bytes and characters of the text, line ends included, and compare vocabularies, too.",
    "speed": "BATCHxPROMPT+NEW, such as 4x7+16: so many prompts of so many tokens, continued greedily by so many each; "
    "output tokens/s: new tokens over the time of prompts and continuations; prompt tokens/s: the prompts' tokens over "
    "the time to the first new one; medians of rounds in which the checkpoints took turns; vllm-: by vLLM.",
    "polysemy": "Experts per token: different experts among a token's sub-tokens, mean of the MoE layers; polysemous "
    "and control: words in pairs of like frequency and equally many tokens, chosen by a rule from WordNet unless the "
    "record says otherwise, not by GPT-4 as in the paper; all: every word of the lists in the split; polysemy: mean "
    "difference of the pairs.",
    "masked": "Masked positions: every image and text once, with the same masks for every model. ppl: perplexity per "
    "masked position, of patches among the visual tokenizer's ids and of words among the dictionary; all: patches and "
    "words together; right: share of masked positions whose most probable symbol is the right one; without context: a "
    "guess that sees nothing but knows how often every symbol is masked in this split.",
}
_DERIVED = (
    "Questions and statements are derived from the images' metadata by templates: these are neither VQAv2 nor NLVR2, "
    "and no score here compares with a paper's."
)


def write_report(
    runs: Mapping[str, Sequence[Path]],
    out: Path,
    *,
    split: str = "test",
    reference: str | None = None,
    paper: tables.PaperTable | None = None,
    data: Path | None = None,
    plots: bool = True,
    html: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Write models side by side as Markdown, with plots beside it, and return the text.

    Reads records and training logs alone: no checkpoint, no data.

    Args:
        runs: model -> its run folders: one for each seed, or for each task.
        out: the file; plots go to the folder ``STEM-plots`` beside it.
        split: whose languages, modalities and experts are shown.
        reference: a model that the others are compared with, seed by seed.
        paper: the paper's own table, printed last with ours beside it.
        data: refuse records of other data than this prepared folder's.
        html: a second file, the same as one HTML page with the plots inside.
        say: takes the tables for the terminal, then the name of the file.

    Raises:
        UserError: a run is missing or broken, records are of different data, or plots need matplotlib.
    """
    if plots:
        require_matplotlib()
    models = [read_model(name, folders) for name, folders in runs.items()]
    require_one_data(models, data)
    folder = f"{out.stem}-plots"
    report = compose(models, split, reference, paper, folder if plots else None)
    write(report, out, folder)
    say(report.head)
    if html is not None:
        with atomic_open(html) as stream:
            stream.write(html_page(report.text, out.parent).encode())
    say(f"report: {out}" + (f", {html}" if html else ""))
    return report.text


@dataclass(frozen=True)
class Report:
    """Models side by side: the tables for a terminal, the whole text, and the plots that it shows."""

    head: str
    text: str
    plots: list[Plot]


def compose(
    models: Sequence[Model],
    split: str = "test",
    reference: str | None = None,
    paper: tables.PaperTable | None = None,
    folder: str | None = None,
    top: str = "# Models side by side",
) -> Report:
    """Returns the report of models below ``top``; ``folder``: of the plots beside the file, without it none."""
    columns = tables.columns_of(models, split)
    parts = [
        tables.parts_section(models, what, name)
        for what, splits in evaluations(models).items()
        for name in splits[::-1]
    ]
    head = _joined(tables.overview(models, columns, split, reference), tables.against_guessing(models, columns), *parts)
    plots = [] if folder is None else list(_plots(models, split, columns))
    text = _joined(
        top,
        _data_lines(models),
        head,
        _notes(models, split),
        routing_section(models, split),
        tables.differing_settings(models),
        *(f"## {plot[3]}\n\n![{plot[3]}]({folder}/{file_of(plot)})" for plot in plots),
        _commands(models),
        tables.paper_section(paper, models, columns, split) if paper else "",
    )
    return Report(head, text, plots)


def write(report: Report, out: Path, folder: str) -> None:
    """Draws a report's plots into ``folder`` beside ``out``, then writes its text there."""
    for _ in draw_all(out.parent / folder, report.plots):
        pass
    with atomic_open(out) as stream:
        stream.write(f"{report.text}\n".encode())


def _joined(*parts: str) -> str:
    return "\n\n".join(filter(None, parts))


def _data_lines(models: Sequence[Model]) -> str:
    """What was evaluated, and with which code."""
    records = [record for _, record in all_records(models)]
    lines = [
        f"- {record.what}: {record.data.get('source')}, SHA-256 `{record.data.get('digest')}`" for record in records
    ]
    commits = dict.fromkeys(str(record.provenance.get("commit")) for record in records)
    return _joined("\n".join(dict.fromkeys(lines)), f"Evaluated at commit {', '.join(commits)}." if commits else "")


_PEAK = "peak GB: most memory of a training, 10^9 bytes; of tensors on a GPU, else all of the process."


def _notes(models: Sequence[Model], split: str) -> str:
    records = [record for _, record in all_records(models)]
    contexts = dict.fromkeys(f"{counts['context']:,}" for model in models if (counts := tables.counts_of(model)))
    lines = [
        "parameters: all, the tied embedding once; active: without the experts that a sub-token's choices leave out; "
        "the H sub-tokens of a token may choose others, up to H times as many.",
        f"MFLOPs/token: one forward pass, matrix products only, attention within {' or '.join(contexts)} tokens.",
        "tokens/s: training on this machine, median over the log intervals without a validation; to be compared only "
        "where nothing else ran beside it.",
        *([_PEAK] if any(map(tables.PEAK_MEMORY.values, models)) else []),
        f"active experts: share with at least {ACTIVE_THRESHOLD:.0%} of the uniform load; effective experts: "
        f"exp(entropy of the load) / number of experts; means of the MoE layers, {split} split or the one measured.",
        *_precision_notes(models),
        *_device_notes(models),
        *_spent(models),
        *(note for what, note in _NOTES.items() if any(record.what == what for record in records)),
        *dict.fromkeys(f"{name} is absent: {why}." for record in records for name, why in record.absent.items()),
    ]
    looks = [
        f"{model.name}, {run.path.name} ({', '.join(earlier)})"
        for model in models for run, record in all_records([model]) if (earlier := record.provenance.get("earlier"))
    ]  # fmt: skip
    if looks:
        lines.append(f"evaluated on the test split more than once, earlier: {'; '.join(looks)}.")
    if any(len(model.runs) > 1 for model in models):
        lines.append("Mean ± sample standard deviation over the seeds.")
    if any(record.settings.get("derived") for record in records):
        lines.append(_DERIVED)
    return "\n".join(f"- {line}" for line in lines)


def _precision_notes(models: Sequence[Model]) -> Iterator[str]:
    """What the models were trained in, and whether the machine or a person chose it."""
    found = tables.precisions(models)
    if found:
        told = _of_each(found)
        by_rule = any("--mhmoe-precision auto" in line for model in models for line in _command(model))
        yield f"trained in: {told}" + (
            ", as --mhmoe-precision auto chose: bf16 where the machine of the training multiplies it itself, else fp32."
            if by_rule else "."
        )  # fmt: skip


def _device_notes(models: Sequence[Model]) -> Iterator[str]:
    """What the models were evaluated on, unless that is a CPU for all."""
    found = tables.devices(models)
    if set(found.values()) - {"cpu"}:
        yield f"evaluated on: {_of_each(found)}."


def _of_each(found: Mapping[str, str]) -> str:
    """The value of each model, or the one of all."""
    values = set(found.values())
    return f"all models {values.pop()}" if len(values) == 1 else ", ".join(" ".join(of) for of in found.items())


def _spent(models: Sequence[Model]) -> Iterator[str]:
    """Where the updates of models went whose trainings have parts."""
    for model in models:
        run = model.runs[0]
        if run.before:
            each = ", ".join(f"{updates:,} {part}" for part, updates in run.before.items())
            last = f"{run.log.num_updates:,} of what was made of these, whose speed and memory the table has"
            yield f"updates of {model.name}: {each}, {last}."


def _command(model: Model) -> list[str]:
    """The lines of the command that trained a model's first run, where it was kept."""
    file = model.runs[0].path / "command.sh"
    kept = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [line for line in kept if line.strip() and not line.startswith("#")]


def _commands(models: Sequence[Model]) -> str:
    """The command that trained each model's first run, where it was kept."""
    lines = []
    for model in models:
        if command := _command(model):
            lines += [f"# {model.name}, {model.runs[0].path.name}", *command]
    return "\n".join(["## Commands\n\n```bash", *lines, "```"]) if lines else ""


def _plots(models: Sequence[Model], split: str, columns: Sequence[tables.Column]) -> Iterator[Plot]:
    """All plots that the records and logs have values for."""
    wanted = {
        "valid_ppl": ("Validation perplexity", "perplexity"),
        "gate_loss": ("Balance loss in training (1 = uniform)", "balance loss"),
    }
    for part, name in tables.PART_NAMES.items():
        wanted[f"valid_{part}_ppl"] = f"Validation perplexity, masked {name}", "perplexity"
    for key, (title, label) in wanted.items():
        if curves := {model.name: curve for model in models if (curve := model.runs[0].curve(key))}:
            yield key.replace("_", "-"), draw_curves, curves, title, label
    yield from _metric_plots(models, split, columns)
    found = {model.name: record for model in models if (record := model.runs[0].expert_record(split)) is not None}
    if found:
        yield activation_plot("expert-activation", {name: record.expert_loads for name, record in found.items()})
    for name, record in found.items():
        yield from part_plots(f"routing-{name}", name, record)
    for tasks in evaluations(models).get("zero-shot", ()):
        of_tasks = {
            model.name: record.experts
            for model in models
            for record in model.runs[0].records
            if (record.what, record.split) == ("zero-shot", tasks) and record.experts is not None
        }
        if of_tasks:
            name, draw, maps, title, label = activation_plot(f"expert-activation-{tasks}", of_tasks)
            yield name, draw, maps, f"{title}, {tasks} tasks", label


def _scaling_plots(models: Sequence[Model], split: str, columns: Sequence[tables.Column]) -> Iterator[Plot]:
    """The main metrics over experts, of models that differ in nothing else and are three sizes or more."""
    families: dict[object, dict[int, Model]] = {}
    for model in models:
        if experts := tables.counts_of(model).get("experts"):
            families.setdefault(tables.all_but_experts(model), {})[experts] = model
    for column in columns:
        is_main = column.metric == tables.HEADLINES[column.what][0][1] and column.split == split
        if not (is_main or column.what == "zero-shot"):
            continue
        lines = {}
        for key, family in families.items():
            line = {size: values for size, model in sorted(family.items()) if (values := column.values(model))}
            if key and len(line) > 2:
                lines[family[min(line)].name] = line
        if lines:
            title = f"{column.title.capitalize()} by number of experts"
            yield f"experts {column.title}", draw_scaling, lines, title, ("experts", column.metric)


def _metric_plots(models: Sequence[Model], split: str, columns: Sequence[tables.Column]) -> Iterator[Plot]:
    """Every metric by language, modality or task, and the seeds of the main metrics."""
    for what, splits in evaluations(models).items():
        for name in splits:
            for metric, parts in tables.part_columns(models, what, name).items():
                values = {model.name: {part.title: part.values(model) for part in parts[:-1]} for model in models}
                title = f"{what.capitalize()} by part: {tables.SHORT.get(metric, metric)}, {name} split"
                yield f"{what} {metric} {name}", draw_bars, values, title, metric
    yield from _scaling_plots(models, split, columns)
    for column in columns:
        by_seed = {model.name: seeds for model in models if (seeds := column.values(model))}
        if column.split == split and any(len(seeds) > 1 for seeds in by_seed.values()):
            title = f"{column.title.capitalize()}: mean, standard deviation, seeds"
            yield f"seeds {column.title}", draw_seeds, by_seed, title, column.metric
