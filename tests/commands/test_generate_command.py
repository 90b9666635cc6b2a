"""``mhmoe generate`` as typed by a user, and ``fairseq-interactive`` beside it."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
from console import USER_DIR, run_console

from mhmoe_fairseq.commands.generate import read_prompts
from mhmoe_fairseq.commands.main import main


def generate(capsys, *arguments):
    """Exit status, standard output and error."""
    status = main(["generate", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_prompts_in_order(trained_model, capsys):
    status, out, err = generate(
        capsys, trained_model.folder, "--prompt", "The river", "--prompt", "The captain", "--max-len-b", 30, "--cpu"
    )
    assert status == 0 and err == ""
    first, second = out.splitlines()
    assert first.startswith("The river") and second.startswith("The captain")


def test_json_lines(trained_model, capsys):
    arguments = ("--prompt", "The river", "--max-len-b", 20, "--beam", 3)
    _, text, _ = generate(capsys, trained_model.checkpoint, *arguments)
    _, out, _ = generate(capsys, trained_model.checkpoint, *arguments, "--json")
    record = json.loads(out)
    assert list(record) == ["prompt", "text", "score", "tokens", "token_scores"]
    assert record["text"] == text.strip() and len(record["tokens"]) == len(record["token_scores"])


def test_in_bf16_scores_are_rounded(trained_model, capsys):
    arguments = (trained_model.checkpoint, "--prompt", "The river", "--max-len-b", 20, "--json", "--cpu")
    scores = {}
    for flags in ((), ("--precision", "fp32"), ("--precision", "bf16")):
        status, out, _ = generate(capsys, *arguments, *flags)
        assert status == 0
        scores[flags[-1:]] = json.loads(out)["token_scores"]
    assert scores[()] == scores["fp32",] != scores["bf16",]
    assert scores["bf16",][:3] == pytest.approx(scores["fp32",][:3], abs=0.1)


def test_prompts_from_a_file_and_from_stdin(trained_model, capsys, monkeypatch, tmp_path):
    (tmp_path / "prompts.txt").write_text("The river\n\nThe café\n", encoding="utf-8")
    flags = ("--max-len-b", 30, "--batch-size", 2)
    _, from_file, _ = generate(capsys, trained_model.folder, "--prompts-file", tmp_path / "prompts.txt", *flags)
    stdin = SimpleNamespace(buffer=io.BytesIO((tmp_path / "prompts.txt").read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    _, from_stdin, _ = generate(capsys, trained_model.folder, "--prompts-file", "-", *flags)
    assert from_file == from_stdin
    assert len(from_file.splitlines()) == 3 and from_file.splitlines()[2].startswith("The café")


def test_lines_of_prompts_end_as_pythons_do(tmp_path):
    (tmp_path / "prompts").write_bytes("\ufeffone\u2028two\x0cthree\r\n\rfour\n".encode())
    assert read_prompts(tmp_path / "prompts") == ["one\u2028two\x0cthree", "", "four"]


def test_data_folder_by_flag(trained_model, capsys, tmp_path):
    moved = tmp_path / "moved.pt"
    moved.write_bytes(trained_model.checkpoint.read_bytes())
    arguments = ("--prompt", "The river", "--max-len-b", 20)
    assert generate(capsys, moved, "--data", trained_model.data, *arguments) == generate(
        capsys, trained_model.folder / "checkpoint_last.pt", *arguments
    )


def test_bad_input_is_one_line(trained_model, capsys, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "broken.pt").write_bytes(trained_model.checkpoint.read_bytes()[:5000])
    other = tmp_path / "other"
    other.mkdir()
    words = (trained_model.data / "dict.txt").read_text(encoding="utf-8").splitlines()
    (other / "dict.txt").write_text("\n".join(words[::-1]) + "\n", encoding="utf-8")
    prompt = ("--prompt", "The river")
    for arguments, message in (
        ((tmp_path, *prompt), "no model.pt or checkpoint_best.pt or checkpoint_last.pt in"),
        ((tmp_path / "broken.pt", *prompt), "broken.pt: no readable checkpoint"),
        ((trained_model.folder, *prompt, "--data", tmp_path), f"no dict.txt in {tmp_path}"),
        (
            (trained_model.folder, *prompt, "--data", other),
            "the checkpoint's dictionary (344 words) is not this data's",
        ),
        ((trained_model.folder, "--prompts-file", tmp_path / "latin.txt"), "invalid UTF-8 at byte 3"),
        ((trained_model.folder, "--prompts-file", tmp_path / "empty.txt"), "no prompt in it"),
        ((trained_model.folder, "--prompts-file", tmp_path / "none.txt"), "none.txt"),
        ((trained_model.folder, *prompt, "--top-k", 3), "--top-k needs --sampling"),
        ((trained_model.folder, *prompt, "--precision", "fp8"), "--precision: invalid choice: 'fp8'"),
    ):
        status, out, err = generate(capsys, *arguments)
        assert status == 2 and out == "" and message in err
        assert err.startswith("mhmoe generate: error: ") and err.count("\n") == 1, err


@pytest.mark.slow
def test_interactive_agrees(trained_model, capsys):
    prompts = ["The river", "The captain mends the garden", "The café"]
    output = run_console(
        "fairseq-interactive", trained_model.data, "--user-dir", USER_DIR, "--task", "mhmoe_language_modeling",
        "--path", trained_model.checkpoint, "--bpe", "mhmoe_sentencepiece", "--sentencepiece-model",
        trained_model.data / "sentencepiece.model", "--beam", 3, "--max-len-b", 40, "--cpu", "--buffer-size", 3,
        "--batch-size", 3, cwd=trained_model.folder, stdin="\n".join(prompts) + "\n",
    )  # fmt: skip
    interactive = [line.split("\t")[2] for line in output.splitlines() if line.startswith("D-")]
    flags = [word for prompt in prompts for word in ("--prompt", prompt)]
    _, out, _ = generate(capsys, trained_model.folder, *flags, "--beam", 3, "--max-len-b", 40)
    assert interactive == out.splitlines()
