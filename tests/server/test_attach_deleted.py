"""A session that is deleted while a front end looks at it, after it has left its seat."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streamchat.base import events as ev
from streamchat.base.requests import (
    Clear,
    Compact,
    CountTokens,
    Edit,
    OpenSession,
    Quote,
    Request,
    Retry,
    SetSystemPrompt,
    Submit,
    Undo,
)
from streamchat.frontend.slash.session_commands import summary_done, turn_done, undo_done
from streamchat.server.options import Options
from streamchat.store.store import Store
from tests.support.api_server import Running, serving

pytest.importorskip("websockets", reason="the package websockets is not installed")

from tests.support.attached import Front, attached


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deleted")


@pytest.fixture(scope="module")
def api(folder: Path) -> Iterator[Running]:
    with serving(folder, options=Options(port=0, live=1)) as server:
        yield server


@pytest.fixture
def orphan(api: Running, folder: Path) -> Iterator[Front]:
    """A front end of a session that was deleted."""
    with attached(api, new=True) as front:
        front.turn("hello")
        api.respond("of another client")
        with Store(folder / "sessions.db") as store:
            store.delete(front.attached.session)
        yield front


def is_counted(event: ev.Event) -> bool:
    return isinstance(event, ev.TextCounted)


@pytest.mark.parametrize(
    ("request_", "is_done"),
    [
        (Submit("and?"), turn_done),
        (Edit("and?"), turn_done),
        (Quote("a note", "Noted.", True), turn_done),
        (Retry(), turn_done),
        (Compact(), summary_done),
        (Undo(), undo_done),
        (CountTokens("draft"), is_counted),
    ],
    ids=lambda each: type(each).__name__,
)
def test_every_request_has_the_end_that_a_front_end_waits_for(
    orphan: Front, request_: Request, is_done: Callable[[ev.Event], bool]
) -> None:
    before = len(orphan.events)
    orphan.engine.send(request_)
    orphan.until(lambda events: any(map(is_done, events[before:])), timeout_s=20)
    assert not orphan.engine.busy
    said = [each.text if isinstance(each, ev.Notice) else each.message for each in orphan.events[before:]
            if isinstance(each, ev.Notice | ev.TurnFinished)]  # fmt: skip
    assert all("no saved session has the id" in text for text in said)
    assert bool(said) != isinstance(request_, CountTokens)


@pytest.mark.parametrize("request_", [Clear(), SetSystemPrompt("Be brief.")], ids=lambda each: type(each).__name__)
def test_a_front_end_can_start_over(orphan: Front, request_: Request) -> None:
    orphan.engine.send(request_)
    orphan.wait(ev.ConversationCleared, timeout_s=20)
    assert orphan.turn("a new start").stats.turn == 1


def test_a_front_end_can_resume_another_session(api: Running, orphan: Front) -> None:
    with attached(api, new=True) as other:
        other.turn("elsewhere")
        orphan.engine.send(OpenSession(other.attached.session))
        assert orphan.wait(ev.ConversationResumed, timeout_s=20).turns[0].text == "elsewhere"
