"""User-facing messages for sessions and undo, shared by all front ends."""

from __future__ import annotations

from streamchat.base import events as ev
from streamchat.base.formatting import human_seconds, human_when, plural
from streamchat.base.sanitize import one_line
from streamchat.base.thinking import THINK, split
from streamchat.store.records import SearchHit, SessionInfo

EXCERPT_WORDS = 24


def undone_sentence(event: ev.TurnUndone) -> str:
    """What `/undo` did and how long it took."""
    text = f"Turn {event.turn} was undone."
    if event.restored:
        tokens = plural(event.restored, "evicted token was", "evicted tokens were")
        how = f"prefill took {human_seconds(event.seconds)}" if event.prefilled else "no prefill needed"
        text += f" {tokens} restored ({how})."
    elif event.prefilled:
        tokens = plural(event.prefilled, "token was", "tokens were")
        text += f" {tokens} prefilled again in {human_seconds(event.seconds)}."
    return text


def resumed_sentence(event: ev.ConversationResumed) -> str:
    """Which session was resumed, and how its cache was restored."""
    title, cached = one_line(event.title), plural(event.cache.length, "token")
    seconds = human_seconds(event.seconds)
    how = "prefilled again" if event.prefilled else f"restored in {seconds} without prefill"
    return f"“{title}” ({event.session}) resumed at turn {len(event.turns)}; {cached} cached, {how}."


def session_line(info: SessionInfo, now: float) -> str:
    """One line of the session list."""
    turns = plural(info.turns, "turn")
    name, title = one_line(info.model_name), one_line(info.title)
    return f"{info.id}  {human_when(info.updated, now):<14} {turns:>11}  {name}  {title}"


def search_hit_line(number: int, found: SearchHit, now: float, here: str | None, thinking: str) -> str:
    """One line of search results."""
    who = "you" if found.role == "user" else "model"
    place = f"turn {found.turn}" if found.session == here else f"{found.session}, turn {found.turn}"
    undone = ", undone" if found.undone else ""
    return f"{number:>3}. {human_when(found.at, now)}, {place}, {who}{undone}: {excerpt(found, thinking)}"


def excerpt(found: SearchHit, thinking: str) -> str:
    """The excerpt of a search result, without reasoning tags.

    With `thinking = hide`, an excerpt from the reasoning is replaced by the beginning of the answer.
    """
    text = " ".join(found.excerpt.replace(THINK.opening, " ").replace(THINK.closing, " ").split())
    if found.role == "user":
        return found.excerpt
    thoughts, answer = split(found.text)
    if thinking != "hide" or not thoughts or text.strip("…") in " ".join(answer.split()):
        return text
    return " ".join([*answer.split()[:EXCERPT_WORDS], "…"]) if answer else "(only reasoning)"


def quote_prompt(found: SearchHit, now: float) -> str:
    """The prompt that quotes a search result to the model."""
    who = "I said" if found.role == "user" else "you said"
    text = found.text if found.role == "user" else split(found.text)[1] or found.text
    lines = "\n".join(f"> {line}" for line in text.splitlines())
    return f"Remember what {who} {human_when(found.at, now)}:\n\n{lines}"


def note_prompt(text: str) -> str:
    """The prompt that gives the model a summary or a note to keep."""
    return f"Remember this about our conversation so far:\n\n{text}"


QUOTE_REPLY = "Noted."
"""The supplied reply to a quoted message."""
