"""From what a user types to a query of FTS5, in which quotes, stars and words such as NOT mean something."""

from __future__ import annotations

import re

_WORD = re.compile(r'"([^"]*)"|(\S+)')


def query_of(words: str) -> str:
    """A query for messages with all of these words; the last one may be the start of a word. '' without any.

    Words in double quotes must follow each other. Everything else is taken literally.
    """
    terms = []
    for match in _WORD.finditer(words):
        quoted = match[1] is not None
        text = (match[1] if quoted else match[2]).replace('"', "").replace("\0", "")
        if any(character.isalnum() for character in text):
            # what FTS5 splits at, such as the hyphen of "well-known", becomes a phrase
            terms.append(f'"{text}"' + ("" if quoted else "*" if match.end() == len(words) else ""))
    return " ".join(terms)
