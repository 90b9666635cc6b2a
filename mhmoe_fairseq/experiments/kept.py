"""The tree of results: finished runs of experiments, copied without checkpoints and without this machine's paths.

``results/FOLDER/[TASK/]MODEL/seed-N`` holds what :mod:`mhmoe_fairseq.analysis.reports.runs` reads, a few kilobytes:
records, the training log's numbers, the command and ``run.json``; ``results/FOLDER/search.json`` the learning rates
tried.
"""

import dataclasses
import json
import re
import shlex
import shutil
import socket
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..analysis.reports.runs import BEFORE, TrainingLog, read_model, read_training_log, require_one_data
from ..analysis.reports.tables import COMPARED_SETTINGS
from ..common.errors import UserError
from ..common.files import atomic_folder, atomic_open, read_json, write_json
from ..common.locks import LOCK, exclusive_lock
from ..evaluation.records import SCHEMA, Record, read_record
from .plan import SEARCH, Plan, read_search
from .run import PACKAGE, STATE, Choice, Run
from .spec import Experiment, Flags, flags_of

TREE = Path("results")
CHOICE = "choice"  # in run.json: flags of mhmoe reproduce
_RECORDS = ("record-*.json", "routing-*.json")
_LOG_KEYS = ("num_updates", "loss", "gate_loss", "moe_choices", "wps", "wpb", "wall", "peak_gb")
_OF_ONE_RUN = ("--seed", "--save-dir", "--log-file", "--finetune-from-model")
_ABSOLUTE = re.compile(r"(?<![\w./!~-])(?:~[\w.-]*|\.\.)?/(?:[^\s/'\":,;]+/)*([^\s/'\":,;]+)/?")
_QUOTED = re.compile(r"(?<=')(?:~[\w.-]*|\.\.)?/(?:[^'/]+/)*([^'/]+)/?(?=')")  # as a shell's line has one with spaces
_FILE_URI = re.compile(r"\bfile:(?://[\w.-]*)?(?=/)")
_NUMBERS = re.compile(r"\[\n\s+([^][{}]*?)\n\s*\]")


def keep(plan: Plan, tree: Path) -> list[Path]:
    """Copies the runs of a finished experiment into the tree, each under a temporary name first; returns their folders.

    Raises:
        UserError: naming the first run that is unfinished, half-written, of another length, scale or other data than
            what is kept, trained otherwise than a kept seed, with fewer records or some of another checkpoint, or
            tested before its learning rate was chosen; or another command that is writing there. Then nothing was
            copied.
    """
    runs = plan.runs()
    if not runs:
        raise UserError(f"{plan.experiment.name} has no runs of its own to keep")
    with exclusive_lock(tree / LOCK, "--results"):  # what is added to in the tree is read before
        return _keep(plan, runs, tree)


def _keep(plan: Plan, runs: list[Run], tree: Path) -> list[Path]:
    search = read_search(plan.out)
    for run in runs:
        _require_whole(plan, run, search)
        _require_one_checkpoint(run)
        _require_one_choice(plan, _folder(plan, run, tree))
        _require_no_loss(run.folder, _folder(plan, run, tree), *_RECORDS)
    others = [name for name in others_of(plan.experiment) if any((plan.out / name).glob("*.json"))]
    for name in others_of(plan.experiment):
        _require_no_loss(plan.out / name, tree / plan.experiment.folder / name, "*.json")
        for file in (plan.out / name).glob("*.json"):
            read_json(file)
    for task, together in _by_task(runs).items():
        replaced = {_folder(plan, run, tree) for run in together}
        kept = (tree / plan.experiment.folder / task).glob("*/seed-*")
        _require_one_recipe(plan, together, tree)
        _require_same_data([*(run.folder for run in together), *sorted({*kept} - replaced)])
    folders = [_copy(plan, run, _folder(plan, run, tree)) for run in runs]
    folders += [_copy_others(plan, runs[0], name, tree) for name in others]
    _keep_search(search, {run.recipe.name_of(run.model) for run in runs}, tree / plan.experiment.folder)
    return folders


def _folder(plan: Plan, run: Run, tree: Path) -> Path:
    return tree / plan.experiment.folder / run.name


def _by_task(runs: Iterable[Run]) -> dict[str, list[Run]]:
    tasks: dict[str, list[Run]] = {}
    for run in runs:
        tasks.setdefault(run.recipe.name, []).append(run)
    return tasks


def _require_whole(plan: Plan, run: Run, search: dict[str, Any]) -> None:
    """Checks that a run is all that its plan says, and that its test set came after the choice of the learning rate."""
    state = run.state()
    if state != "finished":
        reason = {
            "changed": "was trained with other flags, data or start than this command has",
            "trained": "lacks a whole record of a split",
        }.get(state, f"is {state}")
        raise UserError(f"--keep: {run.name} in {plan.out} {reason}: finish it with mhmoe reproduce first")
    updates = read_training_log(run.folder / "train.log").num_updates
    if updates != run.updates:
        raise UserError(f"--keep: {run.name} logged {updates} updates, but {plan.experiment.name} takes {run.updates}")
    if problem := too_early(read_record(run.record("test")), run.recipe.name_of(run.model), search):
        raise UserError(f"--keep: {run.name} {problem}")


def too_early(test: Record, name: str, search: dict[str, Any]) -> str | None:
    """Returns what to say of a record from before the search chose its model's learning rate; None of a later one."""
    chosen, tested = search.get("date", {}).get(name), test.provenance.get("date")
    if not chosen or not tested or tested >= chosen:
        return None
    return f"was tested ({tested}) before its learning rate was chosen ({chosen}): tests come last"


def _require_one_checkpoint(run: Run) -> None:
    """Checks that all records of a run are of the checkpoint that was tested."""
    tested = read_record(run.record("test")).checkpoint.get("sha256")
    for file in _files(run.folder, *_RECORDS):
        if read_record(file).checkpoint.get("sha256") != tested:
            raise UserError(f"--keep: {file} is of another checkpoint than record-test.json: measure it again")


def _require_one_choice(plan: Plan, target: Path) -> None:
    """Checks that what is kept of a run is of the same scale."""
    if not (target / STATE).is_file():
        return
    kept, new = read_json(target / STATE).get(CHOICE, ""), chosen(plan.choice)
    if kept != new:
        raise UserError(f"--keep: {target} was trained with {kept or 'no flags'}, this with {new or 'none'}: remove it")


def _require_no_loss(folder: Path, target: Path, *patterns: str) -> None:
    """Checks that what is kept has no file of these that the folder lacks."""
    if lost := [file.name for file in _files(target, *patterns) if not (folder / file.name).is_file()]:
        raise UserError(
            f"--keep: {target} has {', '.join(lost)}, which {folder} lacks: measure that too, or remove it there"
        )


def _files(folder: Path, *patterns: str) -> list[Path]:
    return sorted(file for pattern in patterns for file in folder.glob(pattern))


def _require_one_recipe(plan: Plan, runs: Sequence[Run], tree: Path) -> None:
    """Checks that the seeds of a model that stay in the tree were trained as the new ones."""
    replaced = {_folder(plan, run, tree) for run in runs}
    for run in runs:
        for kept in sorted({*_folder(plan, run, tree).parent.glob("seed-*")} - replaced):
            if not (kept / STATE).is_file():
                continue
            before, now = _recipe(read_json(kept / STATE)), _recipe(_cleaner(plan, run)(read_json(run.folder / STATE)))
            if differing := [flag for flag in {**before, **now} if before.get(flag) != now.get(flag)]:
                raise UserError(
                    f"--keep: {kept} was trained with another {', '.join(differing)} than {run.name}: keep that seed "
                    "anew, too, or remove it"
                )


def _recipe(state: dict[str, Any]) -> Flags:
    """The flags of a run's training, but for its seed and its paths."""
    return {flag: value for flag, value in flags_of(state["command"]).items() if flag not in _OF_ONE_RUN}


def _require_same_data(folders: Sequence[Path]) -> None:
    """Checks that runs of one task, new ones and what the tree has beside them, were evaluated on the same data."""
    require_one_data([read_model(folder.parent.name, [folder]) for folder in folders], None)


def _copy(plan: Plan, run: Run, target: Path) -> Path:
    """Writes the run's files beside ``target`` and moves them there, in place of an earlier copy."""
    clean = _cleaner(plan, run)
    with atomic_folder(target) as made:
        for file in _files(run.folder, *_RECORDS):
            _write_compact(made / file.name, clean(slim(read_record(file))))
        write_log(made / "train.log", read_training_log(run.folder / "train.log"))
        if (run.folder / BEFORE).is_file():
            shutil.copyfile(run.folder / BEFORE, made / BEFORE)
        (made / "command.sh").write_text(clean((run.folder / "command.sh").read_text("utf-8")), "utf-8")
        _write_compact(made / STATE, clean({**read_json(run.folder / STATE), CHOICE: chosen(plan.choice)}))
    return target


def chosen(choice: Choice) -> str:
    """Returns the flags of ``mhmoe reproduce`` that train so, behind the experiment's name."""
    words = [] if choice.scale == "cpu" else ["--scale", choice.scale]
    words += [] if choice.device is None else ["--device", choice.device]
    words += [] if choice.size is None else ["--size", choice.size]
    flags = [word for flag, value in choice.flags.items() for word in (flag, *value)]
    return shlex.join([*words, *(["--", *flags] if flags else [])])


def others_of(experiment: Experiment) -> list[str]:
    """Returns the folders beside the runs that hold what the experiment's commands measure."""
    return list(dict.fromkeys(name.split("/")[0] for name in experiment.measures if "/" in name))


def unmeasured(plan: Plan) -> list[Path]:
    """Returns the files that the experiment's commands after the trainings are to write, and that are not there."""
    folders = [run.folder for run in plan.runs()]
    files = [
        path for name in plan.experiment.measures
        for path in ([plan.out / name] if "/" in name else [folder / name for folder in folders])
    ]  # fmt: skip
    return [file for file in files if not file.is_file()]


def _copy_others(plan: Plan, run: Run, name: str, tree: Path) -> Path:
    """Copies what a command wrote beside the runs: JSON and plots."""
    target, clean = tree / plan.experiment.folder / name, _cleaner(plan, run)
    with atomic_folder(target) as made:
        for file in sorted((plan.out / name).glob("*")):
            if file.suffix == ".json":
                _write_compact(made / file.name, clean(read_json(file)))
            elif file.suffix == ".png":
                shutil.copyfile(file, made / file.name)
    return target


def _keep_search(search: dict[str, Any], names: set[str], folder: Path) -> None:
    """Adds what was found for these models to what is kept of other models."""
    found = {key: {name: of for name, of in by_name.items() if name in names} for key, by_name in search.items()}
    if any(found.values()):
        kept = read_search(folder)
        write_json(folder / SEARCH, {key: {**kept.get(key, {}), **by_name} for key, by_name in found.items()})


def slim(record: Record) -> dict[str, Any]:
    """Returns a record's fields without the settings that no report reads, empty fields and decimals of whole loads."""
    kept = dataclasses.asdict(record)
    settings = record.model.get("settings", {})
    kept["model"]["settings"] = {
        section: {name: settings[section][name] for name in names if name in settings[section]}
        for section, names in COMPARED_SETTINGS.items()
        if isinstance(settings.get(section), dict)
    }
    if isinstance(options := settings.get("model"), dict):
        kept["model"]["settings"]["model"] = {name: value for name, value in options.items() if value is not None}
    for metrics in (kept["metrics"], *kept["parts"].values()):
        for name, metric in metrics.items():
            metrics[name] = {field: value for field, value in metric.items() if value not in (None, {})}
    for row in (kept["experts"] or {}).get("layers", ()):
        row["loads"] = [int(load) if float(load).is_integer() else load for load in row["loads"]]
    return {"schema": SCHEMA, **kept}


def write_log(path: Path, log: TrainingLog) -> None:
    """Writes the numbers that curves, speeds and lengths are read from, a line for each interval and validation."""
    inner = [{key: record[key] for key in _LOG_KEYS if key in record} for record in log.inner]
    wanted = re.compile(r"valid_(\w+_)?(loss|ppl|num_updates|accuracy|gate_loss)")
    valid = [{key: value for key, value in record.items() if wanted.fullmatch(key)} for record in log.valid]
    path.write_text("".join(json.dumps(record) + "\n" for record in (*inner, *valid)), encoding="utf-8")


def _write_compact(path: Path, value: Any) -> None:
    """Writes JSON with lists of numbers and words on one line each."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    text = _NUMBERS.sub(lambda found: "[" + re.sub(r"\n\s*", " ", found[1]) + "]", text)
    with atomic_open(path) as stream:
        stream.write(f"{text}\n".encode())


def _cleaner(plan: Plan, run: Run) -> Callable[[Any], Any]:
    """Returns a function that takes this machine out of texts and JSON: folders become the plan's defaults.

    Of any other path the last name stays, of names of machines ``HOST``.
    """
    names = {
        str(plan.out): f"outputs/{plan.experiment.folder}",
        str(plan.out.resolve()): f"outputs/{plan.experiment.folder}",
        str(run.data): run.recipe.data,
        str(run.data.resolve()): run.recipe.data,
        str(PACKAGE): "mhmoe_fairseq",
    }
    hosts = [_host(name) for name in {socket.gethostname(), plan.choice.master_addr} - {None, "", "localhost"}]

    def of_text(text: str) -> str:
        text = _FILE_URI.sub("", text)
        for folder in sorted(names, key=len, reverse=True):
            text = re.sub(rf"(?<![\w./-]){re.escape(folder)}(?![\w.-])", names[folder], text)
        for host in hosts:
            text = host.sub(r"\1HOST", text)
        if text.startswith("/") and not re.search(r"\s[/-]|\n", text):  # one path, spaces and all
            return Path(text).name
        return _ABSOLUTE.sub(r"\1", _QUOTED.sub(r"\1", text))

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return of_text(value)
        if isinstance(value, list):
            return [clean(item) for item in value]
        if not isinstance(value, dict):
            return value
        keys = [of_text(key) for key in value]
        told = [key if keys.count(key) == 1 else f"{key} ({at})" for at, key in enumerate(keys, start=1)]
        return {key: clean(item) for key, item in zip(told, value.values())}

    return clean


def _host(name: str | None) -> re.Pattern[str]:
    """Returns a pattern of a machine's name; one that may be any word is taken for it only where an address stands."""
    before = r"(^|://|@|[^\w./-])" if re.search(r"[\d.-]", str(name)) else r"(://|@|addr[ =])"
    return re.compile(rf"{before}{re.escape(str(name))}(?:\.[\w-]+)*(?![\w-])")


def kept_runs(experiment: Experiment, tree: Path) -> dict[str, list[Path]]:
    """Model -> the folders of its runs in the tree that are the experiment's, in the order of its models."""
    names = dict.fromkeys([*experiment.models, *experiment.paper_models])
    found: dict[str, list[Path]] = {}
    for stage in experiment.stages:
        for model in names:
            if any(fnmatch(model, pattern) for pattern in stage.models):
                folders = (tree / experiment.folder / stage.recipe.name_of(model)).glob("seed-*")
                found.setdefault(model, []).extend(sorted(folders, key=lambda path: int(path.name[5:])))
    return {model: folders for model, folders in found.items() if folders}
