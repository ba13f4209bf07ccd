"""Reasoning in every front end, in saved sessions, exports and searches, as the setting `thinking` shows it."""

from __future__ import annotations

import io
import sqlite3
from array import array
from pathlib import Path
from typing import Any, Literal

import pytest

from streamchat.base import events as ev
from streamchat.base.errors import TurnError
from streamchat.base.requests import OpenSession, Submit
from streamchat.base.thinking import plain_text, split
from streamchat.commands import sessions as sessions_command
from streamchat.config.settings import Settings
from streamchat.conversation.summarize import summarize
from streamchat.frontend.messages import excerpt, quote_prompt, search_hit_line
from streamchat.frontend.presenter import Line
from streamchat.repl.pipe import Pipe
from streamchat.repl.render import Narrator, resumed_pieces
from streamchat.sessions.transcripts.export import export
from streamchat.store.records import ModelIdentity, StoredTurn
from streamchat.store.store import Store
from streamchat.tui.widgets.thinking import Thinking
from tests.support.app_driver import driving
from tests.support.real_engine import running, tiny_loaded
from tests.support.scripted_engine import Reply, ScriptedEngine
from tests.support.scripted_model import make_chat

THOUGHTS = "I wonder about it"
BOTH = f"<think>\n{THOUGHTS}\n</think>\n\nIt is so."
ONLY = f"<think>\n{THOUGHTS}\n</think>"
OPEN = f"<think>\n{THOUGHTS}"


# --- the prompt and the pipe ------------------------------------------------------------------------------------


def pieces_of(reply: str, thinking: str) -> list[Line]:
    """What a narrator makes of one turn with this reply."""
    engine = ScriptedEngine([reply])
    narrator, pieces = Narrator(lambda: thinking), list[Line]()
    engine.subscribe(lambda event: pieces.extend(narrator.pieces_for(event)))
    engine.start()
    engine.send(Submit("why?"))
    assert engine.wait_idle()
    engine.close()
    return pieces


@pytest.mark.parametrize(
    ("reply", "thinking", "written"),
    [
        (BOTH, "hide", "It is so.\n"),
        (BOTH, "collapse", "(thought for 4 words; /set thinking show prints them)It is so.\n"),
        (BOTH, "show", f"{THOUGHTS}\n\nIt is so.\n"),
        (ONLY, "hide", "\n(only reasoning, and no answer: 4 words; /set thinking show prints them)"),
        (OPEN, "hide", "\n(only reasoning, and no answer: 4 words; /set thinking show prints them)"),
        (OPEN, "collapse", "\n(only reasoning, and no answer: 4 words; /set thinking show prints them)"),
        (OPEN, "show", f"{THOUGHTS}\n"),
        ("It is so.", "hide", "It is so.\n"),
        ("It is so.", "collapse", "It is so.\n"),
    ],
)
def test_the_prompt_shows_reasoning_as_the_setting_says(reply: str, thinking: str, written: str) -> None:
    pieces = pieces_of(reply, thinking)
    assert "".join(piece.text for piece in pieces if piece.kind not in ("ready", "figures")) == written


@pytest.mark.parametrize("thinking", ["hide", "collapse"])
def test_a_pipe_writes_answers_only(thinking: Literal["hide", "collapse"]) -> None:
    engine = ScriptedEngine([BOTH, ONLY, OPEN, "Yes."], settings=Settings(thinking=thinking))
    out, err = io.StringIO(), io.StringIO()
    assert Pipe(engine, out, err).run(io.BytesIO(b"one\ntwo\nthree\nfour\n")) == 0
    engine.close()
    assert out.getvalue() == "It is so.\n\n\nYes.\n"
    assert "wonder" not in err.getvalue()


@pytest.mark.parametrize(
    ("thinking", "texts"),
    [
        ("hide", ["It is so.", "(only reasoning, and no answer: 4 words; /set thinking show prints them)"]),
        ("collapse", ["(thought for 4 words; /set thinking show prints them)", "It is so.",
                      "(only reasoning, and no answer: 4 words; /set thinking show prints them)"]),
        ("show", [f"{THOUGHTS}\n\n", "It is so.", f"{THOUGHTS}\n\n"]),
    ],
)  # fmt: skip
def test_turns_of_a_resumed_conversation_are_split(thinking: str, texts: list[str]) -> None:
    engine = ScriptedEngine()
    engine.sessions["abc"] = [("why?", BOTH), ("and?", OPEN)]
    engine.start()
    engine.send(OpenSession("abc"))
    assert engine.wait_event(ev.ConversationResumed)
    resumed = next(event for event in engine.events if isinstance(event, ev.ConversationResumed))
    engine.close()
    pieces = resumed_pieces(resumed, thinking)
    assert [piece.text for piece in pieces if piece.kind not in ("past_message", "info")] == texts


# --- the app ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("reply", [ONLY, OPEN])
async def test_the_app_says_that_a_reply_is_reasoning_only(reply: str) -> None:
    async with driving(ScriptedEngine([reply], settings=Settings(thinking="hide"))) as driver:
        turn = await driver.ask("why?")
        assert "only reasoning, and no answer" in driver.screen_text
        assert "wonder" not in driver.screen_text
        assert turn.reply_text == ""


@pytest.mark.slow
async def test_the_app_shows_resumed_turns_as_the_setting_says() -> None:
    engine = ScriptedEngine(settings=Settings(thinking="hide"))
    engine.sessions["abc"] = [("why?", BOTH), ("and?", OPEN), ("so?", "Yes.")]
    async with driving(engine) as driver:
        engine.send(OpenSession("abc"))
        await driver.until(lambda: len(driver.turns) == 3 and "Yes." in driver.screen_text)
        assert "It is so." in driver.screen_text
        assert "wonder" not in driver.screen_text
        assert driver.screen_text.count("only reasoning, and no answer") == 1
        assert not driver.chat.query(Thinking)


@pytest.mark.slow
async def test_the_app_folds_reasoning_that_has_no_answer() -> None:
    async with driving(ScriptedEngine([OPEN])) as driver:
        await driver.ask("why?")
        assert "▸ thought for 4 words" in driver.screen_text
        assert "only reasoning" not in driver.screen_text


@pytest.mark.slow
async def test_a_stopped_reply_keeps_its_reasoning() -> None:
    async with driving(ScriptedEngine([Reply(f"{OPEN} so it is", hold_after=4)])) as driver:
        await driver.enter("why?")
        await driver.until(lambda: driver.chat.query(Thinking))
        await driver.pilot.press("escape")
        await driver.until(lambda: driver.finished == 1)
        assert driver.turns[-1].reply_text == ""
        assert "▸ thought for" in driver.screen_text


# --- saved ------------------------------------------------------------------------------------------------------


def saved(*replies: str, **settings: Any) -> str:
    """A session with these replies; returns its id."""
    turns = [
        StoredTurn(
            number, f"question {number}", reply, number * 4, number * 4, number * 4 + 2, array("i", [1, 2, 3, 4])
        )
        for number, reply in enumerate(replies, 1)
    ]
    with Store() as store:
        identity = ModelIdentity("tiny", "tiny", "float32", "f", "t")
        session = store.create("Why", identity, {"num_sink_tokens": 4, **settings}, [1, 2])
        store.write(session, turns=turns)
    return session


@pytest.mark.parametrize(
    ("thinking", "shown"),
    [
        ("hide", ["It is so.", "(only reasoning, and no answer)"]),
        ("collapse", ["(thought for 4 words)\n\nIt is so.", "(only reasoning, and no answer)"]),
        ("show", [f"{THOUGHTS}\n\nIt is so.", THOUGHTS]),
    ],
)
def test_reasoning_in_what_sessions_show_prints(
    thinking: str, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert [plain_text(reply, thinking) for reply in (BOTH, OPEN)] == shown
    session = saved(BOTH, OPEN, thinking=thinking)
    with Store() as store:
        sessions_command._show(store, store.find(session))
    out = capsys.readouterr().out
    assert f"1. model\n{shown[0]}\n" in out
    assert f"2. model\n{shown[1]}\n" in out
    assert "<think>" not in out


@pytest.mark.parametrize("thinking", ["hide", "collapse", "show"])
def test_reasoning_in_exports(thinking: str) -> None:
    session = saved(BOTH, ONLY, "<think>\na\n\nb\n</think>\n\nYes.", thinking=thinking)
    with Store() as store:
        stored = store.load(session)
    text = export(stored, "markdown")
    assert "<think>" not in text
    assert ("> *Reasoning*\n>\n> I wonder about it\n\nIt is so.\n" in text) == (thinking != "hide")
    assert ("> a\n>\n> b\n\nYes.\n" in text) == (thinking != "hide")
    assert ("wonder" in text) == (thinking != "hide")
    assert "*(only reasoning, and no answer)*" in text
    for kind in ("jsonl", "replay"):  # for programs: all of it
        assert r"<think>\nI wonder about it\n</think>\n\nIt is so." in export(stored, kind)


def test_reasoning_in_what_is_found() -> None:
    saved("<think>\nThe sea is a riddle.\n</think>\n\nThe sea is green.", "<think>\nA second riddle.")
    with Store() as store:
        both = store.search("riddle sea")
        green, second = store.search("green"), store.search("second")
    for thinking in ("collapse", "show"):
        assert excerpt(both[0], thinking) == "The sea is a riddle. The sea is green."
    assert excerpt(both[0], "hide") == "The sea is green. …"
    assert excerpt(second[0], "hide") == "(only reasoning)"
    assert excerpt(second[0], "show") == "A second riddle."
    assert "think>" not in excerpt(green[0], "show")
    assert search_hit_line(1, both[0], 0.0, None, "hide").endswith(": The sea is green. …")
    assert quote_prompt(both[0], 0.0).endswith(":\n\n> The sea is green.")


def test_a_summary_is_without_its_reasoning(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = make_chat(cache_size=64)
    chat.say("What is the sea?", "Green.")
    script = [*chat.tokenizer("<think>\nWell.\n</think>\n\nSea: green.", add_special_tokens=False)["input_ids"]]
    chat.script[:] = [*script, chat.tokenizer.eos_token_id]
    monkeypatch.setattr("streamchat.conversation.summarize.LENGTH_SHARE", 1)
    assert summarize(chat.conversation, lambda: False, chat.events.append).text == "Sea: green."
    chat.script[:] = [*script[:12], chat.tokenizer.eos_token_id]
    with pytest.raises(TurnError, match="reasoned for 12 tokens and returned no summary"):
        summarize(chat.conversation, lambda: False, chat.events.append)


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_a_saved_reply_that_the_prompt_opened_is_split_again(tmp_path: Path) -> None:
    """On a real engine: streamed, saved, resumed, and closed after a crash inside the reasoning."""
    loaded = tiny_loaded(THINKS)
    script: list[int] = []

    class Scripted:
        def __init__(self, *_: Any) -> None:
            pass

        def __call__(self, logits: Any, recent: Any) -> int:
            return script.pop(0)

    ids = loaded.tokenizer(f"{THOUGHTS}\n</think>\n\nIt is so.<|im_end|>", add_special_tokens=False)["input_ids"]
    database = tmp_path / "streamchat.db"
    with running(lambda *_: loaded, store=database, max_new_tokens=100) as chat:
        chat.wait(ev.ModelReady)
        chat.conversation.sampler = Scripted
        script[:] = ids * 2
        finished = [chat.turn("why?"), chat.turn("and?")]
        assert [turn.reply for turn in finished] == [BOTH, BOTH]
        session = chat.wait(ev.SessionOpened).session
    with running(lambda *_: tiny_loaded(THINKS), store=database, session=session) as chat:
        assert [turn.reply for turn in chat.wait(ev.ConversationResumed).turns] == [BOTH, BOTH]
    opening = loaded.tokenizer("<|im_start|>assistant\n<think>\n", add_special_tokens=False)["input_ids"]
    with sqlite3.connect(database) as connection:  # as a crash leaves it, in the second turn's reasoning
        rows = connection.execute("SELECT id, ids, reply_first, first FROM turns WHERE number = 2").fetchall()
        turn, blob, reply_first, first = rows[0]
        cut = blob[: 4 * (reply_first - first + len(opening) + 6)]
        connection.execute("UPDATE turns SET ids = ?, state = 'running', stats = NULL WHERE id = ?", (cut, turn))
        connection.execute("UPDATE sessions SET held = ?", (f"[[0, {first + len(cut) // 4}]]",))
    connection.close()
    with running(lambda *_: tiny_loaded(THINKS), store=database, session=session) as chat:
        last = chat.wait(ev.ConversationResumed).turns[-1].reply
    thoughts, answer = split(last)
    assert thoughts
    assert THOUGHTS.startswith(thoughts)
    assert answer == ""
