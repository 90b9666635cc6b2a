"""A refusal of ours ends a fairseq command with one line and status 2; any other error keeps its traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from mhmoe_fairseq.commands.main import is_refusal, refuse_in_one_line
from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.moe import MHMoEConfig


def raised(function) -> BaseException:
    with pytest.raises(Exception) as error:
        function()
    return error.value


def user_error() -> None:
    raise UserError("--flag (1) must be 2")


def test_what_is_a_refusal() -> None:
    for function, expected in (
        (user_error, True),
        (lambda: MHMoEConfig(embed_dim=8, num_heads=3, num_experts=2, expert_ffn_dim=8), True),  # our ValueError
        (lambda: int("x"), False),
        (lambda: open("nowhere/none"), False),
        (lambda: MHMoEConfig(surprise=1), False),  # a TypeError: our mistake, not the user's
    ):
        error = raised(function)
        assert is_refusal(error, error.__traceback__) == expected


def test_only_fairseqs_commands_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    for program in ("", "train.py", "pytest"):
        monkeypatch.setattr(sys, "argv", [program])
        refuse_in_one_line()
        assert sys.excepthook is sys.__excepthook__
    for program in ("bin/fairseq-train", "site-packages/fairseq_cli/train.py"):
        monkeypatch.setattr(sys, "argv", [program])
        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
        refuse_in_one_line()
        assert sys.excepthook is not sys.__excepthook__


@pytest.mark.parametrize(
    "words, status, line",
    [
        (["refused"], 2, "fairseq-train: error: --flag (1) must be 2"),
        pytest.param([], 1, "RuntimeError: ours", marks=pytest.mark.slow),
    ],
)
def test_the_interpreter_ends_with_one_line_only_where_we_refuse(
    tmp_path: Path, words: list[str], status: int, line: str
) -> None:
    (tmp_path / "fairseq-train").write_text(
        "import sys\nfrom mhmoe_fairseq.commands.main import refuse_in_one_line\n"
        "from mhmoe_fairseq.common.errors import UserError\nrefuse_in_one_line()\n"
        "raise UserError('--flag (1) must be 2') if len(sys.argv) > 1 else RuntimeError('ours')\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "fairseq-train", *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (status, line)
    assert ("Traceback" in done.stderr) is (status == 1)
