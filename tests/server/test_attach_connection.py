"""The connections of attached front ends: lost, slow, refused, or hostile; and a server that is killed."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from streamchat.base import events as ev
from streamchat.base.errors import ExitCode
from streamchat.base.requests import Clear, SetOption, Stop, Submit
from streamchat.server.attached import connection as served
from streamchat.server.limits import Limits
from streamchat.server.options import Options
from streamchat.store.store import Store
from tests.support.api_server import Running, serving
from tests.support.real_engine import running
from tests.support.tiny_process import free_port, process

pytest.importorskip("websockets", reason="the package websockets is not installed")

from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from streamchat.attach.address import parse_address
from streamchat.attach.connection import AttachError
from streamchat.attach.engine import AttachedEngine
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from tests.support.attached import Front, LaterConnections, attached, begin_endless, steady
from tests.support.attached import api as api  # fixtures
from tests.support.attached import front as front

# --- lost connections ---------------------------------------------------------------------------------------------


def test_a_dropped_connection_loses_no_event(front: Front) -> None:
    begin_endless(front)
    for lost in (1, 2, 3):
        seen = len(front.of(ev.TextDelta))
        front.cut()
        front.wait(ev.ConnectionChanged, 2 * lost)
        front.wait(ev.TextDelta, seen + 3)
    front.engine.send(Stop())
    finished = front.wait(ev.TurnFinished)
    assert [event.works for event in front.of(ev.ConnectionChanged)] == [False, True] * 3
    assert steady(front.numbered)
    assert "".join(event.text for event in front.of(ev.TextDelta)) == finished.reply
    assert not front.of(ev.ConversationResumed)  # nothing was drawn again


def test_a_request_that_is_sent_again_is_carried_out_once(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection ends before the front end learns that its messages have arrived."""
    front.turn("first")
    with monkeypatch.context() as patched:
        patched.setattr(front.attached._pending, "received", lambda number: None)
        for number in range(3):
            front.engine.send(Submit(f"message {number}"))
        front.wait(ev.TurnFinished, 4)
        assert len(front.attached.unsent) >= 3
        front.cut()
        front.wait(ev.ConnectionChanged, 2)
    front.turn("last")
    texts = [event.text for event in front.of(ev.TurnFinished)]
    assert texts == ["first", "message 0", "message 1", "message 2", "last"]
    assert not front.attached.unsent


def test_a_message_without_a_connection_is_sent_later(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    front.turn("first")
    connect_, tries = front.attached._connect, []

    def refused(*arguments: Any) -> Any:
        tries.append(arguments)
        if len(tries) < 4:
            raise AttachError("not yet")
        return connect_(*arguments)

    monkeypatch.setattr(front.attached, "_connect", refused)
    front.cut()
    front.wait(ev.ConnectionChanged)
    front.engine.send(Submit("typed while away"))
    assert front.attached.unsent == ["typed while away"]
    assert front.wait(ev.TurnFinished, 2).text == "typed while away"
    assert len(tries) == 4


def test_the_reply_goes_on_after_the_front_end_has_left(api: Running) -> None:
    with attached(api, new=True) as front:
        front.engine.send(SetOption("max_new_tokens", 300))
        front.engine.send(Submit("go on"))
        front.wait(ev.TextDelta)
        session = front.attached.session
    with attached(api, session) as again:
        if not again.of(ev.ConversationResumed)[0].turns:
            again.wait(ev.TurnFinished)
            shown = "".join(event.text for event in again.of(ev.TextDelta))
            assert shown == again.of(ev.TurnFinished)[0].reply
        assert again.turn("and now?").stats.turn == 2
    with attached(api, session) as third:
        [turn, _] = third.of(ev.ConversationResumed)[0].turns
        assert turn.reply
        assert turn.finish_reason in ("stop", "length")


def test_a_front_end_that_was_away_too_long_is_drawn_again(api: Running, front: Front) -> None:
    front.turn("first")
    shared = next(each for each in _shared(api) if each.session.id == front.attached.session)
    shared.history._max_events = 5
    with attached(api, front.attached.session) as other:
        front.attached._connect = LaterConnections(front.attached._connect)
        front.cut()
        front.wait(ev.ConnectionChanged)
        front.engine.send(Submit("typed while away"))
        other.turn("meanwhile")
        front.attached._connect.is_open = True
        [turn, later] = front.wait(ev.ConversationResumed).turns
        assert (turn.text, later.text) == ("first", "meanwhile")
        front.wait(ev.TurnFinished, 2)
        assert front.of(ev.TurnFinished)[-1].text == "typed while away"


def _shared(api: Running) -> list[Any]:
    assert api.server._attached is not None
    return list(api.server._attached._shared.values())


def test_clear_moves_a_front_end_whose_connection_is_lost(front: Front) -> None:
    front.turn("first")
    before = front.attached.session
    front.engine.send(Clear())
    front.cut()
    front.wait(ev.ConversationCleared)
    front.turn("second")
    assert front.attached.session not in ("", before)
    assert front.of(ev.TurnFinished)[-1].stats.turn == 1


def test_a_message_that_is_too_long_comes_back(tmp_path: Path) -> None:
    options = Options(port=0, limits=Limits(body_bytes=20_000))
    with serving(tmp_path, options=options) as server, attached(server, new=True) as front:
        front.engine.send(Submit("ä" * 12_000))
        refused = front.wait(ev.TurnFinished)
        assert refused.rolled_back
        assert refused.text == "ä" * 12_000
        assert "the server accepts 20.0 kB; send less" in refused.message
        assert not front.engine.busy
        assert front.turn("short").reply
        assert not front.of(ev.ConnectionChanged)


def test_leaving_waits_until_a_message_has_arrived(api: Running) -> None:
    with attached(api, new=True) as front:
        front.turn("first")
        front.engine.send(Submit("the last one"))
    assert front.attached.unsent == []
    with attached(api, front.attached.session) as again:
        if len(again.of(ev.ConversationResumed)[0].turns) < 2:
            again.wait(ev.TurnFinished)
        assert again.turn("and now?").stats.turn == 3


# --- a slow front end ---------------------------------------------------------------------------------------------


def test_a_front_end_that_does_not_read_delays_nobody(api: Running, front: Front) -> None:
    """Its events are not kept for it: it gets the state when it reads again."""
    front.turn("first")
    shared = next(each for each in _shared(api) if each.session.id == front.attached.session)
    shared.history._max_events = 50
    with raw(api, {"session": front.attached.session}, max_queue=1) as slow:
        slow.recv()  # hello
        for number in range(12):
            front.engine.send(SetOption("system_prompt" if number % 2 else "max_new_tokens", "x" if number % 2 else 40))
            front.turn(f"message {number} {'long ' * 20}")
        assert len(shared.history._texts) <= 50
        kinds = [next(iter(json.loads(slow.recv()))) for _ in range(10)]
        assert kinds[0] in ("state", "received", "number")


# --- who may connect ----------------------------------------------------------------------------------------------


def raw(
    api: Running, query: dict[str, str] | None = None, headers: dict[str, str] | None = None, max_queue: int = 16
) -> Any:
    """A WebSocket that speaks for itself, and sends no pings: their answers are not seen while it does not read."""
    url = parse_address(api.base).socket_url(**({"client": "a" * 32} | (query or {})))
    options: dict[str, Any] = {"max_queue": max_queue, "close_timeout": 0.1, "ping_interval": None, "proxy": None}
    return connect(url, additional_headers=headers, **options)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_a_foreign_page_is_refused(api: Running, origin: str) -> None:
    with pytest.raises(InvalidStatus) as refused, raw(api, None, {"Origin": origin}):
        pass
    assert refused.value.response.status_code == 403
    assert refused.value.response.body == b"the request comes from another page"


def test_refused_front_ends_do_not_fill_the_log(api: Running, caplog: pytest.LogCaptureFixture) -> None:
    """uvicorn logged an error for each of them."""
    for _ in range(3):
        with pytest.raises(InvalidStatus), raw(api, None, {"Origin": "null"}):
            pass
    assert caplog.records == []


def test_a_foreign_name_of_this_machine_is_refused(api: Running) -> None:
    """DNS rebinding: the page's own name leads to this machine."""
    url = parse_address("http://evil.example:80").socket_url(client="a" * 32)
    with (
        socket.create_connection(("127.0.0.1", api.server.port)) as to_this_machine,
        pytest.raises(InvalidStatus) as refused,
        connect(url, proxy=None, sock=to_this_machine),
    ):
        pass
    assert refused.value.response.status_code == 403
    assert b"unknown host name in the request" in (refused.value.response.body or b"")


def test_the_token_is_needed(tmp_path: Path) -> None:
    options = Options(port=0, token_file=tmp_path / "token")
    with serving(tmp_path, options=options) as server:
        for token in ("", "wrong" * 8):
            engine = AttachedEngine(parse_address(server.base, token), Configuration(Settings(), {}))
            with pytest.raises(AttachError, match="needs its token; give --token-file FILE"):
                engine.connect()
        with attached(server, token=server.server.token) as front:
            assert front.turn("hello").reply


@pytest.mark.parametrize("query", [{"client": ""}, {"client": "../" * 9}, {"after": "-1"}, {"after": "9" * 30}])
def test_an_address_that_is_not_complete_is_refused(api: Running, query: dict[str, str]) -> None:
    with pytest.raises(InvalidStatus) as refused, raw(api, query):
        pass
    assert refused.value.response.status_code == 400


@pytest.mark.parametrize("session", ["nosuchsession", "%00", "x" * 500])
def test_an_unknown_session_is_one_sentence(api: Running, session: str) -> None:
    engine = AttachedEngine(parse_address(api.base), Configuration(Settings(), {}), session)
    seen: list[ev.Event] = []
    engine.subscribe(seen.append)
    engine.start()
    deadline = time.monotonic() + 30
    while not any(isinstance(event, ev.EngineClosed) for event in seen) and time.monotonic() < deadline:
        time.sleep(0.01)
    [failed, _] = [event for event in seen if isinstance(event, ev.EngineFailed | ev.EngineClosed)]
    assert isinstance(failed, ev.EngineFailed)
    assert "no saved session has the id" in failed.message
    assert failed.exit_code == ExitCode.STORE
    assert engine.close(60)


HOSTILE: list[tuple[str | bytes, str]] = [
    ("", "a message must be a JSON object"),
    ("{", "a message must be a JSON object"),
    ("[]", "a message must be an object with the fields number, request"),
    (b"\xff\xfe", "a message must be a JSON object in UTF-8"),
    ("[" * 100_000, "a message is nested too deeply"),
    ('{"number": 1}', "a message must be an object with the fields"),
    ('{"number": -1, "request": {"type": "Stop"}}', "-1 is not a number of a message"),
    ('{"number": true, "request": {"type": "Stop"}}', "True is not a number of a message"),
    ('{"number": 1e400, "request": {"type": "Stop"}}', "is not a number of a message"),
    ('{"number": 1, "request": null}', "a request = None is not valid"),
    ('{"number": 1, "request": {"type": "Exec"}}', "'Exec' is not a type of request"),
    ('{"number": 1, "request": {"type": "Submit"}}', "Submit needs the field 'text'"),
    ('{"number": 1, "request": {"type": "Pin", "turn": "1"}}', "Pin.turn = '1' is not valid"),
    ('{"number": 1, "number": 2, "request": {"type": "Stop"}}', "a field is given twice"),
]


def test_hostile_messages_are_refused_with_one_sentence(api: Running) -> None:
    with raw(api, {"new": "1", "client": "b" * 32}) as socket:
        for sent, sentence in HOSTILE:
            socket.send(sent)
            assert sentence in _notice(socket)
        socket.send('{"number": 1, "request": {"type": "Submit", "text": "hello"}}')
        assert any("TurnFinished" in socket.recv(timeout=30) for _ in range(60))
        with pytest.raises(ConnectionClosed):
            _flood(socket)


def _flood(socket: Any) -> None:
    for _ in range(served.MAX_ERRORS + 1):
        socket.send("{")
        _notice(socket)


def _notice(socket: Any) -> str:
    """The text of the next notice that is for this front end only."""
    while True:
        message = json.loads(socket.recv(timeout=30))
        if set(message) == {"event"} and message["event"]["type"] == "Notice":
            return str(message["event"]["text"])


def test_a_session_that_another_program_has_open_is_tried_again(tmp_path: Path) -> None:
    """After a restart, the front end waits until the program that has its session now closes it."""
    port = free_port()
    with serving(tmp_path, options=Options(port=port)) as server:
        entered = attached(server, new=True)
        front = entered.__enter__()
        front.turn("hello")
    front.wait(ev.ConnectionChanged)
    with running(store=tmp_path / "sessions.db", session=front.attached.session) as embedded:
        embedded.wait(ev.ModelReady)
        with serving(tmp_path, options=Options(port=port)):
            assert "is open in another streamchat process" in front.wait(ev.ConnectionChanged, 2).reason
            assert embedded.engine.close(30)
            assert front.wait(ev.ConnectionChanged, 3).works
            assert front.turn("and now?").stats.turn == 2
            entered.__exit__(None, None, None)


def test_a_session_that_was_deleted_is_not_tried_again(tmp_path: Path) -> None:
    """After a restart, the front end asked for its session forever, every five seconds."""
    port = free_port()
    with serving(tmp_path, options=Options(port=port)) as server:
        entered = attached(server, new=True)
        front = entered.__enter__()
        front.turn("hello")
    front.wait(ev.ConnectionChanged)
    with Store(tmp_path / "sessions.db") as store:
        store.delete(front.attached.session)
    with serving(tmp_path, options=Options(port=port)):
        failed = front.wait(ev.EngineFailed)
        assert "no saved session has the id" in failed.message
        front.wait(ev.EngineClosed)
        entered.__exit__(None, None, None)


# --- a server that is killed --------------------------------------------------------------------------------------


def until_saved(session: str, text: str) -> None:
    """Wait until the start of the reply to a message is on the disk."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with Store() as store:
            if any(turn.text == text and turn.reply for turn in store.load(session).turns):
                return
        time.sleep(0.05)
    raise AssertionError("nothing was saved")


def test_a_front_end_survives_a_killed_server() -> None:
    port = free_port()
    with process(port) as server, attached(f"http://127.0.0.1:{port}", new=True) as front:
        front.turn("hello")
        session = front.attached.session
        begin_endless(front)
        front.engine.send(Submit("queued on the server"))
        until_saved(session, "go on")
        server.send_signal(signal.SIGKILL)
        server.wait()
        front.wait(ev.ConnectionChanged)
        front.engine.send(Submit("typed while away"))
        with process(port):
            front.wait(ev.ConnectionChanged, 2)
            resumed = front.wait(ev.ConversationResumed)
            assert front.attached.session == session
            assert [turn.text for turn in resumed.turns] == ["hello", "go on"]
            given_back = [event.text for event in front.of(ev.TurnFinished) if event.rolled_back]
            assert given_back == ["queued on the server"]
            front.wait(ev.TurnStarted, 3)
            front.engine.send(Stop())  # the setting for an endless reply is that of the session
            front.wait(ev.TurnFinished, 4)
            assert front.of(ev.TurnFinished)[-1].text == "typed while away"
            assert front.of(ev.TurnStarted)[-1].turn == 3
            assert "restarted" in " ".join(event.text for event in front.of(ev.Notice))


def test_a_server_that_stops_keeps_the_reply(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        entered = attached(server, new=True)
        front = entered.__enter__()
        begin_endless(front)
    front.wait(ev.ConnectionChanged)
    with Store(tmp_path / "sessions.db") as store:
        [turn] = store.load(front.attached.session).turns
        assert turn.text == "go on"
        assert turn.finish_reason == "cancelled"
    entered.__exit__(None, None, None)
