"""Turns that are recalled by themselves: for which message, how long they stay, and what undo, resume and stops do."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.base import events as ev
from streamchat.base.requests import Compact, Edit, Quote, Retry, SetOption, Undo
from streamchat.cache import checkpoint
from streamchat.conversation import auto_recall
from streamchat.repl.pipe import Pipe
from streamchat.sessions.transcripts.context import recalled_turns
from streamchat.sessions.transcripts.export import export
from streamchat.store.store import Store
from tests.support.real_engine import Watched, running, tiny_loaded

QUESTION = "what is my locker code?"
FACT_TURN = 1
OTHER = "well, what do you think about it now? please tell me some more"


@contextmanager
def talking(turns: int = 9, **settings: Any) -> Iterator[Watched]:
    """A chat with a fact in its first turn, which is evicted."""
    given: dict[str, Any] = {"cache_size": 192, "auto_recall": "on", "loop_guard": "off"} | settings
    with running(**given) as chat:
        chat.turn("my locker code is 48213")
        for _ in range(turns):
            chat.turn(OTHER)
        yield chat


def cached(chat: Watched, turn: int = FACT_TURN) -> int:
    return sum(segment.tokens for segment in chat.conversation.state().segments if segment.turn == turn)


def test_a_turn_that_matches_the_message_is_in_context_for_the_reply() -> None:
    with talking(audit=True) as chat:
        assert not cached(chat)
        chat.turn(QUESTION)
        [event] = chat.of(ev.TurnsRecalled)
        turn = chat.conversation.log.turns[0]
        assert (event.turn, event.turns, event.partly) == (11, (FACT_TURN,), ())
        assert event.runs == ((turn.start, turn.end),)
        kinds = [type(each) for each in chat.events]
        started = len(kinds) - 1 - kinds[::-1].index(ev.TurnStarted)
        assert started < kinds.index(ev.TurnsRecalled) < kinds.index(ev.TextDelta, started)
        order = [segment.turn for segment in event.cache.segments]
        assert order == sorted(order)
        assert {segment.turn for segment in event.cache.segments if segment.recalled} == {FACT_TURN}
        assert event.cache.recalled == event.tokens == turn.end - turn.start  # type: ignore[operator]
        assert chat.of(ev.TurnFinished)[-1].stats.recalled == (FACT_TURN,)
        assert cached(chat) == event.tokens
        recalled = [audit for audit in chat.of(ev.CacheAudited) if audit.after == "recall"]
        assert set(recalled[0].lengths) == {event.cache.length}
        assert not chat.conversation.cache.pins[1:]  # nothing but the system block is pinned


def test_a_recalled_turn_stays_while_it_is_asked_for_and_leaves_with_the_next_eviction() -> None:
    with talking() as chat:
        chat.turn(QUESTION)
        chat.turn("and my locker code again?")
        first, second = chat.of(ev.TurnsRecalled)
        assert (second.turns, second.tokens, second.runs) == (first.turns, 0, ())
        chat.turn("something else entirely, with a few more words in it")
        assert len(chat.of(ev.TurnsRecalled)) == 2
        assert not cached(chat)
        assert chat.conversation.state().recalled == 0


def test_nothing_is_recalled_for_other_messages_or_while_nothing_is_evicted() -> None:
    with running(cache_size=192, auto_recall="on") as chat:
        chat.turn("my locker code is 48213")
        chat.turn(QUESTION)  # it is in context
        for _ in range(9):
            chat.turn(OTHER)
        chat.turn("thanks, tell me more about it")
        chat.engine.send(Quote(QUESTION, "I see.", pin=False))
        chat.wait(ev.TurnFinished, 13)
        assert not chat.of(ev.TurnsRecalled)


def test_undo_restores_the_cache_of_before_to_the_bit() -> None:
    with talking() as chat:
        chat.turn(OTHER)
        before = checkpoint.capture(chat.conversation.cache)
        for undone in (1, 2):
            chat.turn(QUESTION)
            chat.engine.send(Undo())
            chat.wait(ev.TurnUndone, undone)
            after = checkpoint.capture(chat.conversation.cache)
            assert (after.runs, after.pins) == (before.runs, before.pins)
            assert all(torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())
            assert chat.conversation.state().recalled == 0
        assert len(chat.of(ev.TurnsRecalled)) == 2


def test_the_reply_is_that_of_a_chat_which_paged_the_turn_in_by_hand() -> None:
    with talking(temperature=0.0) as chat, talking(temperature=0.0, auto_recall="off") as other:
        chat.turn(QUESTION)
        cache, turn = other.conversation.cache, other.conversation.log.turns[0]
        other.conversation.page_in(FACT_TURN)
        cache.unpin(turn.start, turn.end or 0)
        cache.recalled = ((turn.start, turn.end or 0),)
        recall = other.conversation._recall
        other.conversation._recall = lambda *_, **__: None  # type: ignore[method-assign]
        assert other.turn(QUESTION).reply == chat.of(ev.TurnFinished)[-1].reply
        other.conversation._recall = recall  # type: ignore[method-assign]
        assert other.conversation.cache.ledger.runs == chat.conversation.cache.ledger.runs


def test_suggestions_change_nothing_until_they_are_asked_for() -> None:
    with talking(auto_recall="suggest") as chat:
        chat.turn(QUESTION)
        [event] = chat.of(ev.RecallSuggested)
        assert (event.turn, event.turns) == (11, (FACT_TURN,))
        assert event.excerpts[0].startswith("my locker code is 48213")
        assert not chat.of(ev.TurnsRecalled)
        assert not cached(chat)
        chat.turn("", lambda _: chat.engine.send(Retry((FACT_TURN,))))
        assert chat.wait(ev.TurnsRecalled).turns == (FACT_TURN,)
        assert cached(chat)
        assert chat.conversation.log.turns[-1].text == QUESTION


@pytest.mark.parametrize(
    ("turns", "why"),
    [((99,), "turn 99 cannot be recalled; choose one before turn "), ((10,), "turn 10 is in context already")],
)
def test_a_turn_that_cannot_be_recalled_leaves_the_reply_alone(turns: tuple[int, ...], why: str) -> None:
    with talking() as chat:
        reply = chat.turn("hello again").reply
        finished = chat.turn("", lambda _: chat.engine.send(Retry(turns)))
        assert finished.finish_reason == "error"
        assert why in finished.message
        assert chat.conversation.log.turns[-1].reply == reply


def again(chat: Watched, turns: tuple[int, ...], _: str) -> None:
    chat.engine.send(Retry(turns))


@pytest.mark.parametrize("auto_recall", ["off", "on"])
def test_a_turn_that_was_recalled_for_the_newest_one_can_be_recalled_again(auto_recall: str) -> None:
    with talking(auto_recall=auto_recall) as chat:
        chat.turn(QUESTION)
        for turns in ((FACT_TURN,), (FACT_TURN,), (FACT_TURN, FACT_TURN), (FACT_TURN, 2)):
            finished = chat.turn("", functools.partial(again, chat, turns))
            assert finished.stats.recalled[:1] == (FACT_TURN,), finished.message
            assert len(set(finished.stats.recalled)) == len(finished.stats.recalled)


def test_an_excerpt_has_no_role_names_of_the_template(tmp_path: Path) -> None:
    store = tmp_path / "streamchat.db"
    with talking(auto_recall="suggest", store=store) as chat:
        chat.turn(QUESTION)
        [shown] = chat.of(ev.RecallSuggested)
        session = chat.of(ev.SessionOpened)[-1].session
    assert shown.excerpts[0].startswith("my locker code is 48213")
    assert "assistant" not in shown.excerpts[0]
    with running(cache_size=192, auto_recall="suggest", store=store, session=session) as chat:
        chat.turn(QUESTION)
        assert chat.of(ev.RecallSuggested)[-1].excerpts[0] == shown.excerpts[0]


def test_turns_that_do_not_fit_are_named() -> None:
    with talking(auto_recall="off") as chat:
        chat.turn(QUESTION)
        finished = chat.turn("", lambda _: chat.engine.send(Retry((1, 2, 3, 4, 5))))
        assert finished.stats.recalled == (1, 2)
        assert "Turns 3-5 could not be recalled: their keys" in chat.of(ev.Notice)[-1].text


@pytest.mark.parametrize("family", ["gpt2", "falcon_h1"])
def test_without_paging_a_retry_and_an_edit_work_and_only_a_recall_is_refused(family: str) -> None:
    with running(lambda *_: tiny_loaded(family=family), auto_recall="on") as chat:
        chat.turn("hello")
        assert chat.turn("", lambda _: chat.engine.send(Retry())).finish_reason != "error"
        assert chat.turn("", lambda _: chat.engine.send(Edit("goodbye"))).finish_reason != "error"
        refused = chat.turn("", lambda _: chat.engine.send(Retry((1,))))
        assert refused.message == "tokens cannot be paged into this model's cache"


def test_without_archived_keys_a_retry_says_so_and_replies() -> None:
    with talking() as chat:
        chat.turn("hello again")
        history = chat.conversation.cache.history
        assert history is not None
        history.clear()
        finished = chat.turn("", lambda _: chat.engine.send(Retry((FACT_TURN,))))
        assert finished.reply
        assert any("Turn 1 could not be recalled" in notice.text for notice in chat.of(ev.Notice))
        chat.turn(QUESTION)
        assert not chat.of(ev.TurnsRecalled)


def test_only_a_part_of_a_long_turn_is_recalled_within_the_allowance() -> None:
    with running(cache_size=256, auto_recall="on", loop_guard="off") as chat:
        chat.turn(f"{'some words come first. ' * 9}my locker code is 48213. {'some words follow. ' * 9}")
        for _ in range(9):
            chat.turn(OTHER)
        chat.turn(QUESTION)
        event = chat.wait(ev.TurnsRecalled)
        assert event.partly == (FACT_TURN,)
        assert 16 <= event.tokens <= 256 // 4
        ids = chat.conversation.log.ids_at(event.runs)
        assert "locker code is 48213" in chat.conversation.tokenizer.decode(ids)
        for _ in range(9):  # what is left of it can be evicted
            chat.turn(OTHER)
        assert not cached(chat)


@pytest.mark.parametrize("where", ["rank", "page_in"])
def test_a_failure_does_not_stop_the_reply(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        if where == "page_in":  # memory ran out in the first layer
            layer = arguments[0].streaming_layers[0]
            layer.truncate(layer.length - 1)
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    with talking() as chat:
        monkeypatch.setattr(auto_recall, where, fail)
        finished = chat.turn(QUESTION)
        assert finished.reply
        assert finished.stats.recalled == ()
        assert set(chat.conversation.cache.lengths) == {chat.conversation.cache.length}
        monkeypatch.undo()
        chat.turn(QUESTION)
        assert chat.of(ev.TurnsRecalled) or where == "page_in"  # a prefill leaves no keys of evicted tokens in memory


def test_a_summary_neither_recalls_nor_loses_recalled_turns() -> None:
    with talking() as chat:
        chat.turn(QUESTION)
        recalled = chat.conversation.cache.recalled
        assert recalled
        chat.engine.send(Compact())
        chat.wait(ev.SummaryReady)
        assert chat.conversation.cache.recalled == recalled
        assert len(chat.of(ev.TurnsRecalled)) == 1


def test_a_cache_that_may_not_evict_recalls_nothing() -> None:
    with running(cache_size=256, on_full="stop", auto_recall="on") as chat:
        chat.turn("my locker code is 48213")
        assert chat.turn(QUESTION).finish_reason != "error"
        assert not chat.of(ev.TurnsRecalled)


def test_it_is_switched_during_a_chat() -> None:
    with talking(auto_recall="off") as chat:
        chat.turn(QUESTION)
        assert not chat.of(ev.TurnsRecalled)
        chat.engine.send(SetOption("auto_recall", "on"))
        chat.turn(QUESTION)
        assert chat.of(ev.TurnsRecalled)[-1].turns == (FACT_TURN,)


def test_a_resumed_session_recalls_from_its_archive(tmp_path: Path) -> None:
    store = tmp_path / "data" / "streamchat.db"
    with talking(store=store) as chat:
        chat.turn("hello again")
    with running(store=store, session="last", cache_size=192, auto_recall="on") as chat:
        chat.wait(ev.ConversationResumed)
        chat.turn(QUESTION)
        event = chat.wait(ev.TurnsRecalled)
        assert (event.turns, event.tokens) == ((FACT_TURN,), cached(chat))
    with running(store=store, session="last", cache_size=192) as chat:  # as an ordinary turn now
        chat.wait(ev.ConversationResumed)
        assert cached(chat)
        assert chat.conversation.state().pinned == chat.conversation.system_tokens - 4
        assert chat.conversation.log.turns[-1].text == QUESTION


def test_exports_name_the_recalled_turns(tmp_path: Path) -> None:
    store = tmp_path / "data" / "streamchat.db"
    with talking(store=store) as chat:
        chat.turn(QUESTION)
    with Store(store) as opened:
        saved = opened.load(opened.find("last").id)
    rows = [json.loads(line) for line in export(saved, "jsonl").splitlines()]
    assert [row["turn"] for row in rows if row.get("recalled") == [FACT_TURN]] == [11]
    for kind in ("markdown", "html"):
        assert export(saved, kind).count("turn 1 was back in context") == 1
    damaged = replace(saved.turns[-1], stats={"recalled": [2, "x", None, True]})
    assert recalled_turns(damaged) == [2]
    assert recalled_turns(replace(damaged, stats={"recalled": 5})) == []


def test_the_pipe_reports_it_on_stderr() -> None:
    out, err = io.StringIO(), io.StringIO()
    with running(start=False, cache_size=192, auto_recall="on", loop_guard="off") as chat:
        text = f"my locker code is 48213\n{(OTHER + chr(10)) * 9}{QUESTION}\n"
        assert Pipe(chat.engine, out, err).run(io.BytesIO(text.encode())) == 0
    assert "streamchat: Turn 1 is back in context (" in err.getvalue()
    assert "back in context" not in out.getvalue()
