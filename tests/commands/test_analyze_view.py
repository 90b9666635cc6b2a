"""``mhmoe analyze --view``: the page against a forward pass of its own, in a browser, and what it refuses."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Page, as_shown, chosen_anew, needs_browser, shown_subtokens
from PIL import Image

from mhmoe_fairseq.analysis.reports.view import write_view
from mhmoe_fairseq.analysis.routing.view import MOST_BYTES, RoutedView, Sample
from mhmoe_fairseq.checkpoints.open import open_model
from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.models.language_model import MHMoELanguageModel

HOSTILE = 'The river finds </script><script>document.title="x"</script> the <img src=x> & garden.'


def view(*words: object) -> int:
    return main(["analyze", "--view", *map(str, words)])


def embedded(file: Path) -> dict:
    text = file.read_text(encoding="utf-8")
    assert "http" not in text.replace("http-equiv", "")  # nothing is fetched
    return json.loads(text.split('type="application/json">')[1].split("</script>")[0])


def unpacked(text: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<u2").reshape(shape)


def tokens_of(model: MHMoELanguageModel, data: Path, text: str) -> list[list[int]]:
    """The blocks that a model should see of a text: an end mark, lines with theirs, cut at its positions."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(data / "sentencepiece.model"))
    ids = [2]
    for line in text.splitlines():
        ids += [*pieces.encode(line), 2]
    longest = model.max_decoder_positions()
    return [ids[start : start + longest] for start in range(0, len(ids), longest)]


@pytest.fixture(scope="module")
def shown(runs, tmp_path_factory: pytest.TempPathFactory):
    """The page of a text of three blocks, and what a pass over each block chooses."""
    folder, checkpoint = tmp_path_factory.mktemp("view"), runs.mhmoe / "checkpoint_last.pt"
    model = open_model(checkpoint, runs.data).model
    lines = [HOSTILE]
    while len(tokens_of(model, runs.data, "\n".join(lines))) < 3:
        lines.append(f"The old farmer opens gate {len(lines)}.")
    (folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert view(checkpoint, "--data", runs.data, "--text", folder / "text.txt", "--out", folder) == 0
    blocks = tokens_of(model, runs.data, "\n".join(lines))
    layer = model.decoder.layers[1].moe_layer
    chosen = [found for ids in blocks for found in chosen_anew(layer, model, torch.tensor([ids]))]
    return folder / "view.html", lines, blocks, chosen


def test_the_page_holds_what_another_pass_chooses(shown) -> None:
    file, lines, blocks, chosen = shown
    data = embedded(file)
    [sample] = data["samples"]
    assert (data["layers"], data["heads"], data["topK"], data["experts"], data["pools"]) == ([2], 2, 2, 8, 1)
    assert sample["blocks"] == [0, len(blocks[0]), len(blocks[0]) + len(blocks[1])]
    read = "".join("\n" if token == "</s>" else token for token in sample["tokens"][1:])
    assert [line.strip() for line in read.splitlines()] == lines
    count = len(sample["tokens"])
    experts = unpacked(sample["experts"], 1, count, 2, 2)[0]
    weights = unpacked(sample["weights"], 1, count, 2, 2)[0] / 65535
    nats = unpacked(sample["entropies"], 1, count, 2)[0] / 65535 * np.log(8)
    assert count == len(chosen) == sum(map(len, blocks))
    for position, subtokens in enumerate(chosen):
        found = zip(experts[position].tolist(), weights[position].tolist(), nats[position].tolist())
        assert as_shown(subtokens) == [*found]


@needs_browser
def test_a_browser_shows_a_chosen_token_and_a_highlighted_expert(shown, tmp_path: Path) -> None:
    file, lines, _, chosen = shown
    page = Page(file, "layer=2&token=5&expert=1")
    tokens = page.of("token")
    assert [attrs["data-token"] for attrs, _ in tokens] == [str(index + 1) for index in range(len(chosen))]
    assert shown_subtokens(page) == as_shown(chosen[4])
    flat = [expert for subtokens in chosen for experts, _, _ in subtokens for expert in experts]
    assert [int(text) for _, text in page.of("cell")] == flat
    assert sum("dim" not in attrs["class"].split() for attrs, _ in page.of("cell")) == flat.count(1)
    loads = [int(attrs["data-load"]) for attrs, _ in page.of("expert")]
    assert loads == [flat.count(expert) for expert in range(8)]
    assert [attrs["class"].split() for attrs, _ in tokens].count(["token", "selected"]) == 1
    assert len(page.of("block")) == 2
    [title] = ["".join(text) for tag, _, text in page.elements if tag == "title"]
    images = [attrs for tag, attrs, _ in page.elements if tag == "img" and attrs.get("src")]
    assert title == "Experts of every sub-token" and images == []
    one = Page(file, "head=2&token=5")
    assert shown_subtokens(one) == as_shown(chosen[4][1:])
    assert [int(text) for _, text in one.of("cell")] == [expert for each in chosen for expert in each[1][0]]


def test_a_long_text_of_many_layers_is_a_page_of_reasonable_size(tmp_path: Path) -> None:
    shape = (12, 2000, 4, 2)
    routed = torch.randint(64, shape), torch.rand(shape), torch.rand(shape[:3])
    sample = Sample("text", ["token "] * 2000, [0], None, (0, 0), *routed)
    write_view(tmp_path / "view.html", RoutedView(Path("checkpoint.pt"), [*range(12)], 64, 1, 1, [sample]))
    assert (tmp_path / "view.html").stat().st_size < MOST_BYTES


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--view needs --text FILE, --words TEXT or, of a model of images, --image FILE"),
        (["--words", "The river", "--image", "IMAGE"], "is a language model: it sees no --image"),
        (["--words", "The river", "--image", "IMAGE", "IMAGE"], "--image (2) and --text (1) make pairs"),
        (["--text", "LONG"], "positions in 1 layers of 2 x 2 choices are"),
        (["--text", "IMAGE"], "image.png"),
        (["--words", "The river", "--batch-size", "3"], "--batch-size has no meaning with --view"),
        (["--words", "The river", "DENSE"], "is a dense model: it has no experts to show"),
    ],
)
def test_bad_input_is_one_line(runs, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list, message: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    (tmp_path / "long.txt").write_text("The old river finds the garden.\n" * 2000, encoding="utf-8")
    model = runs.dense if "DENSE" in flags else runs.mhmoe
    files = {"IMAGE": tmp_path / "image.png", "LONG": tmp_path / "long.txt"}
    flags = [files.get(flag, flag) for flag in flags if flag != "DENSE"]
    assert view(model / "checkpoint_last.pt", "--data", runs.data, "--out", tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("mhmoe analyze: error: ") and message in error[-1]
