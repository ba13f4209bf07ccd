"""Segments of the cache by message, pinned turns, and another model during a chat, on the real engine."""

from __future__ import annotations

from typing import Any

import pytest

from streamchat.base import events as ev
from streamchat.base.errors import ModelNotFoundError
from streamchat.base.requests import Pin, SetSystemPrompt, SwitchModel, Unpin
from tests.support import toy_tokenizer as toy
from tests.support.real_engine import Watched, running, tiny_loaded

pytestmark = pytest.mark.smoke


def segments_of(watched: Watched) -> dict[tuple[str, int], ev.Segment]:
    """The newest ones, checked against the layers."""
    conversation: Any = watched.conversation
    state = conversation.state()
    assert sum(segment.tokens for segment in state.segments) == state.length == max(conversation.cache.lengths)
    return {(segment.part, segment.turn): segment for segment in state.segments}


def held(watched: Watched, turn: int) -> int:
    return sum(segment.tokens for (_, number), segment in segments_of(watched).items() if number == turn)


def test_segments_name_sinks_system_block_and_messages_in_slot_order() -> None:
    with running(system_prompt="Be brief.") as watched:
        watched.turn("one")
        watched.turn("two and more words")
        state = watched.conversation.state()
        parts = [(segment.part, segment.turn) for segment in state.segments]
        expected = [("user", 1), ("assistant", 1), ("user", 2), ("assistant", 2)]
        assert parts == [("sinks", 0), ("system", 0), *expected]
        assert all(segment.tokens == segment.total for segment in state.segments)
        log = watched.conversation.log
        second = log.turns[1]
        tokenizer = watched.conversation.tokenizer
        user, reply = log.ids[second.start : second.reply_start], log.ids[second.reply_start : second.end]
        assert tokenizer.decode(user) == "<|im_start|>user\ntwo and more words"
        assert tokenizer.decode(reply).startswith("<|im_end|>\n<|im_start|>assistant\n")
        assert [s.tokens for s in state.segments[-2:]] == [len(user), len(reply)]


def test_segments_follow_what_leaves() -> None:
    with running(evict="oldest-tokens") as watched:
        partly = False
        for number in range(1, 8):
            watched.turn("word " * 8)
            found = segments_of(watched)
            partly = partly or any(segment.tokens < segment.total for segment in found.values())
            assert held(watched, number) > 0
        assert held(watched, 1) == 0
        assert partly


def test_a_pinned_turn_stays_and_leaves_again_when_unpinned() -> None:
    with running(cache_size=256, max_new_tokens=8) as watched:
        watched.turn("remember me")
        tokens, before = held(watched, 1), watched.conversation.state().pinned
        watched.engine.send(Pin(1))
        pinned = watched.wait(ev.TurnPinned)
        assert (pinned.turn, pinned.pinned, pinned.tokens) == (1, True, tokens)
        assert pinned.cache.pinned == before + tokens
        for _ in range(12):
            watched.turn("something else " * 3)
        assert held(watched, 2) == 0
        assert held(watched, 1) == tokens
        assert segments_of(watched)["user", 1].pinned
        watched.engine.send(Unpin(1))
        assert not watched.wait(ev.TurnPinned, 2).pinned
        for _ in range(3):
            watched.turn("something else " * 3)
        assert held(watched, 1) == 0


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (Pin(9), "turn 9 does not exist; the conversation has 1"),
        (Unpin(1), "turn 1 is not pinned"),
        (Pin(1), "tokens) would leave"),
    ],
)
def test_what_cannot_be_pinned_is_said(request_: Pin | Unpin, sentence: str) -> None:
    with running(cache_size=128, max_new_tokens=4) as watched:
        watched.turn("word " * (20 if sentence.startswith("tokens") else 2))
        watched.engine.send(request_)
        notice = watched.wait(ev.Notice)
        assert sentence in notice.text
        assert notice.level == "warning"
        assert not watched.of(ev.TurnPinned)


def test_a_forgotten_turn_cannot_be_pinned() -> None:
    with running() as watched:
        for _ in range(6):
            watched.turn("word " * 8)
        assert held(watched, 1) == 0
        watched.engine.send(Pin(1))
        assert watched.wait(ev.Notice).text == "turn 1 cannot be pinned: it was evicted from the cache"


def test_another_model_takes_over_and_begins_anew() -> None:
    def load(configuration: Any, progress: Any) -> Any:
        if configuration.settings.model == "missing":
            raise ModelNotFoundError("missing is not a model; try another name")
        return tiny_loaded(family="gpt_neox" if configuration.settings.model == "other" else "llama")

    with running(load) as watched:
        watched.turn("hello")
        before = watched.conversation
        assert before is not None
        watched.engine.send(SwitchModel("missing"))
        assert "missing is not a model" in watched.wait(ev.Notice).text
        assert watched.conversation is before
        assert watched.turn("still there?").stats.turn == 2
        watched.engine.send(SwitchModel("other"))
        watched.wait(ev.ModelReady, 2)
        after: Any = watched.conversation
        assert after.model.config.model_type == "gpt_neox"
        assert watched.engine.settings.model == "other"
        assert not before.model._forward_pre_hooks
        assert len(watched.of(ev.ConversationCleared)) == 1
        assert watched.turn("hello").stats.turn == 1


def test_what_another_system_prompt_brings_with_it_is_said() -> None:
    with running(lambda *_: tiny_loaded(toy.LAST_SYSTEM)) as chat:
        chat.wait(ev.ModelReady)
        chat.engine.send(SetSystemPrompt("Be brief."))
        chat.wait(ev.ConversationCleared)
        assert ["moves the system prompt" in chat.wait(ev.Notice).text] == [True]
        chat.engine.send(SetSystemPrompt("Be kind."))
        chat.wait(ev.ConversationCleared, 2)
        chat.turn("x")
        assert len(chat.of(ev.Notice)) == 1
