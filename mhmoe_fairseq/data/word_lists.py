"""Two lists of words to compare, polysemous ones and a control, as a JSON file that ``mhmoe prepare words`` writes."""

from pathlib import Path
from typing import Any, NamedTuple

from ..common.errors import UserError
from ..common.files import read_json, write_json

WORD_LISTS = "words.json"


class WordLists(NamedTuple):
    """The words of both groups, spelled as in the text, and the rule that chose them, in words."""

    polysemous: list[str]
    control: list[str]
    rule: str = "given by the user"

    def write(self, path: Path) -> None:
        """Write the file under a temporary name, then rename it."""
        write_json(path, self._asdict())


def read_word_lists(path: Path) -> WordLists:
    """Return the lists of a file, also of one written by hand: ``{"polysemous": [...], "control": [...]}``.

    Raises:
        UserError: it is no such file, a list is empty, or a word is in both.
    """
    kept: Any = read_json(path)
    if not isinstance(kept, dict) or not {"polysemous", "control"} <= kept.keys() <= set(WordLists._fields):
        raise UserError(f"{path}: must be an object of the two lists polysemous and control, and perhaps rule")
    lists = WordLists(**kept)
    for name, words in (("polysemous", lists.polysemous), ("control", lists.control)):
        if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
            raise UserError(f"{path}: {name} must be a list of words, at least one")
    if both := sorted({*lists.polysemous} & {*lists.control}):
        raise UserError(f"{path}: {both[0]!r} is in both lists")
    return lists
