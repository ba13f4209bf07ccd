"""Find code in a message: Markdown's fenced blocks and inline code."""

from __future__ import annotations

import re
from collections.abc import Iterator

_FENCE = re.compile(r"[ \t>]*(`{3,}|~{3,})(.*)")
_TICKS = re.compile(r"`+")
_BLANK = re.compile(r"\n[ \t]*\n")


def code_spans(text: str) -> list[tuple[int, int]]:
    """Return (start, end) of each piece of code in `text`, in order. An unclosed fence extends to the end."""
    fences = list(_fenced(text))
    spans: list[tuple[int, int]] = []
    position = 0
    for start, end in [*fences, (len(text), len(text))]:
        spans += _inline(text, position, start)
        if start < end:
            spans.append((start, end))
        position = end
    return spans


def _fenced(text: str) -> Iterator[tuple[int, int]]:
    opened: tuple[int, str] | None = None
    position = 0
    for line in text.splitlines(keepends=True):
        match = _FENCE.match(line.rstrip("\r\n"))
        if match is not None:
            mark, rest = match[1], match[2]
            if opened is None:
                # more backticks on the same line: inline code
                if mark[0] == "~" or "`" not in rest:
                    opened = position, mark
            elif mark.startswith(opened[1]) and not rest.strip():
                yield opened[0], position + len(line)
                opened = None
        position += len(line)
    if opened is not None:
        yield opened[0], len(text)


def _inline(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of inline code: two backtick runs of equal length within a paragraph."""
    breaks = [match.start() for match in _BLANK.finditer(text, start, end)]
    for begin, stop in zip([start, *breaks], [*breaks, end], strict=True):
        runs = list(_TICKS.finditer(text, begin, stop))
        later: dict[int, list[int]] = {}
        for index, run in enumerate(runs):
            later.setdefault(len(run[0]), []).append(index)
        used = -1
        for index, run in enumerate(runs):
            same = later[len(run[0])]
            same.pop(0)
            if index > used and same:
                used = same[0]
                yield run.start(), runs[used].end()
