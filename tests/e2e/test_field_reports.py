"""Faults that people met in tools of this kind, tried as docs/robustness.md says, where no other test does it."""

from __future__ import annotations

import json
import os
import signal
import sys
import termios
from dataclasses import replace
from pathlib import Path
from typing import Any

import pexpect
import pytest

from streamchat.base import events as ev
from tests.support.program import output_of
from tests.support.scripted_model import make_chat
from tests.support.toy_tokenizer import toy_tokenizer

FACE = Path(__file__).parents[1] / "support" / "scripted_face.py"
RULE = "You are the keeper of a lighthouse by the sea and speak of the sea only. Finish every answer with PLUM"


def test_a_whole_system_prompt_outlives_fifteen_turns() -> None:
    """FR-01"""
    chat = make_chat(cache_size=256, system_prompt=RULE)
    block = chat.conversation.encoder.system_block()
    assert len(block) > 4 * chat.conversation.cache.num_sink_tokens
    for number in range(15):
        chat.say(
            f"Tell me story number {number} about the sea and the dragon", "once upon a time there was a girl PLUM"
        )
        assert chat.cached[: len(block)] == block
    assert chat.conversation.cache.compression_count > 5
    assert "Finish every answer with PLUM" in chat.cached_text


def test_a_base_model_that_goes_on_as_the_user_is_stopped() -> None:
    """FR-12"""
    chat = make_chat(template=None)
    ids = chat.tokenizer(" I am a model.\nUser: And I?\nAssistant: a user", add_special_tokens=False)["input_ids"]
    outcome = chat.say("Hi, who are you?", ids)
    assert (outcome.reply, outcome.finish_reason) == ("I am a model.", "stop")
    assert "".join(event.text for event in chat.of(ev.TextDelta)) == "I am a model."
    assert chat.cached_text == "User: Hi, who are you?\nAssistant: I am a model.\n"


@pytest.mark.parametrize("stop", ["\nUser:", "Pari", "#"])
def test_a_stop_string_leaves_screen_transcript_and_cache_alike(stop: str) -> None:
    """FR-13"""
    chat = make_chat(template=None)
    encoder = chat.conversation.encoder
    encoder.format = replace(encoder.format, stop_strings=(stop,))
    ids = chat.tokenizer(f" The city of {stop}s is", add_special_tokens=False)["input_ids"]
    outcome = chat.say("The capital city of France is", ids)
    shown = "".join(event.text for event in chat.of(ev.TextDelta))
    assert shown == outcome.reply == "The city of "
    assert chat.cached_text.endswith("Assistant: The city of \n")


def test_ids_are_the_record_and_not_their_text() -> None:
    """FR-30: a reply of ids that its text would not be encoded to."""
    chat = make_chat()
    odd = [token for letter in "capital\n\n" for token in chat.tokenizer(letter, add_special_tokens=False)["input_ids"]]
    assert odd != chat.tokenizer("capital\n\n", add_special_tokens=False)["input_ids"]
    outcome = chat.say("hi", [*odd, chat.tokenizer.eos_token_id])
    assert outcome.reply == "capital\n\n"
    chat.say("and", "more")
    at = chat.cached.index(odd[0], len(chat.conversation.encoder.system_block()))
    assert any(chat.cached[i : i + len(odd)] == odd for i in range(at, len(chat.cached)))
    chat.check()


def test_a_turn_feeds_its_own_tokens_only_however_many_came_before() -> None:
    """FR-41"""
    chat = make_chat(cache_size=256)
    fed = []
    for _ in range(40):
        chat.fed.clear()
        chat.say("What is the capital of France? Tell me of the sea", "The capital of France is Paris.")
        fed.append(sum(len(ids) for ids in chat.fed))
    assert len(set(fed)) == 1
    assert fed[0] < 80


def test_a_reply_that_never_ends_is_ended_and_the_chat_goes_on() -> None:
    """FR-39"""
    chat = make_chat(cache_size=128, max_new_tokens=300)
    phrase = toy_tokenizer()("the sea and the dragon ", add_special_tokens=False)["input_ids"]
    outcome = chat.say("go", (phrase * 300)[:2000])
    assert (outcome.finish_reason, outcome.new_tokens) == ("length", 300)
    assert chat.say("and now?", "Done.").reply == "Done."
    chat.check()


# --- the terminal -----------------------------------------------------------------------------------------------

ALL_ENDS: dict[str, dict[str, Any]] = {
    "quit": {},
    "signal": {},
    "load failure": {"load_failure": {"title": "No model", "message": "no such model", "exit_code": 3}},
    "engine crash": {"crash": "it broke"},
    "bug": {"raise": True},
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("end", ALL_ENDS)
@pytest.mark.parametrize("face", ["app", "prompt"])
def test_the_terminal_is_as_it_was_after_every_end(face: str, end: str) -> None:
    """FR-28: modes of the line, alternate screen, mouse, paste marks, cursor."""
    env = {**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
    command = [str(FACE), json.dumps(ALL_ENDS[end]), *(["--plain"] if face == "prompt" else [])]
    child = pexpect.spawn(sys.executable, command, timeout=30, dimensions=(24, 80), env=env, encoding="utf-8")
    before = termios.tcgetattr(child.child_fd)
    said = ""
    if end in ("quit", "signal") or (face == "app" and end != "bug"):
        child.expect("you> " if face == "prompt" else "Write a message")
        said = output_of(child)
        if end == "signal":
            child.kill(signal.SIGTERM)
        elif face == "app":
            child.send("\x11")  # Ctrl+Q
        else:
            child.send("\x04")  # Ctrl+D
    child.expect(pexpect.EOF)
    said += output_of(child)
    assert termios.tcgetattr(child.child_fd) == before
    child.close()
    for mode in ("1049", "1000", "1002", "1003", "1006", "2004", "1004"):
        on, off = said.rfind(f"\x1b[?{mode}h"), said.rfind(f"\x1b[?{mode}l")
        assert off >= on, mode
    assert said.rfind("\x1b[?25h") >= said.rfind("\x1b[?25l")
    assert "Traceback" not in said


def test_what_others_print_stays_off_the_screen(tmp_path: Path) -> None:
    """FR-23: print, warnings, logging and native code, while the app is on."""
    noisy = tmp_path / "noisy.py"
    noisy.write_text(
        "import logging, os, sys, warnings\n"
        f"sys.path.insert(0, {str(FACE.parents[2])!r})\n"
        "kept = sys.stderr\n"
        "logging.basicConfig()\n"
        "from streamchat.cli import main as cli\n"
        "from tests.support.scripted_engine import ScriptedEngine\n"
        "def reply(text):\n"
        "    print('NOISE print'); print('NOISE error', file=sys.stderr); print('NOISE kept', file=kept)\n"
        "    warnings.warn('NOISE warning'); logging.warning('NOISE log')\n"
        "    os.write(1, b'NOISE native'); os.write(2, b'NOISE native')\n"
        "    return 'a quiet reply'\n"
        "cli.make_engine = lambda configuration, *_: ScriptedEngine(reply, settings=configuration.settings)\n"
        "sys.exit(cli.main([]))\n"
    )
    env = {**os.environ, "TERM": "xterm-256color"}
    child = pexpect.spawn(sys.executable, [str(noisy)], timeout=30, dimensions=(24, 80), env=env, encoding="utf-8")
    child.expect("Write a message")
    child.send("hi\r")
    child.expect("quiet")
    child.send("\x11")
    said = output_of(child)
    child.expect(pexpect.EOF)
    said += output_of(child)
    child.close()
    assert child.exitstatus == 0
    assert "NOISE" not in said
