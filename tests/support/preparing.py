"""Running ``mhmoe prepare``, and looking at what it made."""

from pathlib import Path

import pytest

from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.common.files import read_json


@pytest.fixture
def mhmoe_prepare(capsys):
    """A function that runs ``mhmoe prepare ARGUMENTS``: exit status, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main(["prepare", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def hashes(dest: Path) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in read_json(dest / "manifest.json")["files"].items()}


def visible(dest: Path) -> list[str]:
    return sorted(path.name for path in dest.iterdir() if not path.name.startswith("."))


def prepare_interrupted(preparation, dest: Path, stop_at: str) -> list[str]:
    """Runs a preparation until it says a line that starts with ``stop_at``, then again; what is said then."""
    said: list[str] = []

    def interrupt(line: str) -> None:
        if line.startswith(stop_at):
            raise KeyboardInterrupt

    preparation.say = interrupt
    with pytest.raises(KeyboardInterrupt):
        preparation.run(dest)
    assert visible(dest) == []
    preparation.say = said.append
    preparation.run(dest)
    assert "continuing an unfinished preparation" in said[0]
    preparation.run(dest.parent / "straight")
    assert hashes(dest) == hashes(dest.parent / "straight")
    return said[: next(index for index, line in enumerate(said) if line.startswith("done:"))]
