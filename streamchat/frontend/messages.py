"""Sentences about saved conversations and turns taken back, the same in every face."""

from __future__ import annotations

from streamchat.base import events as ev
from streamchat.base.formatting import human_seconds, human_when, plural
from streamchat.base.sanitize import one_line
from streamchat.base.thinking import THINK, split
from streamchat.store.records import Found, SessionInfo

EXCERPT_WORDS = 24


def undone_sentence(event: ev.TurnUndone) -> str:
    """What taking a turn back came to, and what it cost."""
    text = f"Turn {event.turn} was taken back."
    if event.restored:
        tokens = plural(event.restored, "token that had left for it is", "tokens that had left for it are")
        text += f" {tokens} seen again"
        how = f"read again in {human_seconds(event.seconds)}" if event.prefilled else "nothing was read again"
        text += f" ({how})."
    elif event.prefilled:
        text += f" {plural(event.prefilled, 'token was', 'tokens were')} read again in {human_seconds(event.seconds)}."
    return text


def resumed_sentence(event: ev.ConversationResumed) -> str:
    """Which conversation goes on, and how its cache came back."""
    turns, title = plural(len(event.turns), "turn"), one_line(event.title)
    cache = f"{plural(event.cache.length, 'token')} in the cache"
    how = "read again" if event.prefilled else f"back in {human_seconds(event.seconds)}, nothing read again"
    return f"“{title}” ({event.session}) goes on after {turns}; {cache}, {how}."


def session_line(info: SessionInfo, now: float) -> str:
    """One line of a list."""
    turns = plural(info.turns, "turn")
    name, title = one_line(info.model_name), one_line(info.title)
    return f"{info.id}  {human_when(info.updated, now):<14} {turns:>11}  {name}  {title}"


def found_line(number: int, found: Found, now: float, here: str | None, thinking: str) -> str:
    """One line of what was found."""
    who = "you" if found.role == "user" else "model"
    place = f"turn {found.turn}" if found.session == here else f"{found.session}, turn {found.turn}"
    undone = ", taken back" if found.undone else ""
    return f"{number:>3}. {human_when(found.at, now)}, {place}, {who}{undone}: {excerpt(found, thinking)}"


def excerpt(found: Found, thinking: str) -> str:
    """The excerpt of a found message, without the tags of its reasoning.

    With `thinking = hide`, words found in the reasoning give way to the beginning of the answer.
    """
    text = " ".join(found.excerpt.replace(THINK.opening, " ").replace(THINK.closing, " ").split())
    if found.role == "user":
        return found.excerpt
    thoughts, answer = split(found.text)
    if thinking != "hide" or not thoughts or text.strip("…") in " ".join(answer.split()):
        return text
    return " ".join([*answer.split()[:EXCERPT_WORDS], "…"]) if answer else "(only reasoning)"


def quoted(found: Found, now: float) -> str:
    """A found message as it is put before the model again."""
    who = "I said" if found.role == "user" else "you said"
    text = found.text if found.role == "user" else split(found.text)[1] or found.text
    lines = "\n".join(f"> {line}" for line in text.splitlines())
    return f"Remember what {who} {human_when(found.at, now)}:\n\n{lines}"


def kept(text: str) -> str:
    """A summary as it is put before the model."""
    return f"Remember this about our conversation so far:\n\n{text}"


ACKNOWLEDGED = "Noted."
"""The reply that is given to what the user puts before the model."""
