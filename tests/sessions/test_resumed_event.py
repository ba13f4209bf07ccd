"""The event of a resumed session: figures as they were saved, or counted from the ids."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from streamchat.base import events as ev
from streamchat.conversation.log import TurnRecord
from streamchat.sessions.resume import ResumeResult
from streamchat.sessions.resumed_event import figures_of, resume_notices, resumed_event
from streamchat.store.records import SessionInfo, StoredSession
from tests.support.turn_figures import stats_of


def active_of(*turns: TurnRecord) -> Any:
    """A conversation whose replies open with 2 tokens and close with 3."""
    encoder = SimpleNamespace(reply_opening=lambda: [1, 2], close=lambda: [3, 4, 5])
    settings = SimpleNamespace(system_prompt="Be kind.")
    log, state = SimpleNamespace(turns=list(turns)), ev.CacheState(length=7)
    conversation = SimpleNamespace(log=log, encoder=encoder, settings=settings, state=lambda: state)
    return SimpleNamespace(conversation=conversation, info="about the model")


def info_of(**changes: Any) -> SessionInfo:
    named: dict[str, Any] = {"id": "s1", "title": "The sea", "created": 0.0, "updated": 0.0}
    return SessionInfo(**(named | WITHOUT_MODEL | changes))


WITHOUT_MODEL: dict[str, Any] = dict.fromkeys(("model", "model_name", "dtype", "fingerprint", "tokenizer"), "")
WITHOUT_MODEL["settings"] = {}


def test_figures_are_read_back_and_others_are_left_out() -> None:
    assert figures_of(stats_of(3).as_dict()) == stats_of(3)
    assert figures_of(None) is None
    assert figures_of({"turn": 3}) is None
    assert figures_of(stats_of(3).as_dict() | {"turn": "three"}) is None


def test_the_event_names_the_session_and_has_its_finished_turns() -> None:
    active = active_of(TurnRecord(1, 4, 5, 9, 30, "hello", "hi"), TurnRecord(2, 30, 31, text="not finished"))
    event = resumed_event(active, info_of(), {1: stats_of(1)}, {1})
    turn = ev.SavedTurn(1, "hello", "hi", 11, 12, 0.5, 9.5, "length")
    assert event == ev.ConversationResumed(
        "s1", "The sea", (turn,), ev.CacheState(length=7), active.info, "Be kind.", 0, parent="", parent_turn=0
    )
    unsaved = resumed_event(active, None, {}, set())
    assert (unsaved.session, unsaved.title, unsaved.parent, unsaved.parent_turn) == ("", "", "", 0)


def test_the_event_of_a_fork_names_its_parent_and_the_last_turn_of_both() -> None:
    fork = resumed_event(active_of(), info_of(parent="s0", parent_turn=3), {}, set())
    assert (fork.session, fork.parent, fork.parent_turn) == ("s1", "s0", 3)


@pytest.mark.parametrize(
    ("reply_start", "end", "prompt_tokens", "new_tokens"),
    [
        (9, 30, 5 + 2, 21 - 5),
        (9, 14, 7, 0),
        (9, 12, 7, 0),  # never less than none
        (None, 30, 2, 21),
    ],
)
def test_tokens_of_a_turn_without_figures_are_counted(
    reply_start: int | None, end: int, prompt_tokens: int, new_tokens: int
) -> None:
    active = active_of(TurnRecord(4, 4, 5, reply_start, end, "hello", "hi"))
    for cut, reason in (({4}, "cancelled"), ({3}, "stop")):
        [turn] = resumed_event(active, info_of(), {}, cut).turns
        assert turn == ev.SavedTurn(4, "hello", "hi", prompt_tokens, new_tokens, finish_reason=reason)  # type: ignore[arg-type]
        assert (turn.ttft_s, turn.decode_tps) == (None, None)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (("a",), "a."),
        (("a", "b", "c"), "a, b, c."),
        (("a", "b", "c", "d"), "a, b, c and 1 more."),
        (tuple("abcdef"), "a, b, c and 3 more."),
    ],
)
def test_damaged_parts_are_named_before_everything_else(damage: tuple[str, ...], named: str) -> None:
    stored = StoredSession(info_of(), array("i"), (), damage=damage)
    first, second = resume_notices(stored, ResumeResult(1, cut_turn=3), 64)
    assert first == f"Parts of this session are damaged in the database and were skipped: {named}"
    assert second.startswith("streamchat exited while turn 3 ")
