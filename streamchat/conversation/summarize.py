"""Summing up what the model is about to forget. Started by the user, who decides what becomes of the summary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, TurnError
from streamchat.base.thinking import split
from streamchat.conversation.conversation import Conversation

SHARE = 0.5
"""The oldest turns that take this much of the window are summed up."""
LENGTH_SHARE = 8
"""The summary may take one part in so many of the budget: it will be pinned."""


def next_to_evict(segments: tuple[ev.Segment, ...], window: int) -> tuple[int, int] | None:
    """First and last of the oldest turns that fill `SHARE` of the window and are not pinned; None without any."""
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
    conversation: Conversation, cancelled: Callable[[], bool], tell: Callable[[ev.Event], None]
) -> ev.SummaryReady:
    """Ask the model, and take the question back: cache, log and transcript are as before.

    Raises:
        ConfigError: There is nothing to sum up.
        TurnError: The model said nothing, or failed.
    """
    state = conversation.state()
    turns = next_to_evict(state.segments, state.window)
    if turns is None:
        raise ConfigError("there is nothing to sum up: no turn is in the cache that could leave")
    first, last = turns
    which = f"turn {first}" if first == last else f"turns {first} to {last}"
    tell(ev.Notice(f"Summing up {which}, the next to be forgotten …"))
    limit = max(16, state.cache_size // LENGTH_SHARE)
    settings = conversation.settings
    begins = " ".join(conversation.log.turns[first - 1].text.split())[:60]
    ends = " ".join(conversation.log.turns[last - 1].text.split())[:60]
    question = (
        f'Sum up the part of our conversation from where I said "{begins}" to where I said "{ends}", in at most '
        f"{limit // 2} words. Keep names, numbers, decisions and open questions. Write nothing but the summary."
    )
    quiet = replace(settings, max_new_tokens=min(limit, settings.max_new_tokens), temperature=0.0)
    with conversation.muted(quiet):
        outcome = conversation.run_turn(question, cancelled)
        if not outcome.rolled_back:
            conversation.undo()
    thoughts, text = split(outcome.reply)
    if outcome.finish_reason == "cancelled":
        raise TurnError("the summary was stopped; nothing was changed")
    if thoughts and not text.strip():
        raise TurnError(
            f"the model reasoned for {outcome.new_tokens} tokens and wrote no summary; nothing was changed, and a "
            "larger max_new_tokens or cache_size may help"
        )
    if not text.strip():
        raise TurnError("the model wrote no summary; nothing was changed")
    return ev.SummaryReady(text.strip(), turns)
