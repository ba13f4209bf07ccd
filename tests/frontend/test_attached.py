"""Front ends whose model is on a server: commands, the status, and turns of others."""

from __future__ import annotations

import pytest

from streamchat.base import events as ev
from streamchat.frontend import saved
from streamchat.frontend.outbox import Message, Outbox, Phase
from streamchat.frontend.presenter import present
from streamchat.frontend.status import StatusBoard
from streamchat.frontend.status_table import short_forms
from tests.support.desk import Desk

SERVER = "http://127.0.0.1:8080"


def at_server() -> Desk:
    desk = Desk()
    desk.engine.pretended_server = SERVER
    return desk


def test_detach_leaves_a_server_and_explains_itself_elsewhere() -> None:
    assert at_server().say("/detach").quit
    result = Desk().say("/detach")
    assert result.error
    assert not result.quit
    assert "start `streamchat serve` and use `streamchat attach`" in result.text


def test_the_model_of_a_server_stays() -> None:
    desk = at_server()
    result = desk.say("/model pythia-70m")
    assert result.error
    assert f"the model belongs to the server {SERVER}" in result.text
    assert "--model pythia-70m" in result.text
    assert desk.engine.sent == []


@pytest.mark.parametrize("command", ["/recall words", "/sessions", "/resume abc"])
def test_saved_sessions_on_another_machine_are_refused(command: str) -> None:
    saved.refuse("they are elsewhere")
    try:
        result = Desk().say(command)
    finally:
        saved.refuse("")
    assert result.error
    assert result.text == "they are elsewhere"


def test_a_lost_connection_is_in_the_status_until_it_works_again() -> None:
    board = StatusBoard()
    board.apply(ev.ConnectionChanged(False, "the server is gone"))
    assert short_forms(board) == ["the server is gone; connecting again"]
    board.apply(ev.ConnectionChanged(True))
    assert "connecting" not in " ".join(short_forms(board))
    lost, works = present(ev.ConnectionChanged(False, "the server is gone")), present(ev.ConnectionChanged(True))
    assert lost is not None
    assert works is not None
    assert (lost.kind, works.kind) == ("warning", "info")


def test_an_outbox_waits_for_the_end_of_its_own_turn() -> None:
    sent: list[str] = []
    outbox = Outbox(sent.append)
    outbox.idle()
    outbox.started()
    assert outbox.phase is Phase.REPLYING  # another front end's turn
    outbox.offer(Message("mine", "mine"))
    assert sent == []
    outbox.idle()
    outbox.send_next()
    assert sent == ["mine"]
    assert outbox.waits_behind("of another")
    assert not outbox.waits_behind("mine")
    assert not outbox.waits_behind("")
