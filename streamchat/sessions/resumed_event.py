"""What is reported about a resumed session: the event with all its turns, and notices."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from streamchat.base import events as ev
from streamchat.base.errors import WireError
from streamchat.base.wire import from_record

if TYPE_CHECKING:  # torch is imported on the engine's thread only
    from streamchat.conversation.assemble import StartedConversation
    from streamchat.conversation.conversation import Conversation
    from streamchat.conversation.log import TurnRecord
    from streamchat.sessions.resume import ResumeResult
    from streamchat.store.records import SessionInfo, StoredSession


def figures_of(stats: Mapping[str, Any] | None) -> ev.TurnStats | None:
    """Return the figures of a turn; None if they are damaged or from another version."""
    with suppress(WireError):
        return None if stats is None else from_record(ev.TurnStats, stats)
    return None


def resumed_event(
    active: StartedConversation, info: SessionInfo | None, figures: Mapping[int, ev.TurnStats | None], cut: set[int]
) -> ev.ConversationResumed:
    """Return the event of a resumed conversation.

    Args:
        active: The conversation.
        info: Its session; None if it is not saved.
        figures: Those of its turns, by number.
        cut: Turns whose reply was cut off.
    """
    conversation = active.conversation
    turns = tuple(
        _saved_turn(conversation, turn, figures.get(turn.number), turn.number in cut)
        for turn in conversation.log.turns
        if turn.end is not None
    )
    id_, title = ("", "") if info is None else (info.id, info.title)
    prompt = conversation.settings.system_prompt
    parent, at = (None, None) if info is None else (info.parent, info.parent_turn)
    return ev.ConversationResumed(
        id_, title, turns, conversation.state(), active.info, prompt, 0.0, parent=parent or "", parent_turn=at or 0
    )


def _saved_turn(
    conversation: Conversation, turn: TurnRecord, stats: ev.TurnStats | None, was_cut: bool
) -> ev.SavedTurn:
    if stats is not None:
        return ev.SavedTurn(
            turn.number,
            turn.text,
            turn.reply,
            stats.prompt_tokens,
            stats.new_tokens,
            stats.ttft_s,
            stats.decode_tps,
            stats.finish_reason,
        )
    # cut off by a crash, or imported: count the ids
    opening, close = len(conversation.encoder.reply_opening()), len(conversation.encoder.close())
    reply_start = turn.start if turn.reply_start is None else turn.reply_start
    end = reply_start if turn.end is None else turn.end
    prompt_tokens, new_tokens = reply_start - turn.start + opening, max(0, end - reply_start - opening - close)
    reason: ev.FinishReason = "cancelled" if was_cut else "stop"
    return ev.SavedTurn(turn.number, turn.text, turn.reply, prompt_tokens, new_tokens, finish_reason=reason)


def _damage_notice(parts: tuple[str, ...]) -> list[str]:
    if not parts:
        return []
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return [f"Parts of this session are damaged in the database and were skipped: {', '.join(parts[:3])}{more}."]


def resume_notices(stored: StoredSession, result: ResumeResult, cache_size: int) -> list[str]:
    """Return what a user must know about a restored session, one sentence each."""
    from streamchat.conversation.fitting import unpinned_notice

    notices = _damage_notice(stored.damage)
    if result.read_again:
        notices.append(
            f"{result.read_again:,} tokens were prefilled again in {result.seconds:.1f} s, because {result.reason}."
        )
    if result.cut_turn:
        notices.append(
            f"streamchat exited while turn {result.cut_turn} was being generated; the saved part of the reply was kept."
        )
    if result.message_back:
        notices.append("streamchat exited before replying to your last message; it was not added to the conversation.")
    if result.unpinned:
        notices.append(unpinned_notice(result.unpinned, cache_size))
    return notices
