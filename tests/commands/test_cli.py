"""What every command does alike: a reader that goes, and words that are no text."""

from __future__ import annotations

import os
import sys

import pytest

from mhmoe_fairseq.commands.main import main


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
