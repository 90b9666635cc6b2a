"""The domain of every token in a batch: of the document that it ends up in, wherever blocks are cut."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq.data.indexed_dataset import MMapIndexedDataset
from mixed_corpora import DOMAINS, prepare_mix
from multilingual_data import write_languages
from test_language_modeling import targets, task_for
from test_multilingual_language_modeling import task_for as multilingual_task

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.common.files import read_json, write_json
from mhmoe_fairseq.data.domains import FILE, domain_names, domains_of_lines
from mhmoe_fairseq.data.identity import identify_data

EOS, PAD = 2, 1
MODEL = SimpleNamespace(mhmoe_routing="domain", moe_expert_count=2)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_mix(tmp_path_factory.mktemp("mix"))


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "data"))


def routed_task(data: Path, **flags):
    """A task whose model routes by domain, in the order of the data."""
    task = task_for(data, **flags)
    task.domains = task.domains_of_data()
    return task


def true_domains(folder: Path, split: str) -> np.ndarray:
    """Of each token of a split, from the text: every line begins with its domain's name."""
    tokens = MMapIndexedDataset(str(folder / split))
    lines = (folder / "text" / f"{split}.txt").read_text().split("\n")[:-1]
    found, last = [], ""
    for line, ids in zip(lines, tokens, strict=True):
        last = line.split()[0] if line else last  # an empty line ends the document before it
        found += len(ids) * [DOMAINS.index(last)]
    return np.array(found)


def batches(task, split: str) -> list[dict]:
    iterator = task.get_batch_iterator(task.dataset(split), max_sentences=4).next_epoch_itr(shuffle=False)
    return list(iterator)


def domains_in(task, split: str, skip: int = 0) -> list[int]:
    """The domains that batches name, of every target in the data's order but the first ``skip`` of each block."""
    rows: dict[int, torch.Tensor] = {}
    for batch in batches(task, split):
        domain, target = batch["net_input"]["domain"], batch["target"]
        assert domain.shape == target.shape and not domain[target.eq(PAD)].any()
        for index, row, of_row in zip(batch["id"].tolist(), domain, target, strict=True):
            rows[index] = row[of_row.ne(PAD)][skip:]
            assert (row[: skip + 1] == row[0]).all()  # a given symbol's is that of the first token
    return torch.cat([rows[index] for index in sorted(rows)]).tolist()


@pytest.mark.parametrize("split", ["train", "valid", "test_beta"])
def test_every_target_has_the_domain_of_its_document(data: Path, split: str) -> None:
    task = routed_task(data, sample_break_mode="none", tokens_per_sample=13)
    task.load_dataset(split)
    found = domains_in(task, split)
    assert found == true_domains(data, split).tolist()
    assert set(found) == ({1} if split == "test_beta" else {0, 1})


@pytest.mark.parametrize("mode", ["complete_doc", "complete", "eos"])
def test_blocks_that_are_cut_otherwise_have_the_same_domains(data: Path, mode: str) -> None:
    task = routed_task(data, sample_break_mode=mode, tokens_per_sample=300, add_bos_token=True)
    task.load_dataset("test")
    expected = true_domains(data, "test")
    if mode == "complete_doc":  # leaves out the empty lines
        lengths = [len(line) for line in MMapIndexedDataset(str(data / "test"))]
        expected = expected[np.repeat(np.array(lengths) > 1, lengths)]
    assert domains_in(task, "test", skip=1) == expected.tolist()


def test_the_models_order_of_domains_decides_which_expert_is_whose(data: Path) -> None:
    task = task_for(data, sample_break_mode="none")
    task.load_state_dict({"domains": ["beta", "alpha"]})
    assert task.state_dict()["domains"] == ["beta", "alpha"]
    task.load_dataset("valid_alpha")
    assert all(
        (batch["net_input"]["domain"][batch["target"].ne(PAD)] == 1).all() for batch in batches(task, "valid_alpha")
    )
    task.load_state_dict({"domains": ["beta", "gamma"]})
    with pytest.raises(UserError, match="the model has no expert for domain alpha, only for beta, gamma"):
        task.load_dataset("valid")
    task.names_domains = False
    task.load_dataset("valid")
    assert "domain" not in batches(task, "valid")[0]["net_input"]


def test_a_training_on_one_domain_reads_its_documents_alone(data: Path) -> None:
    task = task_for(data, sample_break_mode="none")
    found = {}
    for name in DOMAINS:
        task.load_dataset(f"train_{name}")
        assert "domain" not in batches(task, f"train_{name}")[0]["net_input"]
        found[name] = torch.cat([target[target.ne(PAD)] for target in targets(task, f"train_{name}", max_sentences=1)])
    whole = np.concatenate(list(MMapIndexedDataset(str(data / "train"))))
    kept = true_domains(data, "train")
    for index, name in enumerate(DOMAINS):
        assert sorted(found[name].tolist()) == sorted(whole[kept == index].tolist())
        blocks = [task.dataset(f"train_{name}")[at]["target"] for at in range(len(task.dataset(f"train_{name}")))]
        assert torch.cat(blocks).tolist() == whole[kept == index].tolist()
    assert task.domain_tokens() == {name: len(found[name]) for name in DOMAINS}
    with pytest.raises(FileNotFoundError, match="train_gamma.idx"):
        task.load_dataset("train_gamma")
    documents = read_json(data / FILE)
    write_json(data / FILE, {**documents, "train": documents["train"].replace("beta", "z_alpha")})
    task.load_dataset("train_z_alpha")  # is neither train_z nor all that ends in alpha
    assert len(task.dataset("train_z_alpha")) == len(task.dataset("train_beta"))
    with pytest.raises(UserError, match="train_beta: no document in .*train is of domain beta"):
        task.load_dataset("train_beta")


def test_languages_are_domains_where_experts_are_of_them(tmp_path: Path) -> None:
    task = multilingual_task(write_languages(tmp_path / "languages"))
    with pytest.raises(UserError, match=r"--moe-expert-count \(2\) must be 4 .*: de, el, en, zh"):
        task.build_model(MODEL)
    task.load_state_dict({"domains": ["zh", "en", "el", "de"]})
    task.load_dataset("valid")
    tokens = task.domain_tokens()
    assert list(tokens) == ["de", "el", "en", "zh"]
    assert tokens["zh"] == MMapIndexedDataset(str(tmp_path / "languages" / "zh" / "train")).sizes.sum()
    for batch in batches(task, "valid"):
        expected = (3 - batch["languages"]).unsqueeze(1).expand_as(batch["target"])
        assert torch.equal(batch["net_input"]["domain"], expected)


def test_the_labels_change_no_digest_and_lie_beside_the_data(data: Path) -> None:
    assert FILE in read_json(data / "manifest.json")["files"]
    whole = identify_data(data).digest
    manifest = read_json(data / "manifest.json")
    del manifest["files"][FILE]
    write_json(data / "manifest.json", manifest)
    assert identify_data(data).digest == whole
    assert domain_names(data) == list(DOMAINS)


def test_data_without_labels_or_with_others_are_refused_before_any_work(data: Path) -> None:
    task = task_for(data)
    with pytest.raises(UserError, match=r"--moe-expert-count \(8\) must be 2 .* one for each .*: alpha, beta"):
        task.build_model(SimpleNamespace(mhmoe_routing="domain", moe_expert_count=8))
    labels = read_json(data / FILE)
    documents = len(labels["valid"].split())
    write_json(data / FILE, {**labels, "valid": labels["valid"] + " alpha"})
    task.domains = list(DOMAINS)
    with pytest.raises(
        UserError, match=rf"tells of {documents + 1} documents of valid, which has {documents}: it is not of"
    ):
        task.load_dataset("valid")
    with pytest.raises(UserError, match="domains.json tells nothing of split other, only of train, valid, test"):
        domains_of_lines(data, "other", np.ones(3))
    (data / FILE).unlink()
    with pytest.raises(
        UserError, match=r"domains.json, which tells .* is missing: .* mhmoe prepare english --source mix"
    ):
        task.build_model(MODEL)
    with pytest.raises(UserError, match=r"--context-window: has no meaning with --mhmoe-routing domain"):
        task.eval_lm_dataloader(SimpleNamespace(sizes=np.ones(2)), context_window=4)
