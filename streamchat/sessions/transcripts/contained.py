"""Embeds a message as Markdown in a larger document without affecting the rest of the document.

A message could affect its neighbors: an unclosed fence or HTML block swallows them, raw HTML extends over block
boundaries in a browser, a link reference or a footnote is global, and headings look like those of turns. Each of these
is found with a CommonMark parser and escaped minimally, so that the rendered text stays the same.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

PASSES = 12
"""Escaping one construct may reveal another, such as a fence inside an HTML block. Beyond this a message is fenced."""
MESSAGE_LEVEL = 3
"""Highest level of a heading in a message; the levels above are the document's."""
_MAY_MATTER = re.compile(r"[<#=\-\[`~]")
_AUTOLINK = re.compile(r"<(?:[A-Za-z][A-Za-z0-9+.-]{1,31}:[^<>\x00-\x20]*|[\w.!#$%&'*+/=?^`{|}~-]+@[\w.-]+)>")
_FOOTNOTE = re.compile(r"^([ \t>]*)\[\^(?=[^\]]+\]:)")
_SPECIAL = re.compile(r"([\\`*_\[\]<>&~|#!])")


def literal(text: str) -> str:
    """Return `text` on one line, escaped so that Markdown renders it literally."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def contained(text: str) -> str:
    """Return `text` as Markdown that cannot affect the text around it, if blank lines separate them."""
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
    from markdown_it import MarkdownIt  # deferred: slow to import, and only exports need it

    return MarkdownIt("commonmark").enable(["table", "strikethrough"])


def _parsed(text: str) -> tuple[list[Any], list[tuple[int, int]]]:
    """Return the tokens, and the line ranges of all link references."""
    env: dict[str, Any] = {}
    tokens: list[Any] = _parser().parse(text, env)
    references = [*env.get("references", {}).values(), *env.get("duplicate_refs", [])]
    return tokens, [reference["map"] for reference in references]


def _escape(lines: list[str]) -> None:
    """Escape all constructs once, in place; the number of lines does not change."""
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
    """Insert `added` before the first `mark`, which is never part of a container prefix (`>`, list markers)."""
    return line.replace(mark, added + mark, 1)


def _without_html(text: str) -> str:
    """Escape every `<` that may start HTML, except in code spans, autolinks and existing escapes."""
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
    """Return the end of the code span at `at`, or the end of its backticks if it is not a code span."""
    ticks = re.compile(r"`+").match(text, at)
    assert ticks is not None
    closing = re.compile(rf"(?<!`)`{{{len(ticks[0])}}}(?!`)").search(text, ticks.end())
    return closing.end() if closing else ticks.end()


def _close_fence(lines: list[str]) -> None:
    """Close a fence that is still open at the end of the message."""
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
    """Return whether a heading after `text` is parsed as one at the top level, and `text` has no global effects."""
    tokens, references = _parsed(f"{text}\n\n## end\n")
    headings = [token for token in tokens if token.type == "heading_open" and _level(token) < MESSAGE_LEVEL]
    last = tokens[-3:]
    ends = [token.type for token in last] == ["heading_open", "inline", "heading_close"] and last[1].content == "end"
    return ends and headings == [last[0]] and not last[0].level and not references and not any(map(_has_html, tokens))


def _fenced(text: str) -> str:
    """Return `text` as a code block that no line of it can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
