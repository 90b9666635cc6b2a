"""Words of a caption as the COCO evaluation counts them: Penn Treebank tokens in lower case without punctuation."""

import re

# What the COCO evaluation removes; for it a double quotation mark is one of `` and ''. Its list has the brackets in
# capitals, after lower-casing, so that those stay as words; and of repeated marks ("?!", "!!") it has none.
REMOVED = frozenset(("''", "'", "’", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"))
_TYPOGRAPHY = str.maketrans({
    "“": '"', "”": '"', "«": '"', "»": '"', "‘": "'", "–": " -- ", "—": " -- ", "…": " ... ", "\u00a0": " ",
    "€": "$", "£": "#", "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
})  # fmt: skip
_CURLY_CLITIC = re.compile(r"(?<=\w)’(?=(?:s|t|m|d|re|ve|ll)\b)", re.IGNORECASE)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

# Anything but space, ASCII punctuation and other scripts' punctuation: marks that combine are parts of words.
_CHAR = (
    r"[^\s!-/:-@\[-`{-~\u00a1-\u00a9\u00ab-\u00b4\u00b6-\u00b9\u00bb-\u00bf"
    r"\u2010-\u206f\u3001-\u303f\u06d4\uff01-\uff0f]"
)
_ABBREVIATIONS = (
    r"mr|mrs|ms|dr|st|jr|sr|prof|gen|col|capt|lt|sgt|rev|gov|sen|ave|blvd|rd|mt|ft|vs|etc|ph\.d|inc|ltd|co|corp|bros"
)
_TOKEN = re.compile(
    rf"""
    https?://\S+ | www\.\S*{_CHAR} | [\w.+-]+@[\w-]+(?:\.[\w-]+)+  # addresses
    | \.\.\. | --+ | [?!]+
    | (?:{_ABBREVIATIONS})\.(?!\w) | no\.(?=\s*\d)
    | (?:[^\W\d_]\.){{2,}} | (?-i:\b[A-Z]\.(?=\s+[A-Z]))  # U.S., J. Smith
    | '\d\ds? | '(?:em|til|tis|twas|cause|n|s|m|d|re|ve|ll)(?!{_CHAR})
    | [\#@][^\W\d]\w*
    | (?-i:[A-Z]+(?:&[A-Z]+)+)  # AT&T
    | \d+(?:[,:]\d+)+ | \d*\.\d+
    | {_CHAR}+(?:(?:['’._-]|(?<=[\x00-\x7f])/(?=[\x00-\x7f])){_CHAR}+)*  # man-made, o'clock, man's, red/blue
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CLITIC = re.compile(r"(.+?)(n't|'(?:s|m|d|re|ve|ll))")
_TWO_WORDS = {
    "cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na"),
    "gimme": ("gim", "me"), "lemme": ("lem", "me"), "'tis": ("'t", "is"), "'twas": ("'t", "was"),
}  # fmt: skip


def tokenize(caption: str) -> list[str]:
    """The caption's words: lower case, clitics apart, brackets spelt out, the punctuation of ``REMOVED`` left out.

    The COCO evaluation calls Stanford's PTBTokenizer, a Java program; this is our own reading of the same conventions,
    so that scores need no Java. Languages written without spaces stay in one piece, as there.
    """
    text = _CURLY_CLITIC.sub("'", caption).translate(_TYPOGRAPHY)
    words = (word for match in _TOKEN.finditer(text) for word in _split(match.group().lower()))
    return [word for word in words if word not in REMOVED]


def _split(token: str) -> tuple[str, ...]:
    """``("man", "'s")`` for ``man's``."""
    if token in _BRACKETS:
        return (_BRACKETS[token],)
    if token in _TWO_WORDS:
        return _TWO_WORDS[token]
    clitic = _CLITIC.fullmatch(token)
    return (token,) if clitic is None else (clitic[1], clitic[2])
