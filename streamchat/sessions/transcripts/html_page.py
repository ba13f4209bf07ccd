"""Exports a saved session as one HTML page, which loads nothing and in which no message is more than text.

Three things keep a hostile message inert: the Markdown parser escapes HTML, images become links, and links have the
schemes of `SCHEMES` only; Jinja escapes all other texts; and the page forbids scripts and requests to itself (its
content security policy).
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from streamchat.base.formatting import human_speed, plural
from streamchat.base.sanitize import one_line, printable
from streamchat.base.thinking import ONLY_REASONING, split
from streamchat.config.settings import setting_fields, spec_of
from streamchat.sessions.transcripts.context import (
    EDGE,
    TokenRun,
    TurnVisibility,
    edge_of,
    fork_sentence,
    is_pinned,
    recalled_text,
    system_prompt,
    token_runs,
    turn_visibility,
)
from streamchat.store.records import StoredEviction, StoredSession, StoredTurn

SCHEMES = ("http", "https", "mailto")
"""Schemes that links may have."""
SHOWN_SECTIONS = ("cache", "generation", "chat")
"""Settings to show; those of the machine and of the model's place are nobody's business."""
HEADING_LEVEL = 3
"""Level of the headings above a message; those inside it are lower."""
_LABELS: dict[TurnVisibility, str] = {"seen": "", "partly": "partly in context", "forgotten": "evicted"}
_REASONS = {"cancelled": "stopped", "length": "stopped at the limit", "loop": "stopped, as it repeated itself"}


@dataclass(frozen=True)
class _TurnView:
    """What the page shows of one turn."""

    number: int
    visibility: TurnVisibility
    label: str
    is_pinned: bool
    starts_context: bool
    sent: str
    """Time of the message; '' if it is unknown."""
    text: str
    thoughts: Any
    """The reasoning as HTML; '' for none."""
    answer: Any
    no_answer: str
    """What stands in place of an empty answer."""
    figures: str
    evictions: list[str]
    """Sentences about tokens that this turn evicted."""


def html_page(session: StoredSession) -> str:
    """Return the page."""
    import jinja2

    info = session.info
    source = (resources.files("streamchat.sessions.transcripts") / "page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    has_cache = not info.is_imported
    runs = token_runs(session) if has_cache else []
    page = environment.from_string(source).render(
        title=one_line(info.title),
        model=one_line(info.model_name),
        precision=one_line(info.dtype),
        created=_date(info.created),
        updated=_date(info.updated),
        turn_count=plural(len(session.turns), "turn"),
        is_imported=info.is_imported,
        fork=fork_sentence(info),
        system_prompt=printable(system_prompt(session)),
        settings=_settings(session),
        runs=runs,
        summary=_summary(session, runs),
        turns=list(_turns(session)),
        edge=EDGE,
    )
    return f"{page}\n"


def _settings(session: StoredSession) -> list[tuple[str, str]]:
    given, known = session.info.settings, setting_fields()
    names = [name for name in given if name in known and spec_of(name).section in SHOWN_SECTIONS]
    return [(name, one_line(str(given[name]))) for name in names if name != "system_prompt"]


def _summary(session: StoredSession, runs: Sequence[TokenRun]) -> str:
    """Describe the cache: `The model sees 60 of 90 tokens (4 sinks, 0 pinned, 56 recent); 30 were evicted ...`."""
    tokens = Counter[str]()
    for run in runs:
        tokens[run.state] += run.tokens
    cached = tokens["sinks"] + tokens["pinned"] + tokens["cached"]
    parts = f"{plural(tokens['sinks'], 'sink')}, {tokens['pinned']:,} pinned, {tokens['cached']:,} recent"
    evicted, compressions = tokens["evicted"], session.info.compressions
    text = f"The model sees {cached:,} of {plural(sum(tokens.values()), 'token')} ({parts})"
    return f"{text}; {evicted:,} were evicted in {plural(compressions, 'compression')}." if evicted else f"{text}."


def _turns(session: StoredSession) -> Iterator[_TurnView]:
    seen, edge = turn_visibility(session), edge_of(session)
    evictions = defaultdict[int, list[StoredEviction]](list)
    for eviction in session.evictions:
        evictions[eviction.turn].append(eviction)
    ends = list(map(_end, session.turns))
    thinking, has_cache = str(session.info.settings.get("thinking", "")), not session.info.is_imported
    for turn in session.turns:
        thoughts, answer = split(turn.reply)
        visibility = seen[turn.number] if has_cache else "seen"
        yield _TurnView(
            turn.number,
            visibility,
            _LABELS[visibility],
            has_cache and is_pinned(session, turn),
            has_cache and turn.number == edge,
            _date(turn.started) if turn.started else "",
            printable(turn.text),
            markdown_html(thoughts) if thoughts and thinking != "hide" else "",
            markdown_html(answer) if answer else "",
            ONLY_REASONING if thoughts else "no reply",
            _figures(turn),
            [_eviction_text(session.turns, ends, each) for each in evictions[turn.number]],
        )


def _figures(turn: StoredTurn) -> str:
    """Return `stopped · 120 tokens · 31.0 tok/s`, as far as it is known."""
    stats = turn.stats or {}
    parts = [_REASONS.get(turn.finish_reason or "", "")]
    if isinstance(count := stats.get("new_tokens"), int) and count:
        parts.append(plural(count, "token"))
    if isinstance(speed := stats.get("decode_tps"), float):
        parts.append(human_speed(speed))
    parts.append(recalled_text(turn))
    return " · ".join(filter(None, parts))


def _eviction_text(turns: Sequence[StoredTurn], ends: Sequence[int], eviction: StoredEviction) -> str:
    """Describe an eviction; `ends` are the ends of `turns` in the token log, which ascend as their starts do."""
    count = sum(stop - first for first, stop in eviction.runs)
    lost = sorted(
        {
            at
            for first, stop in eviction.runs
            for at in range(bisect_right(ends, first), bisect_left(turns, stop, key=lambda turn: turn.start))
        }
    )
    numbers = [turns[at].number for at in (lost[:1] + lost[-1:])]
    named = f" of turn {numbers[0]}" if len(lost) == 1 else f" of turns {numbers[0]} to {numbers[1]}" if lost else ""
    return f"{plural(count, 'token')}{named} evicted"


def _end(turn: StoredTurn) -> int:
    return turn.start + len(turn.ids)


def _date(then: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(then))


# --- Markdown -----------------------------------------------------------------------------------------------------


def markdown_html(text: str) -> Any:
    """Return Markdown as HTML that contains only text, its structure and safe links."""
    from markupsafe import Markup

    return Markup(_renderer().render(printable(text)))


def is_safe_link(address: str) -> bool:
    """Return whether an address is absolute and has one of `SCHEMES`."""
    return re.match(rf"(?:{'|'.join(SCHEMES)}):", address, re.IGNORECASE | re.ASCII) is not None


@cache
def _renderer() -> Any:
    from markdown_it import MarkdownIt  # deferred: slow to import, and only exports need it

    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable("image")
    setattr(parser, "validateLink", is_safe_link)  # noqa: B010 - the documented way; its type is that of a method
    parser.add_render_rule("heading_open", _heading)
    parser.add_render_rule("heading_close", _heading)
    parser.add_render_rule("link_open", _link)
    return parser


def _heading(renderer: Any, tokens: Any, at: int, options: Any, env: Any) -> str:
    token = tokens[at]
    token.tag = f"h{min(6, HEADING_LEVEL + int(token.tag[1:]))}"
    return str(renderer.renderToken(tokens, at, options, env))


def _link(renderer: Any, tokens: Any, at: int, options: Any, env: Any) -> str:
    """Show where a link goes, and send nothing about this page there. A link without an address, `[x]()`, is text."""
    token = tokens[at]
    address = str(token.attrGet("href") or "")
    if is_safe_link(address):
        token.attrSet("title", address)
        token.attrSet("rel", "noopener noreferrer nofollow")
    else:
        token.attrs = {}  # the parser asks `validateLink` only about addresses that are not empty
    return str(renderer.renderToken(tokens, at, options, env))
