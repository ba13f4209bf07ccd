"""`/title` through the engine, whose thread owns the store."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamchat.base import events as ev
from streamchat.base.errors import StoreError
from streamchat.base.requests import SetTitle
from streamchat.store.store import Store
from tests.support.real_engine import running


def test_the_title_of_the_saved_session_changes(tmp_path: Path) -> None:
    database = tmp_path / "chats.db"
    with running(store=database) as chat:
        chat.turn("hello there")
        chat.engine.send(SetTitle(" Of the\n  sea \udc80"))
        assert chat.wait(ev.Notice) == ev.Notice("title changed to “Of the sea ?”")
    with Store(database) as store:
        assert [info.title for info in store.sessions()] == ["Of the sea ?"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "a title needs at least one visible character"),
        (" \u200b\x07", "a title needs at least one visible character"),
        ("x" * 201, "a title of 201 characters is too long; use at most 200"),
    ],
)
def test_what_is_no_title_is_said_and_the_old_one_stays(text: str, sentence: str, tmp_path: Path) -> None:
    with running(store=tmp_path / "chats.db") as chat:
        chat.turn("hello there")
        chat.engine.send(SetTitle(text))
        assert chat.wait(ev.Notice) == ev.Notice(sentence, "warning")
    with Store(tmp_path / "chats.db") as store:
        assert [info.title for info in store.sessions()] == ["hello there"]


def test_a_conversation_that_is_not_saved_has_no_title(tmp_path: Path) -> None:
    for store in (None, tmp_path / "chats.db"):  # not saved at all, and not yet
        with running(store=store) as chat:
            chat.engine.send(SetTitle("the sea"))
            notice = chat.wait(ev.Notice)
            assert notice == ev.Notice("The title cannot change: this conversation is not saved.", "warning")


def test_a_store_that_fails_is_said_and_the_chat_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> str:
        raise StoreError("the disk is full; free some space")

    with running(store=tmp_path / "chats.db") as chat:
        chat.turn("hello there")
        monkeypatch.setattr(Store, "rename", fail)
        chat.engine.send(SetTitle("the sea"))
        assert chat.wait(ev.Notice) == ev.Notice("the disk is full; free some space", "warning")
        assert chat.turn("go on").stats.turn == 2
