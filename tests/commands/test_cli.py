"""What every command does alike: a reader that goes, and words that are no text."""

import os
import subprocess
import sys

import pytest

from mhmoe_fairseq.commands import report
from mhmoe_fairseq.commands.main import ALIASES, COMMANDS, main
from mhmoe_fairseq.common.errors import UserError

# The parser of each command, in a process of its own; prints which of them need what a help text should not wait for.
PARSERS = """
import json, os, sys
from mhmoe_fairseq.commands import main
for command in (None, *main.COMMANDS):
    if os.fork() == 0:
        main.build_parser(command)
        found = {"torch", "fairseq", "torchscale"} & set(sys.modules)
        if found:
            print(json.dumps(command), flush=True)
        os._exit(0)
    os.wait()
"""


def test_help_comes_without_torch_and_fairseq(repository):
    done = subprocess.run([sys.executable, "-c", PARSERS], cwd=repository, capture_output=True, text=True)
    heavy = [line for line in done.stdout.splitlines() if line.startswith('"')]
    assert done.returncode == 0 and not heavy and len(COMMANDS) + 1 <= 12  # with user-dir


@pytest.mark.parametrize("words", [["user-dir"], ["--help"], ["plan", "--help"], ["plan", "--arch", "dense_lm_tiny"]])
def test_a_reader_that_goes_ends_a_command_quietly(capfd, monkeypatch, words):
    read_end, write_end = os.pipe()
    os.close(read_end)  # as after `| head -1`
    with os.fdopen(write_end, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        try:
            status = main(words)
        except SystemExit as end:  # argparse's, after a help text
            status = end.code
        assert status == 141 or "--help" in words  # as of a program that SIGPIPE ends
        stream.flush()  # as the interpreter does at its end: nothing may be left that fails
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "words, message",
    [
        (["generate", "x.pt", "--prompt", "caf\udce9"], r"mhmoe generate: error: --prompt 'caf\udce9': must be UTF-8"),
        (["prepare", "english", "--dest=\udcff"], r"mhmoe prepare: error: argument '--dest=\udcff': must be UTF-8"),
    ],
)
def test_a_word_that_is_no_text_is_one_line(capsys, words, message):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(message) and err.endswith(" is not\n") and err.count("\n") == 1


@pytest.mark.parametrize("former", sorted(ALIASES.keys() - {"lm-eval"}))  # whose --help is another program's
def test_a_former_name_says_todays_and_runs_it(capsys, former):
    with pytest.raises(SystemExit) as end:
        main([former, "--help"])
    said = capsys.readouterr()
    assert end.value.code == 0 and said.out.startswith(f"usage: mhmoe {ALIASES[former][0]}")
    assert said.err == f"mhmoe {former} is now: mhmoe {' '.join(ALIASES[former])}\n"


@pytest.mark.parametrize("error", [UserError("--flag (1) must be 2"), FileNotFoundError("no such file: x")])
def test_what_the_user_can_mend_is_one_line_and_a_bug_is_not(capsys, monkeypatch, tmp_path, error):
    def fail(args):
        raise error

    monkeypatch.setattr(report, "run", fail)
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"mhmoe report: error: {error}\n"
    error = ValueError("ours")
    with pytest.raises(ValueError, match="ours"):
        main(["report", str(tmp_path)])


BASH = """
source "$1"
COMP_WORDS=(mhmoe "${@:2}") COMP_CWORD=$(($# - 1))
_shtab_mhmoe
printf "%s\\n" "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    "words, completed",
    [
        (["rep"], {"report", "reproduce"}),
        (["checkpoint", "con"], {"convert"}),
        (["report", "--no-p"], {"--no-plots"}),
        (["generate", "--precision", ""], {"fp32", "bf16", "auto"}),
    ],
)
def test_bash_completes_commands_flags_and_choices(capsys, tmp_path, words, completed):
    pytest.importorskip("shtab", reason="an optional package")
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", "bash"])
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    bash = ["bash", "-c", BASH, "-", tmp_path / "completion", *words]
    done = subprocess.run(bash, capture_output=True, text=True, cwd=tmp_path)
    assert end.value.code == 0 and set(done.stdout.split()) == completed


def test_completion_needs_its_package_and_a_shell(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    for shell, said in (("zsh", "needs shtab: pip install 'mhmoe-fairseq[completion]'"), ("fish", "invalid choice")):
        assert main(["--print-completion", shell]) == 2
        err = capsys.readouterr().err
        assert err.startswith("mhmoe: error: --print-completion") and said in err and err.count("\n") == 1
