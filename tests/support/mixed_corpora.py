"""A corpus of two domains, prepared as ``mhmoe prepare english --source mix`` prepares it."""

from pathlib import Path

from small_corpora import make_sentences

from mhmoe_fairseq.data.documents import Document
from mhmoe_fairseq.prepare.archives import Archive
from mhmoe_fairseq.prepare.english import EnglishPreparation, EnglishSettings
from mhmoe_fairseq.prepare.sources.base import PackagedSource
from mhmoe_fairseq.prepare.sources.mix import MixSource

DOMAINS = ("alpha", "beta")


def prepare_mix(root: Path) -> Path:
    """The prepared folder: of each domain 600 sentences that begin with its name, five a document."""
    cache = root / "cache"
    cache.mkdir(parents=True)
    for name in DOMAINS:
        (cache / f"{name}_1.deb").write_text(name)
    source = MixSource({name: (_package(name, seed),) for seed, name in enumerate(DOMAINS)})
    settings = EnglishSettings(vocab_size=320, valid_fraction=0.1, test_fraction=0.1)
    EnglishPreparation(source, settings, cache, lambda said: None).run(root / "data")
    return root / "data"


def _package(name: str, seed: int) -> PackagedSource:
    lines = [f"{name} {number} says {line}" for number, line in enumerate(make_sentences(600, seed))]
    documents = [Document(f"{name} {start}", lines[start : start + 5]) for start in range(0, 600, 5)]
    archive = Archive("pip", name, None, f"{name}_*.deb")
    return PackagedSource(name, "none", "document = five lines", archive, lambda path: iter(documents))
