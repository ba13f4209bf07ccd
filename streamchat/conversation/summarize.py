"""Summarizes the turns that are about to be evicted. The user starts it, and decides what to do with the summary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, TurnError
from streamchat.base.thinking import split
from streamchat.conversation.conversation import Conversation

SHARE = 0.5
"""Share of the window that the summarized turns fill."""
LENGTH_SHARE = 8
"""Summary length limit: 1/8 of the cache budget, because the summary will be pinned."""


def next_to_evict(segments: tuple[ev.Segment, ...], window: int) -> tuple[int, int] | None:
    """Return the first and last of the oldest unpinned turns that fill `SHARE` of the window; None without any."""
    tokens = 0
    turns: list[int] = []
    for segment in segments:
        if segment.turn and not segment.pinned:
            if tokens >= SHARE * window and segment.turn not in turns:
                break
            tokens += segment.tokens
            turns.append(segment.turn)
    return (turns[0], turns[-1]) if turns else None


def summarize(
    conversation: Conversation, cancelled: Callable[[], bool], emit: Callable[[ev.Event], None]
) -> ev.SummaryReady:
    """Ask the model for a summary, and undo that turn: cache, log and transcript do not change.

    Raises:
        ConfigError: There is nothing to summarize.
        TurnError: The model returned no summary, or failed.
    """
    state = conversation.state()
    turns = next_to_evict(state.segments, state.window)
    if turns is None:
        raise ConfigError("nothing to summarize: no cached turn is due for eviction")
    first, last = turns
    which = f"turn {first}" if first == last else f"turns {first} to {last}"
    emit(ev.Notice(f"Summarizing {which}, next to be evicted …"))
    limit = max(16, state.cache_size // LENGTH_SHARE)
    settings = conversation.settings
    start = " ".join(conversation.log.turns[first - 1].text.split())[:60]
    end = " ".join(conversation.log.turns[last - 1].text.split())[:60]
    question = (
        f'Sum up the part of our conversation from where I said "{start}" to where I said "{end}", in at most '
        f"{limit // 2} words. Keep names, numbers, decisions and open questions. Write nothing but the summary."
    )
    quiet = replace(settings, max_new_tokens=min(limit, settings.max_new_tokens), temperature=0.0)
    with conversation.muted(quiet):
        outcome = conversation.run_turn(question, cancelled)
        if not outcome.rolled_back:
            conversation.undo()
    thoughts, text = split(outcome.reply)
    if outcome.finish_reason == "cancelled":
        raise TurnError("the summary was stopped; nothing has changed")
    if thoughts and not text.strip():
        raise TurnError(
            f"the model reasoned for {outcome.new_tokens} tokens and returned no summary; nothing has changed; try a "
            "larger max_new_tokens or cache_size"
        )
    if not text.strip():
        raise TurnError("the model returned no summary; nothing has changed")
    return ev.SummaryReady(text.strip(), turns)
