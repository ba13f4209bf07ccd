"""A message as Markdown inside a larger document: it ends where it ends, and does not look like the document's parts.

What a message can do to its neighbors: a fence or an HTML block that stays open swallows them, raw HTML reaches over
block boundaries in a browser, a link reference or a footnote is global, and headings look like those of turns. Each is
found with a CommonMark parser and changed by as little as possible, in a way that shows the reader the same text.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

PASSES = 12
"""Escaping one construct may reveal another, such as a fence inside an HTML block. Beyond this a message is fenced."""
MESSAGE_LEVEL = 3
"""Highest level of a heading in a message; the document's own are above."""
_MAY_MATTER = re.compile(r"[<#=\-\[`~]")
_AUTOLINK = re.compile(r"<(?:[A-Za-z][A-Za-z0-9+.-]{1,31}:[^<>\x00-\x20]*|[\w.!#$%&'*+/=?^`{|}~-]+@[\w.-]+)>")
_FOOTNOTE = re.compile(r"^([ \t>]*)\[\^(?=[^\]]+\]:)")
_SPECIAL = re.compile(r"([\\`*_\[\]<>&~|#!])")


def literal(text: str) -> str:
    """`text` on one line, escaped so that Markdown shows it as it is."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def contained(text: str) -> str:
    """`text` as Markdown that cannot change how the text around it is read, if blank lines separate them."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not _MAY_MATTER.search(text):
        return text
    lines = text.split("\n")
    for _ in range(PASSES):
        before = list(lines)
        _escape(lines)
        if lines == before:
            break
    _close_fence(lines)
    done = "\n".join(lines)
    return done if _is_contained(done) else _fenced(text)


@cache
def _parser() -> Any:
    from markdown_it import MarkdownIt  # not at the start of every program

    return MarkdownIt("commonmark").enable(["table", "strikethrough"])


def _parsed(text: str) -> tuple[list[Any], list[tuple[int, int]]]:
    """The tokens, and the lines of all link references."""
    env: dict[str, Any] = {}
    tokens: list[Any] = _parser().parse(text, env)
    references = [*env.get("references", {}).values(), *env.get("duplicate_refs", [])]
    return tokens, [reference["map"] for reference in references]


def _escape(lines: list[str]) -> None:
    """One pass over all constructs, in place; the number of lines stays."""
    tokens, references = _parsed("\n".join(lines))
    for first, _ in references:
        lines[first] = _before_first("[", "\\", lines[first])
    for token in tokens:
        first, stop = token.map or (0, 0)
        if token.type == "heading_open" and _level(token) < MESSAGE_LEVEL:
            if token.markup.startswith("#"):
                lines[first] = _before_first("#", "##", lines[first])
            else:
                lines[stop - 1] = _before_first(token.markup[0], "\\", lines[stop - 1])
        elif _has_html(token):
            lines[first:stop] = _without_html("\n".join(lines[first:stop])).split("\n")
        elif token.type == "inline":
            lines[first:stop] = [_FOOTNOTE.sub(r"\1\\[^", line) for line in lines[first:stop]]


def _level(heading: Any) -> int:
    return int(heading.tag[1:])


def _has_html(token: Any) -> bool:
    return token.type == "html_block" or any(child.type == "html_inline" for child in token.children or ())


def _before_first(mark: str, added: str, line: str) -> str:
    """`line` with `added` in front of the first `mark`: containers (`>`, lists) are written with other characters."""
    return line.replace(mark, added + mark, 1)


def _without_html(text: str) -> str:
    """`text` with every `<` escaped that may begin HTML; code spans, autolinks and what is escaped stay."""
    out: list[str] = []
    at = 0
    while at < len(text):
        letter = text[at]
        end = at + 1
        if letter == "\\":
            end = at + 2
        elif letter == "`":
            end = _end_of_code(text, at)
        elif letter == "<":
            if link := _AUTOLINK.match(text, at):
                end = link.end()
            elif re.match(r"[A-Za-z/!?]", text[end : end + 1]):
                out.append("\\")
        out.append(text[at:end])
        at = end
    return "".join(out)


def _end_of_code(text: str, at: int) -> int:
    """Where the code span that may begin at `at` ends; where its backticks end if it is none."""
    ticks = re.compile(r"`+").match(text, at)
    assert ticks is not None
    closing = re.compile(rf"(?<!`)`{{{len(ticks[0])}}}(?!`)").search(text, ticks.end())
    return closing.end() if closing else ticks.end()


def _close_fence(lines: list[str]) -> None:
    """Append the end of a fence that is open at the end of the message."""
    tokens, _ = _parsed("\n".join(lines))
    if not tokens or tokens[-1].type != "fence" or tokens[-1].level:  # a nested one ends with its list or quote
        return
    fence = tokens[-1]
    first, stop = fence.map
    mark = fence.markup
    last = lines[stop - 1] if stop - 1 > first else ""
    if not re.fullmatch(rf" {{0,3}}{re.escape(mark[0])}{{{len(mark)},}}[ \t]*", last):
        lines.append(mark)


def _is_contained(text: str) -> bool:
    """Whether a heading behind `text` is one at the top level, and nothing in `text` reaches out of it."""
    tokens, references = _parsed(f"{text}\n\n## end\n")
    headings = [token for token in tokens if token.type == "heading_open" and _level(token) < MESSAGE_LEVEL]
    last = tokens[-3:]
    ends = [token.type for token in last] == ["heading_open", "inline", "heading_close"] and last[1].content == "end"
    return ends and headings == [last[0]] and not last[0].level and not references and not any(map(_has_html, tokens))


def _fenced(text: str) -> str:
    """`text` as a block of code that nothing in it can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
