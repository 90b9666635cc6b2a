"""A small prepared folder of four languages, in the layout of ``mhmoe prepare multilingual``.

The sentences are articles 1 to 9 of the Universal Declaration of Human Rights; the words are single characters.
"""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

from mhmoe_fairseq.data.languages import XNLI_LANGUAGES, language_symbol

SENTENCES = {
    "de": """Alle Menschen sind frei und gleich an Würde und Rechten geboren.
Sie sind mit Vernunft und Gewissen begabt und sollen einander im Geiste der Brüderlichkeit begegnen.
Jeder hat das Recht auf Leben, Freiheit und Sicherheit der Person.
Niemand darf in Sklaverei oder Leibeigenschaft gehalten werden.
Jeder hat das Recht, überall als rechtsfähig anerkannt zu werden.
Niemand darf willkürlich festgenommen, in Haft gehalten oder des Landes verwiesen werden.""",
    "el": """Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.
Είναι προικισμένοι με λογική και συνείδηση, και οφείλουν να συμπεριφέρονται μεταξύ τους με πνεύμα αδελφοσύνης.
Κάθε άτομο έχει δικαίωμα στη ζωή, την ελευθερία και την προσωπική του ασφάλεια.
Κανείς δεν επιτρέπεται να ζει υπό καθεστώς δουλείας, ολικής ή μερικής.
Κανείς δεν μπορεί να συλλαμβάνεται, να κρατείται ή να εξορίζεται αυθαίρετα.""",
    "en": """All human beings are born free and equal in dignity and rights.
They are endowed with reason and conscience and should act towards one another in a spirit of brotherhood.
Everyone has the right to life, liberty and security of person.
No one shall be held in slavery or servitude.
Everyone has the right to recognition everywhere as a person before the law.
No one shall be subjected to arbitrary arrest, detention or exile.""",
    "zh": """人人生而自由，在尊严和权利上一律平等。
他们赋有理性和良心，并应以兄弟关系的精神相对待。
人人有权享有生命、自由和人身安全。
任何人不得使为奴隶或奴役。
人人在任何地方有权被承认在法律前的人格。
任何人不得加以任意逮捕、拘禁或放逐。""",
}
LANGUAGES = sorted(SENTENCES)
LINES = {"de": 150, "el": 30, "en": 75, "zh": 45}  # of the training set
HELD_OUT = {"valid": 13, "test": 11}


def write_languages(folder: Path, lines: dict[str, int] = LINES) -> Path:
    """Dictionary, binarised splits, text and manifest of some languages; the folder."""
    folder.mkdir()
    dictionary = build_dictionary()
    dictionary.save(str(folder / "dict.txt"))
    languages = {}
    for language, count in lines.items():
        splits = {}
        for number, (split, size) in enumerate([("train", count), *HELD_OUT.items()]):
            splits[split] = write_split(folder, language, split, documents_of(language, size, number), dictionary)
        languages[language] = {"sources": ["UDHR"], "splits": splits}
    files = {str(path.relative_to(folder)): {"sha256": sha256(path)} for path in sorted(folder.rglob("*.*"))}
    manifest = {"source": {"name": "text"}, "languages": languages, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def build_dictionary() -> Dictionary:
    """Every character of the sentences, and the symbols of XNLI's languages."""
    dictionary = Dictionary()
    for character in sorted({character for text in SENTENCES.values() for character in pieces(text)} - {"\n"}):
        dictionary.add_symbol(character)
    for code in XNLI_LANGUAGES:
        dictionary.add_symbol(language_symbol(code), n=0)
    return dictionary


def pieces(text: str) -> list[str]:
    return list(text.replace(" ", "▁"))


def documents_of(language: str, lines: int, seed: int) -> list[list[str]]:
    """Documents of one to six lines, each line one or two sentences."""
    generator = random.Random(f"{language}{seed}")
    sentences = SENTENCES[language].splitlines()
    made: list[list[str]] = []
    while lines:
        size = min(lines, generator.randint(1, 6))
        made.append([" ".join(generator.sample(sentences, generator.randint(1, 2))) for _ in range(size)])
        lines -= size
    return made


def write_split(
    folder: Path, language: str, split: str, documents: list[list[str]], dictionary: Dictionary
) -> dict[str, int]:
    """Binarise documents, apart by empty lines; their counts."""
    lines = [line for document in documents for line in ["", *document]][1:]
    text = folder / "text" / language / f"{split}.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    prefix = folder / language / split
    prefix.parent.mkdir(exist_ok=True)
    builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    items = [[dictionary.index(piece) for piece in pieces(line)] + [dictionary.eos()] for line in lines]
    for item in items:
        builder.add_item(torch.tensor(item))
    builder.finalize(f"{prefix}.idx")
    return {
        "documents": len(documents),
        "lines": sum(map(len, documents)),
        "words": sum(len(line.split()) for line in lines),
        "bytes": text.stat().st_size,
        "chars": sum(len(line) + 1 for line in lines),
        "tokens": sum(map(len, items)),
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
