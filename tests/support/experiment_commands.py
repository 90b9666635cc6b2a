"""The commands of ``mhmoe reproduce``, as a dry run prints them."""

import functools
import shlex
from pathlib import Path

from fairseq_arguments import parse_words

from mhmoe_fairseq.commands.main import build_parser
from mhmoe_fairseq.commands.reproduce import plans_of
from mhmoe_fairseq.experiments.runner import dry_run


@functools.cache
def commands(*words: str) -> tuple[tuple[str, ...], ...]:
    """The words of every command of ``mhmoe reproduce WORDS --dry-run``."""
    args = build_parser("reproduce").parse_args(["reproduce", *words])
    lines = [line for plan in plans_of(args) for line in dry_run(plan)]
    return tuple(tuple(shlex.split(line)) for line in lines if not line.startswith("#"))


def unlaunched(words: tuple[str, ...]) -> tuple[str, ...]:
    """The command that torchrun would start, for one that it starts."""
    return ("fairseq-train", *words[words.index("-m") + 2 :]) if words[0] == "torchrun" else words


@functools.cache
def parse(words: tuple[str, ...]):
    return parse_words(unlaunched(words))


def trainings(*words: str) -> dict[str, tuple[str, ...]]:
    """Run -> its training command; without the search's."""
    found = [command for command in commands(*words) if unlaunched(command)[0] == "fairseq-train"]
    names = {"/".join(Path(parse(words).save_dir).parts[2:-1]): words for words in found}
    return {name: words for name, words in names.items() if not name.startswith("search")}
