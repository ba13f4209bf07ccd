"""The public `Chat`: its events, errors, interruption, sessions, and that it works inside a notebook."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import gc
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import streamchat
from streamchat import Chat, events
from streamchat.base.errors import (
    ConfigError,
    ModelNotFoundError,
    SessionError,
    StoreError,
    StreamchatError,
    TurnError,
)
from streamchat.base.requests import Stop
from streamchat.scripting import chat as module
from streamchat.scripting.reply import Reply, reply_markdown
from streamchat.store.records import ModelIdentity, NewSession
from streamchat.store.store import Store
from tests.support.real_engine import tiny_loaded
from tests.support.saved_sessions import a_turn
from tests.support.scripted_engine import Reply as Scripted
from tests.support.scripted_engine import ScriptedEngine

Scripts = Callable[..., Chat]


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripts]:
    """Makes chats on the engine, with a tiny random model in place of the named one."""
    monkeypatch.setattr(module, "load_from_settings", lambda *_: tiny_loaded())
    made: list[Chat] = []

    def make(*args: Any, **settings: Any) -> Chat:
        made.append(Chat(*args, **{"max_new_tokens": 12, "seed": 1, "cache_size": 96} | settings))
        return made[-1]

    yield make
    for chat in made:
        chat.close()


class Scripting:
    """A chat on a scripted engine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *replies: Scripted | str, **more: Any) -> None:
        self.engine = engine = ScriptedEngine(replies, sample_s=0.05, **more)
        monkeypatch.setattr(module, "Engine", lambda *args, **kwargs: engine)
        self.chat = Chat()


def kinds(found: list[events.Event]) -> list[str]:
    return [type(event).__name__ for event in found]


# --- turns ------------------------------------------------------------------------------------------------------


def test_a_turn_is_a_stream_of_typed_events(real: Scripts) -> None:
    with real() as chat:
        stream = chat.send("Hello there")
        assert not stream.is_done
        found = list(stream)
        assert (kinds(found)[0], kinds(found)[-1]) == ("TurnStarted", "TurnFinished")
        assert "StatusSampled" not in kinds(found)
        assert "TextCounted" not in kinds(found)
        last = found[-1]
        assert isinstance(last, events.TurnFinished)
        assert "".join(event.text for event in found if isinstance(event, events.TextDelta)) == last.reply
        assert stream.reply == last.reply
        assert stream.reply.finish_reason == last.finish_reason
        assert (stream.reply.stats, stream.reply.stats.turn) == (last.stats, 1)
        assert [(turn.number, turn.text, turn.reply) for turn in chat.history] == [(1, "Hello there", last.reply)]
        assert list(stream) == []  # it ends once


def test_evictions_are_events_and_the_cache_never_grows(real: Scripts) -> None:
    with real(cache_size=64) as chat:
        found = [event for n in range(5) for event in chat.send(f"message {n}")]
        evicted = [event for event in found if isinstance(event, events.TokensEvicted)]
        assert evicted
        assert all(event.cache_len_after < event.cache_len_before <= 64 for event in evicted)
        status = chat.status
        assert 0 < status.cache.length <= status.cache.cache_size == 64
        assert status.cache.tokens_evicted == sum(event.count for event in evicted)
        assert (status.turns, status.session, status.model.name) == (5, None, "tiny")
        assert "tokens evicted" in str(status)
        assert repr(chat) == f"<Chat with tiny: 5 turns, {status.cache.length} of 64 tokens cached>"


def test_a_reply_is_text_with_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Scripting(
        monkeypatch, "<think>Well.\n\nYes.</think>Hello *you* <b>", Scripted("cut", finish_reason="length")
    ).chat
    reply = chat.ask("hi")
    assert isinstance(reply, str)
    assert (reply.thoughts, reply.answer, reply.finish_reason) == ("Well.\n\nYes.", "Hello *you* <b>", "stop")
    assert reply._repr_markdown_() == "> Well.\n>\n> Yes.\n\nHello *you* \\<b>"
    assert reply_markdown("plain") == "plain"
    assert chat.ask("more").finish_reason == "length"
    chat.close()


def test_undo_pin_clear_retry_and_set(real: Scripts) -> None:
    with real(system_prompt="Be kind.") as chat:
        with pytest.raises(ConfigError, match="no reply to"):
            chat.retry()
        with pytest.raises(ConfigError, match="nothing to undo yet"):
            chat.undo()
        with pytest.raises(ConfigError, match="no turn yet"):
            chat.pin()
        chat.ask("one")
        chat.ask("two")
        pinned = chat.status.cache.pinned
        chat.pin()
        assert chat.status.cache.pinned > pinned
        chat.unpin(2)
        assert chat.status.cache.pinned == pinned
        with pytest.raises(ConfigError, match="7"):
            chat.pin(7)
        assert chat.undo() == "two"
        assert [turn.text for turn in chat.history] == ["one"]
        assert kinds(list(chat.retry()))[-1] == "TurnFinished"
        assert [turn.text for turn in chat.history] == ["one"]
        chat.set(temperature=0, max_new_tokens=3)
        assert (chat.settings.temperature, chat.ask("three").stats.new_tokens <= 3) == (0, True)
        with pytest.raises(ConfigError, match="cache_size cannot change during a chat"):
            chat.set(cache_size=64)
        with pytest.raises(ConfigError, match="temperature = -1"):
            chat.set(temperature=-1)
        chat.clear()
        assert (chat.history, chat.status.turns) == ((), 0)


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"cache_sise": 64}, "argument cache_sise: unknown setting; did you mean cache_size?"),
        ({"cache_size": 8}, "argument cache_size: cache_size = 8 is not valid; it must be at least 16"),
        ({"cache_size": "64"}, "argument cache_size: cache_size must be a whole number"),
        ({"cache_size": 64, "compression_ratio": 0.5}, "both set the cache budget; give one of them"),
        ({"num_sink_tokens": 5000}, "num_sink_tokens = 5000 does not fit into cache_size = 1024"),
        ({"theme": "nord"}, "theme is a setting of the terminal; a Chat has those of model, cache, generation, chat"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(arguments: dict[str, Any], reason: str) -> None:
    threads = threading.active_count()
    with pytest.raises(ConfigError) as raised:
        Chat(**arguments)
    assert reason in str(raised.value)
    assert threading.active_count() == threads


def test_a_model_that_is_missing_is_an_error_of_its_kind() -> None:
    with pytest.raises(streamchat.base.errors.ModelError, match=r"no_such_model\.gguf"):
        Chat("./no_such_model.gguf")
    assert issubclass(ModelNotFoundError, streamchat.base.errors.ModelError)


def test_environment_and_files_are_not_read(real: Scripts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STREAMCHAT_TEMPERATURE", "2.5")
    (tmp_path / "config.toml").write_text("[streamchat]\nconfig_version = 1\n[generation]\ntop_k = 7\n")
    monkeypatch.chdir(tmp_path)
    with real() as chat:
        assert (chat.settings.temperature, chat.settings.top_k) == (0.7, 0)


def test_a_turn_that_fails_raises_and_the_chat_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Scripting(monkeypatch, Scripted("some text", error="the turn failed"), "fine").chat
    found: list[events.Event] = []
    with pytest.raises(TurnError, match="the turn failed"):
        found.extend(chat.send("hi"))
    assert kinds(found)[-1] == "TurnFinished"
    assert chat.history == ()
    assert chat.ask("again") == "fine"
    for text in ("", " \n"):
        with pytest.raises(ConfigError, match="a message needs text"):
            chat.send(text)
    chat.close()


def test_an_engine_that_fails_or_is_closed_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    scripting = Scripting(monkeypatch, Scripted("one two three", hold_after=1))
    stream = scripting.chat.send("hi")
    assert kinds([next(stream)]) == ["TurnStarted"]
    scripting.engine.fail("the disk is on fire", exit_code=5)
    scripting.engine.release()
    list(stream)
    with pytest.raises(StoreError, match="the disk is on fire"):
        scripting.chat.ask("more")
    with pytest.raises(StoreError, match="the disk is on fire"):
        scripting.chat.undo()
    scripting.chat.close()
    scripting.chat.close()
    for call in (lambda: scripting.chat.send("x"), scripting.chat.undo, scripting.chat.clear):
        with pytest.raises(StreamchatError, match="the chat is closed; make a new one"):
            call()
    assert repr(scripting.chat).endswith("closed>")


# --- stopping ---------------------------------------------------------------------------------------------------


@pytest.fixture
def _interrupts() -> Iterator[None]:
    """Python's own handler: whoever starts the tests in the background may have them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts")
def test_an_interrupt_stops_the_reply_and_the_chat_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    scripting = Scripting(monkeypatch, Scripted("one two three", hold_after=2), "fine")

    def interrupt() -> None:
        assert scripting.engine.wait_event(events.TextDelta, 2)
        time.sleep(0.1)  # the reader waits
        _thread.interrupt_main()

    threading.Thread(target=interrupt).start()
    found: list[events.Event] = []
    with pytest.raises(KeyboardInterrupt):
        found.extend(scripting.chat.send("hi"))
    assert [event.text for event in found if isinstance(event, events.TextDelta)] == ["one ", "two "]
    [turn] = scripting.chat.history
    assert (turn.reply, turn.finish_reason) == ("one two ", "cancelled")
    assert scripting.chat.ask("again") == "fine"
    scripting.chat.close()


def test_a_stream_that_is_dropped_stops_the_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    scripting = Scripting(monkeypatch, *[Scripted("one two three", hold_after=1)] * 3, "fine")
    chat = scripting.chat
    for event in chat.send("hi"):
        if isinstance(event, events.TextDelta):
            break
    gc.collect()
    assert scripting.engine.wait_event(events.TurnFinished)
    kept = chat.send("hi")  # its end is read by the next call
    next(kept)
    assert scripting.engine.wait_event(events.TextDelta, 2)
    chat.stop()
    assert scripting.engine.wait_event(events.TurnFinished, 2)
    closed = chat.send("hi")
    assert scripting.engine.wait_event(events.TextDelta, 3)
    closed.close()
    assert closed.is_done
    assert closed.reply == "one "
    assert chat.ask("again") == "fine"
    assert [turn.finish_reason for turn in chat.history] == ["cancelled"] * 3 + ["stop"]
    chat.close()


def test_another_thread_may_stop_but_not_call(monkeypatch: pytest.MonkeyPatch) -> None:
    scripting = Scripting(monkeypatch, Scripted("one two three", hold_after=1), "fine")
    stream = scripting.chat.send("hi")
    next(stream)
    assert scripting.engine.wait_event(events.TextDelta)
    raised: list[Exception] = []

    def elsewhere() -> None:
        try:
            scripting.chat.ask("me too")
        except TurnError as error:
            raised.append(error)
        scripting.chat.stop()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "another thread is reading a reply" in str(raised[0])
    list(stream)
    assert [turn.finish_reason for turn in scripting.chat.history] == ["cancelled"]
    assert sum(isinstance(request, Stop) for request in scripting.engine.sent) == 1
    scripting.chat.close()


def test_what_happened_between_calls_is_logged_and_is_not_in_the_next_turn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scripting = Scripting(monkeypatch, "one", "two")
    scripting.chat.ask("hi")
    scripting.engine.emit(events.Notice("the disk is full", "warning"))
    assert kinds(list(scripting.chat.send("more")))[0] == "TurnStarted"
    assert [(record.levelname, record.message) for record in caplog.records] == [("WARNING", "the disk is full")]
    scripting.chat.close()


def test_a_dropped_chat_ends_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    scripting = Scripting(monkeypatch)
    engine = scripting.engine
    del scripting
    gc.collect()
    assert engine.closing


# --- notebooks --------------------------------------------------------------------------------------------------


async def test_it_works_inside_a_running_event_loop(real: Scripts) -> None:
    assert asyncio.get_running_loop().is_running()
    with real() as chat:
        assert chat.ask("Hello").stats.turn == 1


def test_show_prints_what_is_safe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Scripting(monkeypatch, "one \x1b[2Jtwo").chat
    chat.show("hi")
    assert chat.history[-1].reply == "one \x1b[2Jtwo"
    assert capsys.readouterr().out == "one two\n"
    chat.close()


def test_show_updates_the_output_of_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Handle:
        update = staticmethod(shown.append)

    def display(first: str, *, display_id: bool) -> Handle:
        assert (first, display_id) == ("", True)
        return Handle()

    ipython: Any = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    outputs: Any = types.ModuleType("IPython.display")
    outputs.display, outputs.Markdown = display, str
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", outputs)
    chat = Scripting(monkeypatch, "**one** two <b>", Scripted("cut off", error="it failed")).chat
    chat.show("hi")
    assert shown[0] == "**one** "
    assert shown[-1] == "**one** two \\<b>"
    with pytest.raises(TurnError):
        chat.show("again")
    assert shown[-1] == "cut off"
    chat.close()


# --- sessions ---------------------------------------------------------------------------------------------------


def sessions() -> list[str]:
    with Store() as store:
        return [info.id for info in store.sessions()]


def test_nothing_is_saved_unless_asked(real: Scripts, tmp_path: Path) -> None:
    with real() as chat:
        with pytest.raises(SessionError, match="nothing to save yet"):
            chat.save()
        chat.ask("one")
        chat.ask("two")
        assert (chat.session, sessions()) == (None, [])
        with pytest.raises(SessionError, match=r"not saved; call save\(\) first"):
            chat.export(tmp_path / "a.html")
        session = chat.save("All of it")
        assert (chat.session, sessions()) == (session, [session])
        chat.ask("three")
        assert chat.save() == session
        length, history = chat.status.cache.length, chat.history
    with Store() as store:
        saved = store.load(session)
    assert saved.info.title == "All of it"
    assert [turn.text for turn in saved.turns] == ["one", "two", "three"]
    assert sum(stop - first for first, stop in saved.info.held) == length
    with real(session=session[:5], max_new_tokens=4) as chat:  # the cache comes from its snapshot
        assert chat.status.cache.length == length
        assert [(turn.text, turn.reply) for turn in chat.history] == [(turn.text, turn.reply) for turn in history]
        assert (chat.session, chat.ask("four").stats.new_tokens <= 4) == (session, True)


def test_a_chat_that_saves_can_be_exported_searched_and_opened(real: Scripts, tmp_path: Path) -> None:
    with real(save=True) as chat:
        chat.ask("tell me of quetzals")
        first = chat.session
        assert first is not None
        assert chat.export(tmp_path / "a.html") == tmp_path / "a.html"
        assert "tell me of quetzals" in (tmp_path / "a.html").read_text(encoding="utf-8")
        with pytest.raises(StoreError, match="already exists"):
            chat.export(str(tmp_path / "a.html"))
        with pytest.raises(ConfigError, match=r"a\.pdf: the file name must end in"):
            chat.export("a.pdf")
        assert [(hit.session, hit.turn) for hit in chat.recall("quetzals") if hit.role == "user"] == [(first, 1)]
        chat.clear()
        assert chat.session is None
        chat.ask("another")
        assert sorted(sessions()) == sorted([first, str(chat.session)])
        chat.open(first)
        assert [turn.text for turn in chat.history] == ["tell me of quetzals"]
        with pytest.raises(SessionError, match="no saved session has the id 'zzz'"):
            chat.open("zzz")
        assert chat.ask("still here").stats.turn == 2


def test_rewind_and_fork(real: Scripts) -> None:
    with real(save=True) as chat:
        for text in ("one", "two", "three"):
            chat.ask(text)
        first = chat.session
        done = chat.rewind(2)
        assert (done.turn, done.undone, done.is_exact, done.prefilled) == (2, 1, True, 0)
        assert [turn.text for turn in chat.history] == ["one", "two"]
        assert chat.session == first
        child = chat.fork(1)
        assert (chat.session, [turn.text for turn in chat.history]) == (child, ["one"])
        chat.open(done.kept_as)
        assert [turn.text for turn in chat.history] == ["one", "two", "three"]
        with pytest.raises(ConfigError, match="7 is not a turn"):
            chat.rewind(7)
        with pytest.raises(ConfigError, match="7 is not a turn"):
            chat.fork(7)
        with pytest.raises(ConfigError, match="0 is not a turn of this conversation; it has 3 turns"):
            chat.fork(0)
        with pytest.raises(ConfigError, match="0 is not a turn"):
            chat.rewind(0)
        with pytest.raises(ConfigError, match="a turn is a whole number, not 'one'"):
            chat.retry("one")  # type: ignore[arg-type]
        assert [turn.text for turn in chat.history] == ["one", "two", "three"]
    with real() as chat:
        chat.ask("one")
        chat.ask("two")
        with pytest.raises(ConfigError, match="turn 2 would be lost"):
            chat.rewind(1)
        with pytest.raises(ConfigError, match="is not saved, so it cannot be forked"):
            chat.fork()
        assert chat.rewind(1, drop=True).kept_as == ""


def test_opening_needs_no_saving_before_it_and_asks_for_trust(real: Scripts) -> None:
    with real(save=True) as chat:
        chat.ask("one")
        session = str(chat.session)
    with real() as chat:
        chat.ask("not saved")
        chat.open(session)
        assert [turn.text for turn in chat.history] == ["one"]
        assert sessions() == [session]
        other = real()
        other.ask("something")
        with pytest.raises(SessionError, match="is open in"):
            other.open(session)
        other.ask("more")
        other.undo()
        assert (other.session, sessions()) == (None, [session])
    strange = NewSession("t", ModelIdentity("evil/model", "E"), {"model": "evil/model"}, (a_turn(1, "hi", "ho"),))
    with Store() as store:
        [imported] = store.add([strange])
    with pytest.raises(SessionError, match=r"names the model evil/model.*; trust_model=True loads it"):
        Chat(session=imported)
    with pytest.raises(SessionError, match="no saved session has the id 'zzzzzz'"):
        Chat(session="zzzzzz")


def test_the_example_of_the_docs_runs_as_it_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "load_from_settings", lambda *_: tiny_loaded())
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    [example] = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "import Chat" in block]
    exec(compile(example, "docs/python.md", "exec"), {})
    out = capsys.readouterr().out
    assert re.search(r"\n\((stop|length): \d+ tokens, \d+ of 256 cached\)\n", out)
    assert re.search(r"2 turns, (stop|length)\n$", out)


def test_a_reply_can_be_made_of_any_turn() -> None:
    stats = events.TurnStats(1, 1, 1, 1, 1, 0, 0, None, None, 0, 0, None, "stop")
    assert Reply(events.TurnFinished(stats, "stop", "text")).answer == "text"


def test_threads_that_send_at_the_same_moment_get_a_reply_or_an_error(
    real: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other starts a turn: no two read the events of one, which would let one wait forever."""
    chat = real()
    settle, both = chat._calls._settle, threading.Barrier(2)

    def settle_together() -> None:
        settle()
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)

    monkeypatch.setattr(chat._calls, "_settle", settle_together)
    streams: list[tuple[str, list[events.Event]]] = []

    def ask(text: str) -> None:
        with contextlib.suppress(TurnError):
            streams.append((text, list(chat.send(text))))

    for _ in range(5):
        both.reset()
        threads = [threading.Thread(target=ask, args=(text,), daemon=True) for text in ("one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
    assert len(streams) == len(chat.history) >= 5
    for text, found in streams:
        assert kinds(found).count("TurnStarted") == 1
        assert isinstance(found[-1], events.TurnFinished)
        assert found[-1].text == text


# --- arguments of another type, and other processes ---------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda chat: chat.pin("1"),
        lambda chat: chat.unpin(1.0),
        lambda chat: chat.pin(True),
        lambda chat: chat.open(5),
        lambda chat: chat.open(""),
        lambda chat: chat.recall(None),
        lambda chat: chat.set(temperature=10**400),
        lambda chat: chat.set(top_k=-(10**5000)),
        lambda chat: Chat(session=5),  # type: ignore[arg-type]
    ],
)
def test_an_argument_of_another_type_is_refused_and_the_chat_continues(
    real: Scripts, call: Callable[[Chat], object]
) -> None:
    chat = real()
    chat.ask("hello")
    with pytest.raises(ConfigError):
        call(chat)
    chat.pin(1)
    assert chat.ask("go on").finish_reason


def test_a_forked_process_is_told_to_make_its_own_chat(real: Scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = real()
    with monkeypatch.context() as forked:
        forked.setattr("os.getpid", lambda: -1)
        with pytest.raises(StreamchatError, match="forked"):
            chat.ask("hello")
    assert chat.ask("hello").finish_reason
