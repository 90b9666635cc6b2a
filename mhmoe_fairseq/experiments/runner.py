"""Does what a plan says: prepares data, trains, evaluates, follows up and reports; what is finished is kept."""

import concurrent.futures
import itertools
import math
import os
import queue
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..analysis.reports.runs import parse_record, read_training_log
from ..common.errors import UserError
from ..common.files import write_json
from ..common.locks import LOCK, exclusive_lock
from ..common.provenance import timestamp
from ..data.word_lists import read_word_lists
from ..data.xnli import read_xnli
from ..data.zero_shot_tasks import open_tasks
from .branches import require_domains
from .calls import Calls
from .plan import SEARCH, Plan, chosen_lr, read_search, with_starts
from .progress import Progress
from .run import STATE, Choice, Run
from .spec import Recipe
from .speeds import Speeds

# What fairseq raises for gradients that are no numbers, and in fp16 where no scale of the loss is small enough.
_DIVERGED = "FloatingPointError"
# Flags of commands that follow the trainings -> what reads their file or folder, and complains.
_READ_LATER: dict[str, Callable[[Path], object]] = {
    "--tasks-dir": lambda folder: open_tasks(folder, None),
    "--xnli-dir": lambda folder: read_xnli(folder, "validation"),
    "--polysemy": read_word_lists,
}


@dataclass
class Runner:
    """Works a plan off.

    Attributes:
        jobs: runs at the same time.
        threads: of every run; None: as many as the environment says.
        gpus: those that jobs share, each job having one.
        say: takes a line for the user.
    """

    plan: Plan
    say: Callable[[str], None]
    jobs: int = 1
    threads: int | None = None
    gpus: list[str] = field(default_factory=list)
    calls: Calls = field(default_factory=Calls)
    _own: threading.local = field(default_factory=threading.local)  # a job's GPU

    def work(self) -> None:
        """Prepares, searches, trains, evaluates, follows up, reports; before a ``UserError`` what runs is let end.

        Machine 0 keeps other runners out of the folder; the others of a training work with it.
        """
        with exclusive_lock(self.plan.out / LOCK, "--out") if self.plan.choice.is_first else nullcontext():
            self._work()

    def _work(self) -> None:
        if not self.plan.choice.on_cpu:
            self.gpus = find_gpus(self.plan.choice)
        self._prepare()
        self.plan = replace(self.plan, best_lrs=self._search())
        for runs in self.plan.stages():
            self._finish(runs)
        if self.plan.choice.is_first:
            self._follow_up()

    def _prepare(self) -> None:
        """Makes the data that are missing; what else is missing, later too, is told before hours of training."""
        plan = self.plan
        for words in plan.following():
            if words[1] == "zero-shot" and find_spec("lm_eval") is None:
                raise UserError(f'{plan.experiment.name} needs lm-eval: pip install "mhmoe-fairseq[lm-eval]"')
        for folder, words in plan.preparations():
            if _is_prepared(folder):
                continue
            if not words:
                raise UserError(missing_data(plan, folder))
            self._tell(f"{folder}: no data yet: {shlex.join(words)}")
            self.calls.run(words, self._variables(), lambda line: self.say(f"    {line}"))
        require_domains(plan.runs())
        for run in _once(plan.stages()):
            run.state()  # refuses folders of others and starts that are gone
        for words in plan.following():
            for flag, value in zip(words, words[1:]):
                if flag in _READ_LATER:
                    _READ_LATER[flag](Path(value))

    def _follow_up(self) -> None:
        for words in self.plan.following():
            if "--no-plots" in words:
                self._tell("no plots: matplotlib is not installed (extra plots)")
            self.say(shlex.join(words))
            self.calls.run(words, self._variables(), self.say)

    def _tell(self, line: str) -> None:
        self.say(f"[{time.strftime('%H:%M:%S')}] {line}")

    def _search(self) -> dict[str, str]:
        """The learning rate of every model, by the last validation loss."""
        losses: dict[str, dict[str, float | None]] = {}
        search = self.plan.search(losses)
        scales = {run.recipe.name_of(run.model): run.recipe.scales[self.plan.choice.scale] for run in search}
        if search and self.plan.choice.nnodes > 1:
            tried = ", ".join(dict.fromkeys(str(run.lr) for run in search))
            rule = f"must be one when --nnodes is {self.plan.choice.nnodes}: machine 0 alone would know the best"
            raise UserError(f"--lrs ({tried}) {rule}")
        while search:
            for together in with_starts(search):
                self._finish(together)
            for run in search:
                losses.setdefault(run.recipe.name_of(run.model), {})[str(run.lr)] = run.final_loss()
                for folder in (run.folder, *(part.folder for part in run.parts)):  # the loss alone is needed
                    for checkpoint in folder.glob("checkpoint*.pt"):
                        checkpoint.unlink()
            wider = self.plan.search(losses)
            search = [run for run in wider if str(run.lr) not in losses[run.recipe.name_of(run.model)]]
        best = {model: _best(model, of_lr, scales[model].search_margin) for model, of_lr in losses.items()}
        if best:
            kept = read_search(self.plan.out)  # other models' of experiments that share the folder
            new: dict[str, dict[str, Any]] = {"valid_loss_bits": losses, "best_lr": best}
            earlier, dates = kept.get("best_lr", {}), kept.get("date", {})
            known = {model: dates.get(model) for model in best if earlier.get(model) == best[model]}
            new["date"] = {model: known.get(model) or timestamp() for model in best}  # tests come later
            write_json(self.plan.out / SEARCH, {name: kept.get(name, {}) | values for name, values in new.items()})
            self._tell("learning rates: " + ", ".join(f"{model} {lr}" for model, lr in best.items()))
        return best

    def _finish(self, runs: list[Run]) -> None:
        """Trains and evaluates; a failure lets what is running end, and begins nothing more."""
        states = {run.name: run.state() for run in runs}
        for name, state in states.items():
            if state == "finished":
                self._tell(f"{name}: already finished")
        todo = [run for run in runs if states[run.name] != "finished"]
        speeds = Speeds.of(self.plan.out)
        hours = {run.name: speeds.hours(run) for run in todo}
        progress = Progress({run.name: run.updates for run in todo if states[run.name] != "trained"}, hours)
        if self.jobs > 1:  # the longest first, or a job would wait for it at the end; unknown: the last of a table
            todo = sorted(reversed(todo), key=lambda run: hours[run.name] or math.inf, reverse=True)
        free: queue.SimpleQueue[str] = queue.SimpleQueue()
        for gpu in itertools.islice(itertools.cycle(self.gpus), self.jobs):
            free.put(gpu)
        with concurrent.futures.ThreadPoolExecutor(self.jobs, initializer=self._take_gpu, initargs=(free,)) as pool:
            begun: list[concurrent.futures.Future[None]] = []
            try:
                for run in todo:
                    if len(busy := [job for job in begun if not job.done()]) == self.jobs:
                        concurrent.futures.wait(busy, return_when=concurrent.futures.FIRST_COMPLETED)
                    if any(job.done() and job.exception() for job in begun):
                        break
                    begun.append(pool.submit(self._finish_one, run, states[run.name], progress))
                concurrent.futures.wait(begun)
            except KeyboardInterrupt:
                self.calls.stop()
                raise
        errors = [error for job in begun if (error := job.exception())]
        for unexpected in (error for error in errors if not isinstance(error, UserError)):
            raise unexpected
        if errors:
            raise UserError("; ".join(map(str, errors)))

    def _take_gpu(self, free: "queue.SimpleQueue[str]") -> None:
        """Gives the thread of a job a GPU of its own; one job has them all."""
        if self.gpus and self.jobs > 1:
            self._own.gpu = free.get()

    def _variables(self) -> dict[str, str]:
        """Those of what this thread calls."""
        gpu = getattr(self._own, "gpu", None)
        threads = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        return threads if gpu is None else {**threads, "CUDA_VISIBLE_DEVICES": gpu}

    def _finish_one(self, run: Run, state: str, progress: Progress) -> None:
        if state not in ("trained", "finished"):
            self._train(run, state, progress)
        if not run.choice.is_first:
            return
        for names, words in run.evaluations(run.lacking()):
            output = run.folder / f"evaluation-{'-'.join(names)}.txt"
            output.unlink(missing_ok=True)
            self._call(run, f"evaluation on {' and '.join(names)}", words, lambda line: None, output)
        if run.splits:
            self._tell(f"{run.name}: evaluated on {' and '.join(run.measures())}")

    def _train(self, run: Run, state: str, progress: Progress) -> None:
        if not _is_prepared(run.data):
            raise UserError(missing_data(self.plan, run.data, run.recipe))
        if state == "changed":
            self._tell(f"{run.name}: command, data or start have changed, or its checkpoint is gone: starting afresh")
            if run.choice.is_first:
                _empty(run.folder)
        run.folder.mkdir(parents=True, exist_ok=True)
        if run.choice.is_first:
            run.keep(finished=False)
        self._tell(f"{run.name}: training, {run.updates} updates")
        node = "" if run.choice.is_first else f"-node{run.choice.node_rank}"
        output = run.folder / f"output{node}.txt"

        def show(line: str) -> None:
            record = parse_record(line)
            if "valid_ppl" in record:
                update, told = record["valid_num_updates"], f"validation perplexity {record['valid_ppl']:.2f}"
            elif {"loss", "wps", "num_updates"} <= set(record):
                update, told = record["num_updates"], f"loss {record['loss']:.3f} bits, {record['wps']:.0f} tokens/s"
            else:
                return
            left = progress.reach(run.name, int(update))
            self.say(f"    {run.name}, update {update:.0f}: {told}{left}")

        if any(part.has_diverged() for part in run.parts):
            self._give_up(run, "a part of it has")
            return
        *mixing, training = run.commands()
        for words in mixing if run.choice.is_first else ():
            self._call(run, "mixing", words, show, output)
        try:
            self._call(run, "training", training, show, output)
        except UserError as error:
            if not run.is_trial or _DIVERGED not in str(error):
                raise
            self._give_up(run, str(error.__cause__))
            return
        if run.choice.is_first:
            run.keep(finished=True)

    def _give_up(self, run: Run, why: str) -> None:
        self._tell(f"{run.name}: diverged ({why}): not the best")
        run.keep(finished=True, diverged=True)

    def _call(self, run: Run, what: str, words: list[str], on_line: Callable[[str], None], output: Path) -> None:
        try:
            self.calls.run(words, self._variables(), on_line, output)
        except UserError as error:
            raise UserError(f"{what} of {run.name} failed: {error} (see {output})") from error


def find_gpus(choice: Choice) -> list[str]:
    """Returns the GPUs' names for ``CUDA_VISIBLE_DEVICES``; ``UserError`` if there is none.

    fairseq would train on the CPU then, without a word.
    """
    import torch  # here, because nothing else needs it

    if not torch.cuda.is_available():
        given = f"--device {choice.device}" if choice.device else f"--scale {choice.scale}"
        raise UserError(f"{given} needs a CUDA GPU, and PyTorch finds none here (mhmoe doctor): give --device cpu")
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",") if chosen else [str(index) for index in range(torch.cuda.device_count())]


def _is_prepared(data: Path) -> bool:
    return (data / "manifest.json").is_file() or (data / "dict.txt").is_file()


def missing_data(plan: Plan, data: Path, recipe: Recipe | None = None) -> str:
    """Returns what to say of a folder without prepared data: which command makes them, at paper scale of the user's."""
    recipes = [recipe] if recipe else [stage.recipe for stage in plan.experiment.stages]
    recipe = next(of for of in recipes if plan.data_of(of) == data)
    kind = (recipe.prepare.split() or [recipe.name])[0]
    maker = f"mhmoe prepare {kind} --dest {data} ..., of your own data (mhmoe prepare {kind} --help)"
    return f"--data ({data}) holds no prepared data for {plan.experiment.name}: make them with {maker}"


def _best(model: str, losses: Mapping[str, float | None], margin: float) -> str:
    """The learning rate that the losses choose; ``UserError`` if there is none."""
    best = chosen_lr(losses, margin)
    if best is None:
        raise UserError(f"--lrs ({' '.join(losses)}): with none of them {model} has a finite validation loss")
    return best


def _empty(folder: Path) -> None:
    """Deletes what is in a run's folder, unless another run is writing there; cut off, it is done again."""
    with exclusive_lock(folder / LOCK, "--out"):
        write_json(folder / STATE, {"finished": False})
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (LOCK, STATE):
                path.unlink()


def dry_run(plan: Plan) -> Iterator[str]:
    """Yields what would be called, a line each; remarks begin with ``#``."""
    yield from (shlex.join(words) for _, words in plan.preparations() if words)
    search = _once(with_starts(plan.search()))
    yield from _commands(search)
    if search:
        further = "" if plan.experiment.lrs else "; where it is at the edge, further ones are tried"
        yield f"# below, --lr is the best of these for each model on the validation split{further}"
    for run in _once(plan.stages()):
        yield from _commands([run])
        yield from (shlex.join(words) for _, words in run.evaluations(run.measures()))
    yield from map(shlex.join, replace(plan, xnli=plan.xnli or "XNLI").following())


def _commands(runs: Iterable[Run]) -> Iterator[str]:
    return (shlex.join(words) for run in runs for words in run.commands())


def _once(stages: Iterable[list[Run]]) -> list[Run]:
    """Each run once: while nothing runs, a start that is missing is missing for every stage."""
    runs: dict[Path, Run] = {}
    for run in itertools.chain.from_iterable(stages):
        runs.setdefault(run.folder, run)
    return list(runs.values())


def describe(plan: Plan) -> Iterator[list[str]]:
    """Yields a row for each run, those of the search first: its name, its state, the updates that it has done."""
    for run in _once([*with_starts(plan.search()), *plan.stages()]):
        state, log = run.state(), run.folder / "train.log"
        done = read_training_log(log).num_updates if state != "missing" and log.is_file() else 0
        yield [run.name, state, f"{done} of {run.updates}"]
