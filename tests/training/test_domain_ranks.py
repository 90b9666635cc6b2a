"""Experts of domains on two ranks, each with all of them or half: the same training as in one process."""

import itertools

import pytest
from console import run_console
from parallel_runs import LINE_WORDS, SIZES, figures, saved, train_logs, updates_in, write_even_corpus

from mhmoe_fairseq.data.domains import write_domains

DOMAINS = ("law", "code", "news", "talk")
MODEL = (
    "--arch", "smoe_lm_tiny", *SIZES, "--moe-freq", "1", "--moe-expert-count", "4", "--moe-ffn-dim", "16",
    "--mhmoe-routing", "domain",
)  # fmt: skip
FIGURES = ("loss", "gnorm", "ppl", "moe_active", "moe_load_max", "moe_entropy")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Documents of five lines; as many tokens as lines take which are whole samples, so that no rank runs out."""
    folder = tmp_path_factory.mktemp("corpus")
    binarised, documents = write_even_corpus(folder), {}
    for split, ends in (("train", 2 * (LINE_WORDS + 1)), ("valid", 0)):
        lines = (folder / f"{split}.txt").read_text().splitlines()
        lines = lines[: len(lines) - ends // (LINE_WORDS + 1)]  # the ends of documents are tokens, too
        for document in range(ends, 0, -1):
            lines.insert(5 * document, "")
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
        documents[split] = [*itertools.islice(itertools.cycle(DOMAINS), ends + 1)]
    prefixes = [word for split in documents for word in (f"--{split}pref", folder / f"{split}.txt")]
    words = ["--only-source", "--srcdict", binarised / "dict.txt", *prefixes, "--destdir", folder / "domains"]
    run_console("fairseq-preprocess", *words, cwd=folder)
    write_domains(folder / "domains" / "domains.json", documents)
    return folder / "domains"


def test_experts_of_domains_train_on_two_ranks_as_in_one_process(data, tmp_path):
    runs = {}
    for name, ranks, size in (("one", 1, 1), ("data", 2, 1), ("experts", 2, 2)):
        flags = ("--mhmoe-expert-parallel-size", size, "--no-epoch-checkpoints")
        logs = train_logs(ranks, data, tmp_path / name, *flags, updates=12, model=MODEL)
        runs[name] = updates_in(logs[0])
        assert saved(tmp_path / name)["task_state"]["domains"] == sorted(DOMAINS)
    assert len(runs["one"]) == 12 and len({update["moe_load_max"] for update in runs["one"]}) > 1
    for name in ("data", "experts"):
        assert figures(runs[name], *FIGURES) == figures(runs["one"], *FIGURES), name
