"""Converts what a user types to a search: words through the FTS5 index, the rest as substrings."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from streamchat.store.records import SearchHit

_TERM = re.compile(r'"([^"]*)"|(\S+)')
UNSEGMENTED = re.compile(
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
"""Scripts that are written without spaces between words: the index has a whole run of them as one word."""
_PART_OF_NAMES = frozenset("#@%&/\\_")
"""Punctuation that changes a word, as in `C#` and `50%`; punctuation that ends a sentence does not."""
_IGNORED = frozenset("*`")
"""Characters that are set around words, or typed as a wildcard."""
AROUND = 60
"""Characters of an excerpt on each side of the match."""


@dataclass(frozen=True)
class Query:
    """Conditions on a message."""

    match: str
    """Expression for FTS5's MATCH; '' for none."""
    substrings: tuple[str, ...]
    """Texts that the message must contain."""

    def __bool__(self) -> bool:
        return bool(self.match or self.substrings)

    def where(self) -> tuple[str, list[str]]:
        """Return an SQL condition on `messages m` and its values. Join the table `words` if `match` is not empty."""
        conditions = ["words MATCH ?"] if self.match else []
        values = [self.match] if self.match else []
        for text in self.substrings:
            conditions.append("m.text LIKE ? ESCAPE '\\'")
            values.append(like(text))
        return " AND ".join(conditions), values


def query_of(words: str) -> Query:
    """Return a query for messages with all of these words; the last one may be the start of a word.

    Words in double quotes must follow each other. Everything else is literal, including symbols inside words. Symbols
    alone, and words of scripts without spaces, match anywhere in a message.
    """
    terms: list[str] = []
    substrings: list[str] = []
    for found in _TERM.finditer(words):
        quoted = found[1] is not None
        text = (found[1] if quoted else found[2]).replace('"', "").replace("\0", "").strip()
        if UNSEGMENTED.search(text) or (text and not any(character.isalnum() for character in text)):
            substrings.append(text)
        elif text:
            # a word that FTS5 splits, such as "well-known" at its hyphen, becomes a phrase
            terms.append(f'"{text}"' + ("" if quoted else "*" if found.end() == len(words) else ""))
            substrings += _with_symbols(text)
    return Query(" ".join(terms), tuple(substrings))


def _with_symbols(text: str) -> list[str]:
    """Return the parts of `text` with a symbol. The index ignores symbols: `c++` would match every `c`.

    Only ASCII letters around the symbol are included: LIKE ignores case for ASCII only.
    """
    kept = (each if _is_symbol(each) or (each.isascii() and each.isalnum()) else " " for each in text)
    return [run for run in "".join(kept).split() if any(map(_is_symbol, run))]


def _is_symbol(character: str) -> bool:
    if character in _IGNORED:
        return False
    return character in _PART_OF_NAMES or unicodedata.category(character).startswith("S")


def like(text: str) -> str:
    """Return a LIKE pattern that matches `text` anywhere."""
    escaped = text.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_")
    return f"%{escaped}%"


def excerpt(text: str, wanted: str) -> str:
    """Return the text around the first `wanted` in `text`, on one line; the start of `text` without a match."""
    at = max(0, text.casefold().find(wanted.casefold()))
    start, stop = max(0, at - AROUND), at + len(wanted) + AROUND
    cut = " ".join(text[start:stop].split())
    return f"{'…' if start else ''}{cut}{'…' if stop < len(text) else ''}"


def without_copies(found: Sequence[SearchHit], here: str | None) -> list[SearchHit]:
    """Return search results without copies of a message, which forks of a session share.

    Of the copies, one whose turn was not undone is kept, that of the session `here` if it has one.
    """
    kept: dict[tuple[float, str, str], SearchHit] = {}
    for hit in found:
        key = (hit.at, hit.role, hit.text)
        if key not in kept or _rank(hit, here) < _rank(kept[key], here):
            kept[key] = hit
    return list(kept.values())


def _rank(hit: SearchHit, here: str | None) -> tuple[bool, bool]:
    return hit.undone, hit.session != here
