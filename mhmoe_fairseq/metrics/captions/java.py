"""METEOR and SPICE: Java programs inside pycocoevalcap (the extra ``captions``), run as they are or not at all."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Words = list[str]
_SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class Unavailable(Exception):
    """Why a metric cannot be computed here."""


def meteor(captions: list[Words], references: list[list[Words]]) -> float:
    """METEOR 1.5 for English, in [0, 1].

    Raises:
        Unavailable: without pycocoevalcap or Java, or if the program fails.
    """
    return _run(_package("meteor.meteor").Meteor, captions, references)


def spice(captions: list[Words], references: list[list[Words]]) -> float:
    """SPICE for English, in [0, 1].

    pycocoevalcap would download two of its files; here they are only used if the user has put them in their place.

    Raises:
        Unavailable: without pycocoevalcap, Java or the files, or if the program fails.
    """
    package = _package("spice.spice")
    folder = Path(package.__file__).parent / "lib"
    missing = [name for name in _SPICE_JARS if not (folder / name).is_file()]
    if missing:
        raise Unavailable(f"pycocoevalcap/spice/lib lacks {' and '.join(missing)} of Stanford CoreNLP 3.6.0")
    return _run(package.Spice, captions, references)


JAVA_METRICS: dict[str, Callable[[list[Words], list[list[Words]]], float]] = {"meteor": meteor, "spice": spice}


def _package(module: str) -> Any:
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise Unavailable("pycocoevalcap is not installed: pip install 'mhmoe-fairseq[captions]'")
    if shutil.which("java") is None:
        raise Unavailable("there is no java on this machine")
    return importlib.import_module(f"pycocoevalcap.{module}")


def _run(scorer: Callable[[], Any], captions: list[Words], references: list[list[Words]]) -> float:
    results = {place: [" ".join(words)] for place, words in enumerate(captions)}
    truth = {place: [" ".join(words) for words in refs] for place, refs in enumerate(references)}
    try:
        return float(scorer().compute_score(truth, results)[0])
    except Exception as error:  # whatever a Java program that dies makes of its wrapper
        raise Unavailable(f"its program failed ({type(error).__name__}: {error})") from error
