"""What every command does alike: a reader that goes, and words that are no text."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mhmoe_fairseq.commands.main import COMMANDS, HEAVY, main

# The parser of each command, in a process of its own; prints which of them need what a help text should not wait for.
PARSERS = """
import json, os, sys
from mhmoe_fairseq.commands import main
main.HEAVY = ()
for command in main.COMMANDS:
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
    heavy = {json.loads(line) for line in done.stdout.splitlines() if line.startswith('"')}
    assert done.returncode == 0 and heavy == HEAVY & set(COMMANDS)


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
