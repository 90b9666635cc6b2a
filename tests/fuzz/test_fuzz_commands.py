"""Odd values for every option of every ``mhmoe`` command: one line that names the option and the rule, or success."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from forked import Outcome, run_forked
from invocations import (
    Call,
    further_calls,
    trained_calls,
    untrained_calls,
    write_trained_fixtures,
    write_untrained_fixtures,
)
from options import NEVER, Option, furnish, leaves, options_of

from mhmoe_fairseq.commands.main import COMMANDS, build_parser

SEED, QUICK = 14, 40
# Right by themselves, but not beside other options of the call: those are what the line names.
CLASHES = {
    "--tokenizer-lines": "--vocab-size",
    "--no-derived": "--vocab-size",
    "--aggregate": "MODEL/seed-N",
    "--prompts-file": "--max-len-b",
    "--experts": "--moe-expert-count",
    "--ep": "--ranks",
    "--layers": "--decoder-layers",
    "--embed-dim": "--decoder-embed-dim",
    "--ffn-dim": "--moe-ffn-dim",
    "--decoder-ffn-embed-dim": "--moe-ffn-dim",
    "--document-separator": "its training part",
    "--max-patches": "--vocab-size",
    "--diversity": "pair.valid.jsonl",
    "--image": "mhmoe_captioning",
}
# Another program's command line, and what has no valid call without a download.
FOREIGN = {("zero-shot", "lm-eval"), ("prepare", "zero-shot")}


@dataclass(frozen=True)
class Case:
    """A call of a command with one odd value."""

    command: tuple[str, ...]
    option: Option
    value: str | None
    words: tuple[str, ...]

    def problems(self, outcome: Outcome) -> list[str]:
        """What is wrong with how it ended."""
        problems = [f"changed {path}" for path in outcome.harmed]
        is_wrong = self.value in NEVER.get(self.option.kind, ())  # as the command line alone shows
        if outcome.status == 0:
            return [*problems, "was accepted"] if is_wrong else problems
        lines = [line for line in outcome.err.splitlines() if line and not line.startswith("WARNING:")]
        if outcome.status != 2:
            problems.append(f"ended with status {outcome.status}")
        if len(lines) != 1 or not lines[0].startswith(f"mhmoe {self.command[0]}: error: "):
            problems.append("said more, or less, than one line")
        elif not any(name in lines[0] for name in self._names()):
            problems.append("does not name the option")
        if is_wrong and outcome.out:
            problems.append("worked before it refused")
        # A preparation that finds something in the data keeps its finished stages, to go on from there.
        kept = ("dest", "dest/.") if self.command[0] == "prepare" and not is_wrong else ()
        return problems + [
            f"left {path}" for path in outcome.left if path not in kept[:1] and not path.startswith(kept[1:])
        ]

    def _names(self) -> tuple[str, ...]:
        """What the line may call it by; who needs an optional package asks for it first."""
        given = (self.value,) if self.option.kind not in ("whole", "real") and self.value else ()
        clash = (CLASHES[self.option.name],) if self.option.name in CLASHES else ()
        return (*self.option.shown, *given, *clash, "is not installed")


def cases(calls: Iterable[tuple[tuple[str, ...], Call]], given_alone: bool = False) -> list[Case]:
    """Every odd value of every option of the commands; ``given_alone``: of the options that their calls give."""
    found = []
    for command, call in calls:
        for option in options_of(dict(leaves(build_parser(command[0])))[command]):
            if not given_alone or option.name in call:
                found += [Case(command, option, of, words_of(command, call, option, of)) for of in option.values]
    return found


def words_of(command: tuple[str, ...], call: Call, option: Option, value: str | None) -> tuple[str, ...]:
    """The call with the option's value in place of its own."""
    kept = {name: words for name, words in call.items() if name not in option.excludes and name != option.name}
    words = [*command]
    for name, given in kept.items():
        if name.startswith("-"):
            words += [name, *given]
    positional = [word for name, given in call.items() if not name.startswith("-")
                  for word in ([value] if name == option.name else given)]  # fmt: skip
    if option.is_flag:
        words.append(option.name if value is None else f"{option.name}={value}")
    if command == ("reproduce",):  # what stands behind -- are flags of fairseq-train
        return (*command, *positional, *words[len(command) :])
    return (*words, *(["--"] if positional else []), *positional)


def check(found: list[Case], fixtures: Path, work: Path) -> None:
    """Run the cases; fail with all that is wrong."""
    outcomes = run_forked("mhmoe_fairseq.commands.main:main", [case.words for case in found], fixtures, work, furnish)
    wrong = [
        f"mhmoe {' '.join(map(repr, case.words))}\n    {'; '.join(problems)}\n    {outcome.err.strip()[-600:]}"
        for case, outcome in zip(found, outcomes)
        if (problems := case.problems(outcome))
    ]
    assert not wrong, f"{len(wrong)} of {len(found)} cases\n" + "\n".join(wrong)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of fixtures that need no training."""
    root = tmp_path_factory.mktemp("fuzz") / "fixtures"
    write_untrained_fixtures(root)
    return root


@pytest.fixture(scope="module")
def trained(untrained: Path) -> Path:
    """The same with models."""
    write_trained_fixtures(untrained)
    return untrained


def test_every_command_has_a_call() -> None:
    known = {*untrained_calls(Path()), *trained_calls(Path()), *FOREIGN}
    commands = [command for name in COMMANDS for command, _ in leaves(build_parser(name)) if command[0] == name]
    assert set(commands) == known


def test_some_odd_values_of_commands_that_need_no_model(untrained: Path, tmp_path: Path) -> None:
    some = random.Random(SEED).sample(cases(untrained_calls(untrained).items()), QUICK)
    check(some, untrained, tmp_path / "work")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["untrained", "trained", "further"])
def test_every_odd_value_of_every_option(kind: str, trained: Path, tmp_path: Path) -> None:
    found = {
        "untrained": lambda: cases(untrained_calls(trained).items()),
        "trained": lambda: cases(trained_calls(trained).items()),
        "further": lambda: cases(further_calls(trained), given_alone=True),
    }[kind]()
    check(found, trained, tmp_path / "work")


@pytest.mark.slow
def test_the_calls_are_right(trained: Path, tmp_path: Path) -> None:
    """Otherwise every odd value would be refused for another's sake."""
    nothing = Option("", "switch", ())
    calls = [*untrained_calls(trained).items(), *trained_calls(trained).items(), *further_calls(trained)]
    words = [tuple(word for word in words_of(command, call, nothing, None) if word) for command, call in calls]
    outcomes = run_forked("mhmoe_fairseq.commands.main:main", words, trained, tmp_path / "work", furnish)
    for call, outcome in zip(words, outcomes):
        assert outcome.status == 0 or "is not installed" in outcome.err, f"{call}\n{outcome.err}"
        assert not outcome.harmed
