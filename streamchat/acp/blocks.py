"""Converts between the content of the protocol, and texts and events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from acp import RequestError, update_agent_message_text, update_agent_thought_text, update_user_message_text
from acp.schema import EmbeddedResourceContentBlock, ResourceContentBlock, TextContentBlock, UsageUpdate

from streamchat.base import events as ev
from streamchat.base.thinking import ThinkingStream, split
from streamchat.frontend.mentions import file_block
from streamchat.frontend.messages import eviction_sentence

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "cancelled": "cancelled", "loop": "end_turn"}
"""Reason of the end of a reply -> that of the protocol. A failed turn is an error instead."""


def text_of(prompt: Sequence[Any]) -> str:
    """Return the message of a prompt: its texts, the texts of embedded files, and the names of linked ones.

    Raises:
        RequestError: It has an image, a recording or a binary file, which the agent does not announce to accept.
    """
    return "\n".join(map(_block_text, prompt))


def _block_text(block: Any) -> str:
    if isinstance(block, TextContentBlock):
        return block.text
    if isinstance(block, ResourceContentBlock):
        return f"[{block.name}]({block.uri})"
    if isinstance(block, EmbeddedResourceContentBlock):
        text = getattr(block.resource, "text", None)
        if isinstance(text, str):
            return file_block(block.resource.uri, text)
    raise RequestError(-32602, f"content of type {block.type} cannot be sent to this model; send text")


class UpdateStream:
    """Turns the events of one turn into updates of the session."""

    def __init__(self) -> None:
        self._parts = ThinkingStream()

    def updates_of(self, event: ev.Event) -> Iterator[Any]:
        """Yield the updates that report `event`."""
        match event:
            case ev.TextDelta(text=text):
                yield from _parts(self._parts.feed(text))
            case ev.TokensEvicted():
                yield update_agent_thought_text(f"{eviction_sentence(event)}\n")
                yield usage_of(event.cache_len_after, event.cache.cache_size)
            case ev.Notice(text=text):
                yield update_agent_thought_text(f"{text}\n")
            case ev.TurnFinished(stats=stats):
                yield from _parts(self._parts.end())
                yield usage_of(stats.cache_len, stats.cache_size)
            case _:
                pass


def _parts(parts: Sequence[Any]) -> Iterator[Any]:
    for part in parts:
        if part.text:
            yield (update_agent_thought_text if part.kind == "thought" else update_agent_message_text)(part.text)


def usage_of(used: int, size: int) -> UsageUpdate:
    """Return the update that says how much of the cache is in use."""
    return UsageUpdate(session_update="usage_update", used=used, size=size)


def history_updates(turns: Sequence[ev.SavedTurn]) -> Iterator[Any]:
    """Yield the updates that replay a conversation."""
    for turn in turns:
        yield update_user_message_text(turn.text)
        thoughts, answer = split(turn.reply)
        if thoughts:
            yield update_agent_thought_text(thoughts)
        if answer:
            yield update_agent_message_text(answer)
