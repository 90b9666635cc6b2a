"""``from_pretrained``: scores and samples as fairseq's users expect them."""

import math
import re
import shutil

import pytest
import torch
from console import evaluate

from mhmoe_fairseq.models.language_model import MHMoELanguageModel


@pytest.fixture(scope="module")
def hub(trained_model):
    return MHMoELanguageModel.from_pretrained(str(trained_model.folder))


@pytest.fixture(scope="module")
def evaluated(trained_model):
    """fairseq-eval-lm's log-probabilities (nats) of every token, by line of the test text, and its loss (bits)."""
    log = evaluate(
        trained_model.data, trained_model.checkpoint, "--tokens-per-sample", 64, "--sample-break-mode", "eos",
        "--output-word-probs", "--batch-size", 8,
    )  # fmt: skip
    lines = {}
    for match in re.finditer(r"fairseq_cli\.eval_lm(?::| \| )(\d+) (.+\])$", log, re.M):
        lines[int(match[1])] = [float(score) for score in re.findall(r"\[(-?[\d.]+)\](?:\t|$)", match[2])]
    return lines, float(re.search(r"Loss \(base 2\): ([\d.]+)", log)[1])


def test_scores_are_eval_lms(hub, trained_model, evaluated):
    text = (trained_model.data / "text" / "test.txt").read_text(encoding="utf-8").splitlines()
    scores, loss = evaluated
    assert sorted(scores) == list(range(len(text)))
    numbers = [number for number, line in enumerate(text) if line]
    for number, result in zip(numbers, hub.score([text[number] for number in numbers])):
        # Both start from the end mark; fairseq's score leaves out the closing one, which eval-lm counts.
        found = result["positional_scores"].tolist()
        assert len(scores[number]) == len(found) + 1
        assert found == pytest.approx(scores[number][:-1], abs=1e-5)
        assert result["score"].item() == pytest.approx(sum(found) / len(found), abs=1e-5)
    tokens = [score for line in scores.values() for score in line]
    assert -sum(tokens) / len(tokens) / math.log(2) == pytest.approx(loss, abs=1e-3)


def test_one_sentence_and_several(hub, trained_model):
    one, *_ = lines = trained_model.held_out_lines(5)
    alone, together = hub.score(one), hub.score(lines)
    torch.testing.assert_close(alone["positional_scores"], together[0]["positional_scores"], rtol=0, atol=1e-5)
    assert hub.string(alone["tokens"]) == hub.apply_bpe(one)


def test_the_trained_language_scores_above_shuffled_words(hub, trained_model):
    for line in trained_model.held_out_lines(5):
        shuffled = " ".join(sorted(line.split(), key=lambda word: word[::-1]))
        assert hub.score(line)["score"] > hub.score(shuffled)["score"] + 0.3


def test_sample(hub):
    text = hub.sample("The river", beam=3, max_len_b=50)
    assert text.startswith("The river ") and text.endswith(".")
    assert hub.sample(["The river", "The café"], beam=3, max_len_b=50)[0] == text
    torch.manual_seed(0)
    drawn = {hub.sample("The", sampling=True, sampling_topk=20, max_len_b=30) for _ in range(4)}
    assert len(drawn) > 1 and all(one.startswith("The") for one in drawn)


def test_text_survives_encoding(hub):
    for text in ("The river finds the café.", "東京 🙂 naïve", "x"):
        assert hub.decode(hub.encode(text)) == text


def test_a_folder_that_stands_alone(hub, trained_model, tmp_path):
    """The checkpoint beside its dictionary and tokenizer: nothing else is needed, whatever path it was trained on."""
    for name in ("dict.txt", "sentencepiece.model"):
        shutil.copy(trained_model.data / name, tmp_path)
    state = torch.load(trained_model.checkpoint, weights_only=True)
    state["cfg"]["task"]["data"] = "gone"
    torch.save(state, tmp_path / "model.pt")
    alone = MHMoELanguageModel.from_pretrained(str(tmp_path))
    assert alone.sample("The river", max_len_b=20) == hub.sample("The river", max_len_b=20)
    (tmp_path / "dict.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no dict\.txt in .* or gone: give data_name_or_path"):
        MHMoELanguageModel.from_pretrained(str(tmp_path))


def test_a_checkpoint_from_before_a_flag_existed(hub, trained_model, tmp_path):
    state = torch.load(trained_model.checkpoint, weights_only=True)
    for name in ("mhmoe_projection_bias", "mhmoe_shared_expert_dim", "rotary_embed"):
        del state["cfg"]["model"][name]
    torch.save(state, tmp_path / "model.pt")
    older = MHMoELanguageModel.from_pretrained(str(tmp_path), data_name_or_path=str(trained_model.data))
    assert torch.equal(older.score("The river")["positional_scores"], hub.score("The river")["positional_scores"])


def test_a_checkpoint_by_name_and_by_path(hub, trained_model):
    expected = hub.score("The river")["score"]
    by_name = MHMoELanguageModel.from_pretrained(str(trained_model.folder), "checkpoint_best.pt")
    by_path = MHMoELanguageModel.from_pretrained(str(trained_model.folder / "checkpoint_best.pt"))
    assert by_name.score("The river")["score"] == by_path.score("The river")["score"] == expected
    with pytest.raises(FileNotFoundError, match="no nothing.pt in"):
        MHMoELanguageModel.from_pretrained(str(trained_model.folder), "nothing.pt")
