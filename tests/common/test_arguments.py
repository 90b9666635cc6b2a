"""Types of command-line arguments: what they take, and what they say of the rest."""

import argparse
import os
from pathlib import Path

import pytest

from mhmoe_fairseq.common import arguments
from mhmoe_fairseq.common.arguments import (
    existing_file,
    existing_folder,
    existing_path,
    nonempty,
    output_file,
    output_folder,
    plain_name,
    real,
    seed,
    whole,
)
from mhmoe_fairseq.common.errors import UserError


def refusal(read, text: str) -> str:
    with pytest.raises(argparse.ArgumentTypeError) as error:
        read(text)
    return str(error.value)


def test_whole_numbers() -> None:
    assert [whole()("1"), whole(at_least=0)("0"), whole(2, 3)("3"), seed("0"), seed(str(2**32 - 1))] == [
        1, 0, 3, 0, 2**32 - 1
    ]  # fmt: skip
    assert refusal(whole(2, 3), "4") == "(4) must be in [2, 3], an integer"
    assert refusal(seed, "-1") == f"(-1) must be in [0, {2**32 - 1}], an integer"
    for text in ("0", "", "x", "1.0", "nan", "1e3", "9" * 20):
        assert refusal(whole(), text) == f"({text}) must be at least 1, an integer below 2**31"


def test_real_numbers() -> None:
    share = real(at_least=0, below=1)
    assert [share("0"), share("0.99"), real()("-1e30"), real(above=0, at_most=1)("1")] == [0, 0.99, -1e30, 1]
    for text in ("-0.1", "1"):
        assert refusal(share, text) == f"({text}) must be in [0, 1)"
    for text in ("0", "1.01"):
        assert refusal(real(above=0, at_most=1), text) == f"({text}) must be in (0, 1]"
    for text in ("nan", "inf", "-inf", "1e999", ""):
        assert refusal(real(), text) == f"({text}) must be a finite number"


def test_words_and_names() -> None:
    assert nonempty("a/b c") == "a/b c" and plain_name("test_de") == "test_de"
    for read in (nonempty, plain_name):
        for text in ("", " "):
            assert refusal(read, text) == f"({text}) must not be empty"
    assert refusal(plain_name, "a/b") == "(a/b) must be a name, not a path"


def test_files_and_folders_that_are_read(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("")
    link.symlink_to(link)
    assert existing_file(str(file)) == existing_path(str(file)) == file
    assert existing_folder(str(tmp_path)) == existing_path(str(tmp_path)) == tmp_path
    assert refusal(existing_file, str(tmp_path)) == f"({tmp_path}) must be a file, not a folder"
    assert refusal(existing_folder, str(file)) == f"({file}) must be a folder, not a file"
    for read in (existing_file, existing_folder, existing_path):
        assert refusal(read, "") == "() must be a path"
        assert refusal(read, str(tmp_path / "none")) == f"({tmp_path / 'none'}) does not exist"
        assert "cannot be used: " in refusal(read, str(link))
        assert "cannot be used: File name too long" in refusal(read, "x" * 300)


def test_files_and_folders_that_are_written(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("")
    link.symlink_to(tmp_path / "none")
    for path in (file, tmp_path / "new", tmp_path / "new" / "below"):
        assert output_file(str(path)) == path
    for path in (tmp_path, tmp_path / "new", tmp_path / "new" / "below"):
        assert output_folder(str(path)) == path
    assert refusal(output_file, str(tmp_path)) == f"({tmp_path}) must be a file to write, not a folder"
    assert refusal(output_file, os.devnull) == f"({os.devnull}) must be a file to write, not a device"
    assert refusal(output_folder, str(file)) == f"({file}) must be a folder to write into, not a file"
    for write in (output_file, output_folder):
        assert refusal(write, "") == "() must be a path"
        assert refusal(write, str(link)) == f"({link}) does not exist"
        assert "(" in refusal(write, str(file / "below")) and not (tmp_path / "new").exists()


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(arguments.os, "access", lambda path, mode: False)  # whoever runs the test
    assert (
        refusal(existing_file, str(tmp_path / "file")) == f"({tmp_path / 'file'}) must be readable: permission denied"
    )
    for write in (output_file, output_folder):
        text = str(tmp_path / "new" / "below")
        assert refusal(write, text) == f"({text}) cannot be made: no permission to write into {tmp_path}"


def test_the_parser_complains_in_one_line() -> None:
    parser = arguments.ArgumentParser(prog="tool")
    parser.add_argument("--size", type=whole())
    parser.add_argument("--kind", choices=("a", "b"))
    for words, message in (
        (["--size", "0"], r"--size \(0\) must be at least 1"),
        (["--kind", "c"], "--kind: invalid choice: 'c'"),
        (["--sizes", "1"], "unrecognized arguments: --sizes 1"),
    ):
        with pytest.raises(UserError, match=f"^{message}") as error:
            parser.parse_args(words)
        assert "\n" not in str(error.value)
