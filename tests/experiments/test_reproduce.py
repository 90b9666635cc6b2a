"""``mhmoe reproduce`` on toy data, for real: from prepared data to the report, in each of the three domains."""

import itertools
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import pytest
from console import run_console
from fairseq.data.data_utils import load_indexed_dataset
from image_text_data import IMG_SIZE, PATCH_SIZE, prepare_shapes
from labelled import prepare, write_jsonl
from multilingual_data import LANGUAGES, documents_of
from zero_shot_questions import write_tasks_folder

from mhmoe_fairseq.analysis.reports.claims import NOT_RUN, judge
from mhmoe_fairseq.analysis.reports.runs import read_model
from mhmoe_fairseq.commands.main import main as mhmoe
from mhmoe_fairseq.common.files import write_json
from mhmoe_fairseq.data.domains import write_domains
from mhmoe_fairseq.evaluation.records import read_record
from mhmoe_fairseq.experiments import EXPERIMENTS
from mhmoe_fairseq.experiments.calls import Calls
from mhmoe_fairseq.experiments.kept import kept_runs
from mhmoe_fairseq.experiments.language_models import MULTILINGUAL
from mhmoe_fairseq.experiments.models import MODELS
from mhmoe_fairseq.experiments.spec import Experiment, Stage, parse_flags
from mhmoe_fairseq.models.precision import resolve
from mhmoe_fairseq.prepare.sources.mix import DOMAINS

TOY = ("--updates", "2", "--validations", "1")
DEVICE = ("--device", os.environ.get("MHMOE_TEST_DEVICE", "cpu"))


def reproduce(name: str, data: Path, out: Path, *words: str) -> None:
    assert mhmoe(["reproduce", name, "--data", str(data), "--out", str(out), *TOY, *words]) == 0


def test_from_text_to_a_report_which_ends_with_the_papers_table(trained_model, tmp_path: Path, capsys) -> None:
    reproduce("demo", trained_model.data, tmp_path, "--models", "mhmoe-flops", "xmoe", "--jobs", "2")
    said = capsys.readouterr().out
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    for model in ("xmoe", "mhmoe-flops"):
        assert f"{model}/seed-1, update 2: validation perplexity" in said and f"| {model} " in report
        record = read_record(tmp_path / model / "seed-1" / "record-test.json")
        assert record.provenance["precision"] == resolve("auto", "cpu")
        assert record.experts is not None and f"{record.main.value:.2f}" in report
    assert "14.82" in report.split("## ")[-1]
    assert f"- trained in: all models {resolve('auto', 'cpu')}, as --mhmoe-precision auto chose" in report
    reproduce("demo", trained_model.data, tmp_path, "--models", "xmoe")
    assert "xmoe/seed-1: already finished" in capsys.readouterr().out


class Toys:
    """What every experiment needs, made when the first asks for it: a folder of data by task, XNLI's files."""

    def __init__(self, root: Path, english: Path) -> None:
        self.root, self.english = root, english

    def data(self, task: str) -> Path:
        """Prepared data of a task."""
        return getattr(self, task.removeprefix("mhmoe_"), self.images)

    @cached_property
    def language_modeling(self) -> Path:
        """English whose documents are of the mixed corpus's domains by turns."""
        data = self.root / "english"
        shutil.copytree(self.english, data)
        splits = {split: load_indexed_dataset(str(data / split)) for split in ("train", "valid", "test")}
        documents = {split: (of.sizes == 1).sum() + 1 for split, of in splits.items()}
        turns = {split: [*itertools.islice(itertools.cycle(DOMAINS), number)] for split, number in documents.items()}
        write_domains(data / "domains.json", turns)
        for name, kind in itertools.product(DOMAINS, ("bin", "idx")):
            shutil.copyfile(data / f"valid.{kind}", data / f"valid_{name}.{kind}")
        return data

    @cached_property
    def images(self) -> Path:
        return prepare_shapes(self.root / "images")

    @cached_property
    def multilingual_language_modeling(self) -> Path:
        text, data = self.root / "text", self.root / MULTILINGUAL.data  # where fine-tuning looks for its start's
        text.mkdir()
        for language in LANGUAGES:
            numbers = itertools.count(1)  # so that no line is there twice
            documents = ["\n".join(f"{next(numbers)}. {line}" for line in of) for of in documents_of(language, 300, 1)]
            (text / f"{language}.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
        words = ["--source", "text", text, "--dest", data, "--langs", ",".join(LANGUAGES), "--vocab-size", 600]
        fractions = ["--valid-fraction", 0.2, "--test-fraction", 0.2]
        assert mhmoe(["prepare", "multilingual", *map(str, (*words, *fractions))]) == 0
        return data

    @cached_property
    def sentence_classification(self) -> Path:
        files: dict[str, list[str]] = {}
        for split, language, seed in (("train", "en", 3), ("valid", "en", 4), ("test", "de", 5), ("test", "en", 6)):
            lines = ["1", "22", *(document[0] for document in documents_of(language, 12, seed))]
            rows = [{"text": line, "label": ("even", "odd")[len(line) % 2]} for line in lines]
            file = write_jsonl(self.root / f"labelled-{split}-{language}.jsonl", rows)
            files.setdefault(f"--{split}", []).append(f"{language}={file}")
        given = [word for flag, of in files.items() for word in (flag, *of)]
        data = ["--data", self.multilingual_language_modeling, "--dest", self.root / "labelled"]
        assert prepare(*given, "--text-fields", "text", *data) == 0
        return self.root / "labelled"

    @cached_property
    def words(self) -> Path:
        """A folder as ``mhmoe prepare words`` makes it, with words of the toy text."""
        folder = self.root / "data" / "words"
        polysemous, control = "river farmer teacher near behind along".split(), "winter market doctor under the".split()
        write_json(folder / "words.json", {"polysemous": polysemous, "control": control})
        write_json(folder / "manifest.json", {})
        write_tasks_folder(self.root / "data" / "zero-shot")
        return folder

    @cached_property
    def xnli(self) -> Path:
        folder = self.root / "xnli"
        folder.mkdir()
        for language in ("de", "en"):
            premise, hypothesis = (documents_of(language, 1, seed)[0][0] for seed in (8, 9))
            rows = [{"premise": premise, "hypothesis": hypothesis, "label": label} for label in (0, 1, 2)]
            write_jsonl(folder / f"{language}.jsonl", rows)
        return folder


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory, trained_model) -> Iterator[Toys]:
    root = tmp_path_factory.mktemp("toys")
    yield Toys(root, trained_model.data)
    shutil.rmtree(root)  # 256 experts take room


# Other models' trainings differ in nothing that these do not show; the start of a fine-tuning is trained in its place.
SMALL = ["--no-save-optimizer-state", "--no-last-checkpoints", "--batch-size", "2"]
SMALL_OF = {
    "lm": ["--tokens-per-sample", "64"],
    "beit3": ["--img-size", str(IMG_SIZE), "--patch-size", str(PATCH_SIZE)],
}
# The last words of a paper's table, of each experiment that has something to show beside the report.
SHOWN = {"table4": ["CIDEr", "neither VQAv2 nor NLVR2"], "table3": ["40.1"], "table1-multilingual": LANGUAGES}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, of in EXPERIMENTS.items() if not of.parts])
def test_every_experiment_runs_from_data_to_its_report(name: str, toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = EXPERIMENTS[name]
    if any("--vllm" in command for command in experiment.after):
        if "MHMOE_VLLM" not in os.environ:
            pytest.skip("needs vLLM, in an environment of its own: make test-vllm")
        experiment = replace(experiment, after=tuple(_with_vllm(command) for command in experiment.after))
        monkeypatch.setitem(EXPERIMENTS, name, experiment)
    if any("zero-shot" in command for command in experiment.after) and find_spec("lm_eval") is None:
        experiment = replace(  # trained all the same; the rest needs lm-eval (extra lm-eval)
            experiment,
            after=(),
            measures=(),
            claims=tuple(claim for claim in experiment.claims if claim.what != "zero-shot"),
        )
        monkeypatch.setitem(EXPERIMENTS, name, experiment)

    def call(calls, words, variables, on_line, output=None) -> None:
        if words[0] == "mhmoe":
            assert mhmoe(words[1:]) == 0
        else:
            run_console(*words, cwd=toys.root)

    monkeypatch.setattr(Calls, "run", call)
    monkeypatch.chdir(toys.root)
    out, words = toys.root / experiment.folder, ["--seeds", "1"]
    if experiment.stages:
        recipe = experiment.stages[0].recipe
        words += ["--data", str(toys.data(parse_flags(recipe.flags)["--task"][0])), "--lrs", "1e-3"]
        branches = any(MODELS[model].branches for model in experiment.models)  # of 20 updates each has one
        words += ["--updates", "20" if branches else "2"]
        words += ["--validations", "2"]  # two checkpoints for the figures over a training
        words += ["--xnli", str(toys.xnli)] if any("{xnli}" in command for command in experiment.after) else []
        if experiment.needs:
            assert toys.words.is_dir()
        words += ["--", *SMALL, *SMALL_OF[recipe.family]]
    assert mhmoe(["reproduce", name, "--out", str(out), *DEVICE, *words]) == 0
    runs = [out / stage.recipe.name_of(model) / "seed-1" for stage, model in trained(experiment)]
    for run in runs:
        assert {record.split for record in map(read_record, run.glob("record-*.json"))} >= {"valid", "test"}
    measured = [[out / of] if "/" in of else [run / of for run in runs] for of in experiment.measures]
    assert all(file.is_file() for each in measured for file in each)
    models = {model: read_model(model, folders) for model, folders in kept_runs(experiment, toys.root).items()}
    claims = [  # of what is trained at this scale; after two updates CIDEr is 0, and no reference
        claim for claim in experiment.claims
        if claim.metric != "CIDEr" and {claim.model, claim.reference} <= {*experiment.models}
    ]  # fmt: skip
    assert claims or not experiment.claims
    assert NOT_RUN not in [judge(claim, models).verdict for claim in claims]
    if experiment.paper is not None:
        report = (out / experiment.report).read_text(encoding="utf-8")
        paper = report.split("## ")[-1]
        assert all(word in report for word in SHOWN.get(name, ()))
        assert all(f"| {model}, ours" in paper for model in experiment.models if model in experiment.paper.values)


def _with_vllm(command: str) -> str:
    """The command with this machine's vLLM in place of the repository's."""
    before, _, after = command.partition("--vllm ")
    return f"{before}--vllm {os.environ['MHMOE_VLLM']} {after.partition(' ')[2]}"


def trained(experiment: Experiment) -> Iterator[tuple[Stage, str]]:
    """Every stage with each of its models."""
    for stage in experiment.stages:
        yield from ((stage, model) for model in experiment.models if any(fnmatch(model, of) for of in stage.models))
