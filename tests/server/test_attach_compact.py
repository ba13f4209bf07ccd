"""A front end's `/compact` on a server: others continue meanwhile, and it can be stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from streamchat.base import events as ev
from streamchat.base.errors import TurnError
from streamchat.base.requests import Compact, Stop, Undo
from streamchat.conversation import summarize as summarizing
from streamchat.conversation.conversation import Conversation
from tests.support.api_server import serving

pytest.importorskip("websockets", reason="the package websockets is not installed")

from tests.support.attached import attached

ENDLESS = 100_000


def test_a_summary_lets_others_work_and_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, gives_up = threading.Event(), threading.Event()

    def endless(
        conversation: Conversation, cancelled: Callable[[], bool], emit: Callable[[ev.Event], None]
    ) -> ev.SummaryReady:
        def ends() -> bool:
            runs.set()
            return cancelled() or gives_up.is_set()

        with conversation.muted(replace(conversation.settings, max_new_tokens=ENDLESS)):
            while not ends():  # the model may end a reply by itself
                outcome = conversation.run_turn("a hidden question", ends)
                if not outcome.rolled_back:
                    conversation.undo()
        raise TurnError("the summary was stopped")

    monkeypatch.setattr(summarizing, "summarize", endless)
    timer = threading.Timer(90, gives_up.set)
    with serving(tmp_path, temperature=0.8) as api, attached(api, new=True) as front:
        timer.start()
        front.turn("first")
        front.engine.send(Compact())
        assert runs.wait(60)
        with attached(api, front.attached.session) as late, attached(api, new=True) as other:
            assert other.turn("of another session").stats.turn == 1
            assert not front.of(ev.SummaryReady)
            assert [turn.text for turn in late.of(ev.ConversationResumed)[0].turns] == ["first"]
            assert not late.of(ev.TurnStarted)
            front.engine.send(Stop())
            assert front.wait(ev.SummaryReady).text == ""
            assert not gives_up.is_set()
            assert late.turn("second").stats.turn == 2
        timer.cancel()


def test_what_goes_to_the_input_goes_to_the_one_that_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of a summary, and the message of `/edit`: others do not find them among what they type."""
    monkeypatch.setattr(summarizing, "summarize", lambda *_: ev.SummaryReady("a summary", (1, 1)))
    with serving(tmp_path) as api, attached(api, new=True) as front:
        front.turn("first")
        with attached(api, front.attached.session) as other:
            front.engine.send(Compact())
            front.engine.send(Undo(to_edit=True))
            other.wait(ev.TurnUndone)
            other.turn("second")
            other.engine.send(Undo(to_edit=True))
            for each, is_own in ((front, [True, False]), (other, [False, True])):
                assert each.wait(ev.SummaryReady).text == ("a summary" if is_own[0] else "")
                each.wait(ev.TurnUndone, 2)
                assert [event.to_edit for event in each.of(ev.TurnUndone)] == is_own
                assert not each.engine.busy
