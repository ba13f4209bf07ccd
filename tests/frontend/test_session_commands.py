"""The commands about what was said, in the prompt and in a pipe, and each command by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pexpect
import pytest

from streamchat.base import events as ev
from streamchat.base.requests import Compact, Edit, OpenSession, Quote, Request, Retry, SetTitle, Undo
from streamchat.store.store import Store
from tests.support.desk import Desk
from tests.support.program import FACE
from tests.support.saved_sessions import stored


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("/undo", Undo(False)),
        ("/retry", Retry()),
        ("/again", Retry()),
        ("/retry 12, 40 12", Retry((12, 40))),
        ("/edit a new text", Edit("a new text")),
        ("/edit", Undo(True)),
        ("/compact", Compact()),
        ("/keep the sea is green", Quote("Remember this about our conversation so far:\n\nthe sea is green",
                                          "Noted.", True)),
    ],
)  # fmt: skip
def test_what_each_asks_of_the_engine(line: str, call: Request) -> None:
    desk = Desk()
    result = desk.say(line)
    assert not result.error
    assert result.done_when is not None
    assert desk.engine.sent == [call]


def test_without_a_turn_there_is_nothing_to_change() -> None:
    desk = Desk(turns=0)
    for line in ("/retry", "/edit", "/edit x"):
        assert desk.say(line).error
    assert desk.engine.sent == []


def test_retry_names_turns_by_number() -> None:
    desk = Desk()
    assert desk.say("/retry 3 x").text == "x is not a turn number"
    assert desk.engine.sent == []


def test_recall_quote_and_keep() -> None:
    session = stored()
    desk = Desk()
    assert desk.say("/quote 1").error
    assert desk.say("/recall").error
    assert desk.say("/recall unicorn").text == "no messages match 'unicorn'"
    text = desk.say("/recall green").text
    assert f"{session}, turn 1, model: It is very green" in text
    assert desk.say("/quote 2").text == "'2' is not the number of a search result; /recall found 1 message"
    assert desk.say("/quote").text == "/quote needs the number of a search result; /recall found 1 message"
    assert desk.say("/keep").text == "/keep needs the number of a search result; /recall found 1 message"
    assert desk.say("/keep 7").error
    desk.say("/quote 1")
    desk.say("/keep 1")
    first, second = desk.engine.sent
    assert isinstance(first, Quote)
    assert first.text.startswith("Remember what you said ")
    assert first.text.endswith("\n\n> It is\n> very green")
    assert (first.reply, first.pin) == ("Noted.", False)
    assert second == replace(first, pin=True)


def test_sessions_resume_and_title() -> None:
    desk = Desk()
    assert desk.say("/sessions").text == "no saved sessions yet"
    sea, dragon = stored("The sea"), stored("A dragon")
    rows = desk.say("/sessions").text.splitlines()
    assert [row.split()[0] for row in rows] == [dragon, sea, "/resume"]
    assert desk.offered("/resume ") == [f"/resume {dragon}", f"/resume {sea}"]
    assert desk.say("/sessions unicorn").text == "no sessions match 'unicorn'"
    assert desk.say("/resume").error
    assert desk.say("/resume zzz").error
    assert desk.say(f"/resume {sea[:5]}").done_when is not None
    assert desk.engine.sent == [OpenSession(sea)]
    assert "is saved after its first turn" in desk.say("/title x").text
    desk.board.apply(ev.SessionOpened(sea))
    assert desk.say("/title").text == f"The sea ({sea})"
    assert not desk.say("/rename Of the  sea").error
    assert desk.engine.sent[-1] == SetTitle("Of the  sea")
    assert desk.say(f"/resume {sea}").text == f"{sea} is already open"
    assert "(this one)" in desk.say("/sessions sea").text


def test_export_takes_its_format_from_the_name(tmp_path: Path) -> None:
    desk = Desk()
    desk.board.apply(ev.SessionOpened(stored()))
    for name, start in (("a.md", "# The sea"), ("a.jsonl", '{"streamchat": 1'), ("a.json", '{"id": ')):
        assert not desk.say(f"/export {tmp_path / name}").error
        assert (tmp_path / name).read_text(encoding="utf-8").startswith(start)
    assert desk.say("/export").text.endswith(".md")


def test_a_store_that_cannot_be_used_is_one_sentence() -> None:
    with Store() as store:
        path = store.path
    for file in path.parent.glob("streamchat.db*"):
        file.unlink()
    path.write_bytes(b"no database at all " * 100)
    desk = Desk()
    for line in ("/sessions", "/recall x", "/resume x"):
        result = desk.say(line)
        assert result.error
        assert "the file is damaged; move it aside" in result.text


def test_the_prompt_takes_back_tries_again_and_offers_texts() -> None:
    scenario = json.dumps({"replies": ["first", "second", "third"]})
    env = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    child = pexpect.spawn(sys.executable, [str(FACE), scenario, "--plain"], timeout=20, dimensions=(24, 80), env=env)
    child.expect("you> ")
    child.send("one\r")
    child.expect("first")
    child.expect("you> ")
    child.send("/retry\r")
    child.expect("second")
    child.expect("you> ")
    child.send("/edit\r")
    child.expect("Turn 1 was undone")
    child.expect(r"you> [^\n]*one")
    child.send(" more\r")
    child.expect("third")
    child.expect("you> ")
    child.send("/compact\r")
    child.expect("They spoke of the sea")
    child.expect(r"you> [^\n]*/keep They spoke of the sea")
    child.send("\r")
    child.expect("Noted")
    child.expect(r"Turn 2 \(.* is pinned")
    child.expect("you> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_pipe_takes_back_and_goes_on() -> None:
    scenario = json.dumps({"replies": ["first", "second", "third"]})
    result = subprocess.run(
        [sys.executable, str(FACE), scenario],
        input=b"one\n/undo\n/undo\ntwo\n/retry\n/compact\n",
        capture_output=True,
        timeout=60,
    )
    assert result.stdout == b"first\nsecond\nthird\nThey spoke of the sea.\n", result.stderr
    err = result.stderr.decode()
    assert "Turn 1 was undone." in err
    assert "nothing to undo yet" in err
