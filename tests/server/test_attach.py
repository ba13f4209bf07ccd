"""Front ends of other processes on the sessions of a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamchat.base import events as ev
from streamchat.base.requests import (
    Clear,
    Compact,
    CountTokens,
    FetchModel,
    OpenSession,
    Pin,
    Quote,
    Request,
    ResetOption,
    Retry,
    SetOption,
    SetSystemPrompt,
    Stop,
    Submit,
    SwitchModel,
    Undo,
)
from streamchat.server.known import KnownSession
from streamchat.store.store import Store
from tests.support.api_server import Running, serving, text_of
from tests.support.real_engine import Watched, running

pytest.importorskip("websockets", reason="the package websockets is not installed")

from tests.support.attached import ENDLESS, Front, attached, begin_endless, steady
from tests.support.attached import api as api  # fixtures
from tests.support.attached import front as front


def ids_of(api: Running, session: str) -> list[int]:
    """The token log of a session that is live."""

    def read() -> list[int]:
        live = api.server.model.live
        assert live is not None
        [seat] = [seat for seat in live.seats if seat.session is not None and seat.session.id == session]
        return list(seat.conversation.log.ids)

    return api.on_model_thread(read)


def known_of(api: Running, session: str) -> KnownSession:
    found = api.server.model.known.get(session)
    assert found is not None
    return found


# --- several front ends -------------------------------------------------------------------------------------------


def test_two_front_ends_get_the_same_events(api: Running, front: Front) -> None:
    first = front.turn("hello")
    with attached(api, front.attached.session) as other:
        [resumed] = other.of(ev.ConversationResumed)
        assert [(turn.text, turn.reply, turn.new_tokens) for turn in resumed.turns] == [
            ("hello", first.reply, first.stats.new_tokens)
        ]
        other.turn("from the other one")
        answer = api.complete(
            [
                *({"role": role, "content": text} for role, text in (("user", "hello"), ("assistant", first.reply))),
                {"role": "user", "content": "from the other one"},
                {"role": "assistant", "content": other.of(ev.TurnFinished)[-1].reply},
                {"role": "user", "content": "from a client of the API"},
            ]
        )
        front.engine.send(Pin(1))
        front.engine.send(Undo())
        other.wait(ev.TurnUndone)
        front.wait(ev.TurnUndone)
        seen = dict(other.numbered)
        both = [(number, event) for number, event in front.numbered if number in seen]
        assert [(number, seen[number]) for number, _ in both] == both
        assert len({type(event) for _, event in both}) >= 6
        assert [event.text for event in front.of(ev.TurnStarted)][1:] == [
            "from the other one",
            "from a client of the API",
        ]
        assert front.of(ev.TurnFinished)[-1].reply.strip() == text_of(answer)
        assert steady(front.numbered)
        assert steady(other.numbered)


def test_a_front_end_in_the_middle_of_a_reply_gets_all_of_it(api: Running, front: Front) -> None:
    begin_endless(front)
    with attached(api, front.attached.session) as other:
        [started] = other.of(ev.TurnStarted)
        assert started.text == "go on"
        other.wait(ev.TextDelta, 4)
        other.engine.send(Stop())
        finished = other.wait(ev.TurnFinished)
        assert finished.finish_reason == "cancelled"
        assert "".join(event.text for event in other.of(ev.TextDelta)) == finished.reply
        assert front.wait(ev.TurnFinished) == finished


def test_requests_of_all_clients_are_in_one_order(api: Running, front: Front) -> None:
    reply = front.turn("hello").reply
    with attached(api, front.attached.session) as other:
        for number in range(4):
            front.engine.send(Submit(f"one {number}"))
            other.engine.send(Submit(f"two {number}"))
        front.wait(ev.TurnFinished, 9)
        other.wait(ev.TurnFinished, 8)
    texts = [event.text for event in front.of(ev.TurnFinished)]
    for name in ("one", "two"):
        assert [text for text in texts if text.startswith(name)] == [f"{name} {number}" for number in range(4)]
    assert [event.turn for event in front.of(ev.TurnStarted)] == list(range(1, 10))
    assert reply
    with Store(_path(api)) as store:
        assert [turn.text for turn in store.load(front.attached.session).turns] == texts


def _path(api: Running) -> Path:
    saved = api.server.model.saved
    assert saved is not None
    return saved._store.path


def test_stop_ends_a_reply_of_the_api_as_well(api: Running, front: Front) -> None:
    from concurrent.futures import ThreadPoolExecutor

    first = front.turn("stop me")
    history = [{"role": "user", "content": "stop me"}, {"role": "assistant", "content": first.reply}]
    asked = [*history, {"role": "user", "content": "an endless one"}]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: api.complete(asked, max_tokens=ENDLESS))
        front.wait(ev.TextDelta, len(front.of(ev.TextDelta)) + 3)
        front.engine.send(Stop())
        assert answer.result(60)["choices"][0]["finish_reason"] == "length"
    assert front.wait(ev.TurnFinished, 2).finish_reason == "cancelled"


# --- as the embedded chat -----------------------------------------------------------------------------------------

REQUESTS: list[Request] = [
    Submit("first of all"),
    Submit("and the second"),
    Pin(1),
    Submit("a third one, which is longer than those before it"),
    Undo(),
    Submit("another third one"),
    Retry(),
    Quote("Remember what I said:\n\n> first of all", "Noted.", pin=True),
    SetOption("temperature", 0.3),
    Submit("colder"),
    ResetOption("temperature"),
    SetOption("seed", 7),
    Submit("and more of it until tokens are evicted"),
    Undo(to_edit=True),
    Compact(),
    CountTokens("how many"),
    Submit("the end"),
]


def test_everything_works_as_in_the_embedded_chat(api: Running, front: Front, tmp_path: Path) -> None:
    with running(store=tmp_path / "sessions.db", temperature=0.8) as embedded:
        embedded.wait(ev.ModelReady)
        carry_out(embedded, REQUESTS)
        ids = list(embedded.conversation.log.ids)
        expected = [shown(event) for event in embedded.events if isinstance(event, COMPARED)]
    carry_out(front, REQUESTS)
    assert ids_of(api, front.attached.session) == ids
    assert [shown(event) for event in front.events if isinstance(event, COMPARED)] == expected
    assert front.of(ev.TokensEvicted)


def carry_out(watched: Watched, requests: list[Request]) -> None:
    """Send requests, and wait for the end of the last turn."""
    for request in requests:
        watched.engine.send(request)
    for count in range(1, 1 + sum(isinstance(request, Submit | Retry | Quote) for request in requests)):
        watched.wait(ev.TurnFinished, count)


COMPARED = (
    *(ev.TurnStarted, ev.TextDelta, ev.TurnFinished, ev.TurnUndone, ev.TurnPinned, ev.TokensEvicted, ev.Notice),
    *(ev.SettingChanged, ev.SummaryReady, ev.TextCounted),
)


def shown(event: ev.Event) -> tuple[object, ...]:
    """What a user sees of an event, without times and memory."""
    match event:
        case ev.TurnFinished():
            return ("finished", event.stats.turn, event.reply, event.text, event.stats.cache_len, event.finish_reason)
        case ev.TurnUndone():
            return ("undone", event.turn, event.text, event.restored, event.replaced, event.to_edit)
        case _:
            return (event,)


def test_clear_and_resume_move_only_the_front_end_that_asks(api: Running, front: Front) -> None:
    front.turn("hello")
    before = front.attached.session
    with attached(api, before) as other:
        front.engine.send(Clear())
        front.engine.send(Submit("in the new one"))  # sent before the answer
        cleared = front.wait(ev.ConversationCleared)
        front.wait(ev.TurnFinished, 2)
        assert cleared.system_prompt == ""
        assert front.attached.session not in (before, "")
        assert other.attached.session == before
        assert other.turn("in the old one").stats.turn == 2
        front.engine.send(OpenSession(before))
        [_, resumed] = [front.wait(ev.ConversationResumed), *front.of(ev.ConversationResumed)]
        assert [turn.text for turn in resumed.turns] == ["hello", "in the old one"]
        front.engine.send(OpenSession("nosuch"))
        assert "no saved session has the id 'nosuch'" in front.wait(ev.Notice).text
        assert front.turn("together again").stats.turn == 3
        other.wait(ev.TurnFinished, 2)
        assert not other.of(ev.ConversationCleared)


def test_a_system_prompt_starts_a_session_with_it(api: Running, front: Front) -> None:
    front.engine.send(SetSystemPrompt("Be brief."))
    cleared = front.wait(ev.ConversationCleared)
    assert cleared.system_prompt == front.engine.settings.system_prompt == "Be brief."
    assert cleared.pinned_tokens > 0
    front.turn("hello")
    assert known_of(api, front.attached.session).system == "Be brief."


def test_the_model_belongs_to_the_server(front: Front) -> None:
    front.engine.send(SwitchModel("pythia-70m"))
    assert "start `streamchat serve` with --model pythia-70m" in front.wait(ev.Notice).text
    front.engine.send(FetchModel("pythia-70m"))
    assert "the model belongs to the server" in front.wait(ev.ModelFetched).error


def test_settings_of_the_session_are_shared_and_those_of_the_interface_are_not(api: Running, front: Front) -> None:
    front.turn("hello")
    with attached(api, front.attached.session) as other:
        front.engine.send(SetOption("temperature", 0.4))
        other.wait(ev.SettingChanged)
        assert (other.engine.settings.temperature, other.engine.origin("temperature")) == (0.4, "/set")
        front.engine.send(SetOption("thinking", "show"))
        front.turn("done")
        assert front.engine.settings.thinking == "show"
        assert other.engine.settings.thinking == "collapse"
        assert other.engine.settings.cache_size == 128
    with attached(api, front.attached.session) as third:
        assert third.engine.settings.temperature == 0.4
    with attached(api, new=True) as fourth:
        assert fourth.engine.settings.temperature == 0.8


def test_the_newest_session_is_the_default(api: Running, front: Front) -> None:
    front.turn("the newest")
    with attached(api) as other:
        assert other.attached.session == front.attached.session


def test_without_a_store_the_live_session_is_found_and_a_lost_one_is_reported() -> None:
    from streamchat.server.options import Options

    with serving(None, options=Options(port=0, live=1)) as server, attached(server) as front:
        front.turn("hello")
        with attached(server) as other:
            assert [turn.text for turn in other.wait(ev.ConversationResumed).turns] == ["hello"]
        server.complete([{"role": "user", "content": "needs the only seat"}])
        front.turn("and now?")
        assert front.of(ev.ConversationCleared)
        assert "not saved" in front.of(ev.Notice)[-1].text


def history(*turns: tuple[str, str]) -> list[dict[str, str]]:
    """The messages of these turns."""
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def test_a_front_end_sees_what_the_api_undoes_and_the_api_what_a_front_end_undoes(api: Running, front: Front) -> None:
    first = front.turn("the one that stays").reply
    front.turn("the one that is undone")
    front.engine.send(Undo())
    front.wait(ev.TurnUndone)
    asked = [*history(("the one that stays", first)), {"role": "user", "content": "a client's"}]
    api.complete(asked)
    api.complete(asked)  # another reply to the same message
    front.wait(ev.TurnFinished, 4)
    assert [event.turn for event in front.of(ev.TurnStarted)] == [1, 2, 2, 2]
    assert [event.text for event in front.of(ev.TurnUndone)] == ["the one that is undone", "a client's"]


def test_turns_of_another_program_are_shown(tmp_path: Path) -> None:
    """The session leaves its seat, an embedded chat continues it, and a front end that stayed attached goes on."""
    from streamchat.server.options import Options

    with serving(tmp_path, options=Options(port=0, live=1)) as server, attached(server, new=True) as front:
        front.turn("hello")
        server.complete([{"role": "user", "content": "needs the only seat"}])
        store = tmp_path / "sessions.db"
        with running(store=store, session=front.attached.session) as embedded:
            embedded.wait(ev.ModelReady)
            embedded.turn("elsewhere")
            front.engine.send(Submit("too early"))
            failed = front.wait(ev.TurnFinished, 2)
            assert failed.rolled_back
            assert failed.text == "too early"
            assert "is open in another streamchat process" in failed.message
        assert front.turn("and here").stats.turn == 3
        [resumed] = front.of(ev.ConversationResumed)
        assert [turn.text for turn in resumed.turns] == ["hello", "elsewhere"]


def test_settings_of_a_session_survive_its_seat(tmp_path: Path) -> None:
    from streamchat.server.options import Options

    with serving(tmp_path, options=Options(port=0, live=1)) as server, attached(server, new=True) as front:
        front.engine.send(SetOption("max_new_tokens", 3))
        reply = front.turn("hello").reply
        server.complete([{"role": "user", "content": "needs the only seat"}])
        assert front.turn("short again").stats.new_tokens == 3
        asked = [*history(("hello", reply), ("short again", front.of(ev.TurnFinished)[-1].reply))]
        answer = server.complete([*asked, {"role": "user", "content": "of a client"}])
        assert answer["usage"]["completion_tokens"] == 3
        assert front.wait(ev.TurnFinished, 3).text == "of a client"
