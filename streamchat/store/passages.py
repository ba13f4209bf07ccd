"""A full-text index of the passages of one conversation: FTS5 in memory, with the statistics of this conversation only.

The index of saved messages (`streamchat.store.search`) cannot be used for this: it contains the words of all sessions,
and nothing of a conversation that is not saved.
"""

from __future__ import annotations

import re
import sqlite3
import unicodedata
from collections.abc import Sequence

from streamchat.store.search import UNSEGMENTED

_MARKS = "".join(sign for sign in map(chr, range(0x0300, 0x1E00)) if unicodedata.category(sign).startswith("M"))
"""Accents that follow their letter, and vowels of Indic scripts: FTS5 reads a quoted word with them as a phrase."""
_WORD = re.compile(rf"[^\W_](?:[^\W_]|[{_MARKS}])*")
_RUN = re.compile(f"{UNSEGMENTED.pattern}+")


def words_of(text: str) -> list[str]:
    """Split a text into words as the index does, before stemming; scripts without spaces give pairs of characters."""
    return _WORD.findall(_in_pairs(text))


def _in_pairs(text: str) -> str:
    """Replace each run of a script without spaces by overlapping pairs of its characters, separated by spaces."""
    return _RUN.sub(lambda run: f" {' '.join(_pairs(run[0]))} ", text)


def _pairs(run: str) -> list[str]:
    return [run[at : at + 2] for at in range(len(run) - 1)] or [run]


class PassageIndex:
    """Finds passages by their words. English words are compared by their stems.

    Passages are numbered from 0, and are added and removed only at the end. One thread may use the index at a time.
    """

    def __init__(self) -> None:
        self._connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        tokenizer = "porter unicode61 remove_diacritics 2"
        self._connection.execute(f"CREATE VIRTUAL TABLE passages USING fts5 (text, tokenize = '{tokenizer}')")
        self.count = 0
        """Number of passages."""

    def close(self) -> None:
        """Free the index."""
        self._connection.close()

    def add(self, texts: Sequence[str]) -> None:
        """Append passages."""
        rows = [(self.count + number + 1, _in_pairs(text)) for number, text in enumerate(texts)]
        self._connection.executemany("INSERT INTO passages (rowid, text) VALUES (?, ?)", rows)
        self.count += len(rows)

    def cut(self, count: int) -> None:
        """Keep the first `count` passages, and remove the others."""
        self._connection.execute("DELETE FROM passages WHERE rowid > ?", (count,))
        self.count = min(self.count, count)

    def having(self, word: str, most: int) -> list[int] | None:
        """Return the numbers of the passages with this word in ascending order, or None if there are more than `most`.

        Args:
            word: A word as returned by `words_of`.
            most: Maximum number of passages. The search stops after the first one beyond it.
        """
        rows = self._connection.execute(
            "SELECT rowid FROM passages WHERE passages MATCH ? LIMIT ?", (_quoted(word), most + 1)
        ).fetchall()
        return None if len(rows) > most else [row[0] - 1 for row in rows]

    def bm25(self, words: Sequence[str]) -> list[tuple[int, float]]:
        """Return (number, score) of the passages with any of these words, scored by FTS5's BM25, the best one first."""
        if not words:
            return []
        rows = self._connection.execute(
            "SELECT rowid, bm25(passages) FROM passages WHERE passages MATCH ? ORDER BY rank",
            (" OR ".join(map(_quoted, words)),),
        )
        return [(row[0] - 1, -row[1]) for row in rows]


def _quoted(word: str) -> str:
    return f'"{word}"'
