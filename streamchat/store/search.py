"""From what a user types to a search: words through the index of FTS5, the rest as substrings."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_TERM = re.compile(r'"([^"]*)"|(\S+)')
_UNSEGMENTED = re.compile(
    "["
    "\u0e00-\u0eff"  # Thai, Lao
    "\u0f00-\u0fff"  # Tibetan
    "\u1000-\u109f"  # Myanmar
    "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af"  # Hangul: particles follow a word without a space
    "\u1780-\u17ff"  # Khmer
    "\u2e80-\u9fff\uf900-\ufaff\uff66-\uff9f"  # Han, kana, bopomofo
    "\ua000-\ua4cf"  # Yi
    "\U00020000-\U0003ffff"  # more of Han
    "]"
)
"""Scripts that are written without spaces between words: the index holds a whole run of them as one word."""
_OF_NAMES = frozenset("#@%&/\\_")
"""Punctuation that makes another word of one, as in `C#` and `50%`; what ends a sentence does not."""
_AS_ONE_LIKES = frozenset("*`")
"""Marks that are set around words, or typed for "whatever follows"."""
AROUND = 60
"""Characters of an excerpt on each side of what was found."""


@dataclass(frozen=True)
class Query:
    """What a message must have."""

    match: str
    """For MATCH of FTS5; '' for nothing."""
    substrings: tuple[str, ...]
    """Each somewhere in the text."""

    def __bool__(self) -> bool:
        return bool(self.match or self.substrings)

    def where(self) -> tuple[str, list[str]]:
        """A condition on `messages m` and its values; the table `words` must be joined if there is `match`."""
        conditions = ["words MATCH ?"] if self.match else []
        values = [self.match] if self.match else []
        for text in self.substrings:
            conditions.append("m.text LIKE ? ESCAPE '\\'")
            values.append(like(text))
        return " AND ".join(conditions), values


def query_of(words: str) -> Query:
    """A query for messages with all of these words; the last one may be the start of a word.

    Words in double quotes must follow each other. Everything else is taken literally, symbols inside words included.
    Symbols alone, and words of scripts without spaces, may stand anywhere in a message.
    """
    terms: list[str] = []
    substrings: list[str] = []
    for found in _TERM.finditer(words):
        quoted = found[1] is not None
        text = (found[1] if quoted else found[2]).replace('"', "").replace("\0", "").strip()
        if _UNSEGMENTED.search(text) or (text and not any(character.isalnum() for character in text)):
            substrings.append(text)
        elif text:
            # what FTS5 splits at, such as the hyphen of "well-known", becomes a phrase
            terms.append(f'"{text}"' + ("" if quoted else "*" if found.end() == len(words) else ""))
            substrings += _with_symbols(text)
    return Query(" ".join(terms), tuple(substrings))


def _with_symbols(text: str) -> list[str]:
    """Parts of `text` with a symbol, which the index leaves out: `c++` would find every `c`.

    Only with letters of ASCII around it: LIKE does not know the capitals of others.
    """
    kept = (each if _is_symbol(each) or (each.isascii() and each.isalnum()) else " " for each in text)
    return [run for run in "".join(kept).split() if any(map(_is_symbol, run))]


def _is_symbol(character: str) -> bool:
    if character in _AS_ONE_LIKES:
        return False
    return character in _OF_NAMES or unicodedata.category(character).startswith("S")


def like(text: str) -> str:
    """The pattern of LIKE for `text` anywhere."""
    escaped = text.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_")
    return f"%{escaped}%"


def excerpt(text: str, wanted: str) -> str:
    """The surroundings of the first `wanted` in `text`, on one line; the start of `text` if it is not there."""
    at = max(0, text.casefold().find(wanted.casefold()))
    start, stop = max(0, at - AROUND), at + len(wanted) + AROUND
    cut = " ".join(text[start:stop].split())
    return f"{'…' if start else ''}{cut}{'…' if stop < len(text) else ''}"
