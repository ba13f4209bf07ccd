"""Exports a saved session as Markdown or HTML for people, or as JSON lines for programs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from streamchat.base.atomic_files import advice_or, write_new
from streamchat.base.errors import StoreError, reason_of
from streamchat.base.formatting import plural
from streamchat.base.jsonlines import json_line
from streamchat.base.thinking import ONLY_REASONING, split
from streamchat.sessions.transcripts.contained import contained, literal
from streamchat.sessions.transcripts.context import (
    EDGE,
    edge_of,
    fork_of,
    fork_sentence,
    is_pinned,
    recalled_text,
    recalled_turns,
    system_prompt,
)
from streamchat.store.records import StoredSession

Format = Literal["markdown", "html", "jsonl", "replay"]
FORMATS: dict[str, Format] = {".md": "markdown", ".html": "html", ".jsonl": "jsonl", ".json": "replay"}
"""Format by file name extension."""
VERSION = 1


def export(session: StoredSession, kind: Format) -> str:
    """Return the whole text of the file.

    `markdown` and `html` are for reading and mark where the model's context starts; `jsonl` has everything that
    `imported` needs, one message per line; `replay` is one line {"messages": [...]}, the format of `streamchat replay`
    and many data sets.
    """
    if kind == "markdown":
        return "\n".join(_markdown(session)) + "\n"
    if kind == "html":
        from streamchat.sessions.transcripts.html_page import html_page  # deferred: imports Jinja

        return html_page(session)
    if kind == "replay":
        fork = {"fork": found} if (found := fork_of(session.info)) else {}
        return json_line({"id": session.info.id, **fork, "messages": _messages(session)}) + "\n"
    return "".join(json_line(row) + "\n" for row in _rows(session))


def write_export(path: Path, text: str) -> None:
    """Write a new file that only the user can read.

    Raises:
        StoreError: The file exists or cannot be written.
    """
    try:
        write_new(path, text, durable=True)  # its session may be deleted next
    except FileExistsError:
        raise StoreError(f"{path} already exists; choose another name") from None
    except (OSError, ValueError) as error:
        advice = advice_or(getattr(error, "errno", None), "choose another name")
        raise StoreError(f"{path} cannot be written ({reason_of(error)}); {advice}") from error


def _messages(session: StoredSession) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": prompt}] if (prompt := system_prompt(session)) else []
    for turn in session.turns:
        messages.append({"role": "user", "content": turn.text})
        if turn.reply:
            messages.append({"role": "assistant", "content": turn.reply})
    return messages


def _rows(session: StoredSession) -> Iterator[dict[str, Any]]:
    info = session.info
    yield {
        "streamchat": VERSION,
        "id": info.id,
        "title": info.title,
        "created": info.created,
        "model": info.model,
        "model_name": info.model_name,
        "settings": dict(info.settings),
        **({"fork": fork} if (fork := fork_of(info)) else {}),
    }
    for turn in session.turns:
        about = {"turn": turn.number, "at": turn.started}
        yield {"role": "user", "content": turn.text, **about}
        more: dict[str, Any] = {"finish_reason": turn.finish_reason} if turn.finish_reason else {}
        if recalled := recalled_turns(turn):
            more["recalled"] = recalled
        yield {"role": "assistant", "content": turn.reply, **about, **more}


# --- Markdown ---------------------------------------------------------------------------------------------------


def _markdown(session: StoredSession) -> Iterator[str]:
    info = session.info
    yield f"# {literal(info.title)}"
    yield ""
    turns = plural(len(session.turns), "turn")
    yield f"{literal(info.model_name)}, {_date(info.created)} to {_date(info.updated)}, {turns}"
    if sentence := fork_sentence(info):
        yield ""
        yield literal(sentence)
    if prompt := system_prompt(session):
        yield ""
        yield "## System prompt"
        yield ""
        yield contained(prompt)
    edge = edge_of(session)
    for turn in session.turns:
        if turn.number == edge:
            yield ""
            yield "---"
            yield ""
            yield f"*{EDGE}*"
            yield ""
            yield "---"
        pinned = " (pinned)" if is_pinned(session, turn) else ""
        yield ""
        yield f"## {turn.number}. You{pinned}"
        yield ""
        yield contained(turn.text)
        yield ""
        yield f"## {turn.number}. {literal(info.model_name)}"
        yield ""
        if recalled := recalled_text(turn):
            yield f"*({recalled})*"
            yield ""
        yield from _reply(turn.reply, str(info.settings.get("thinking", "")))


def _reply(reply: str, thinking: str) -> Iterator[str]:
    """Yield the answer, preceded by the reasoning as a quotation unless it is hidden."""
    thoughts, answer = split(reply)
    if thoughts and thinking != "hide":
        yield "> *Reasoning*"
        yield ">"
        yield from (f"> {line}".rstrip() for line in contained(thoughts).splitlines())
        yield ""
    yield contained(answer) or (f"*({ONLY_REASONING})*" if thoughts else "*(no reply)*")


def _date(then: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(then))
