"""Each face on the terminals that people have: 80 x 24, without colours, dumb, with an old locale."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from tests.support.program import output_of

FACE = str(Path(__file__).parents[1] / "support" / "scripted_face.py")
SCENARIO = json.dumps({"replies": ["Grüße, 日本 😀 “quoted” — done"]})
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;\d+)*m")
RGB = re.compile(r"[34]8;2;(\d+);(\d+);(\d+)")


def conversation(*arguments: str, typed: str = "hi", **environ: str) -> str:
    """A turn on a pseudo-terminal; returns all that was written."""
    env = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "PROMPT_TOOLKIT_NO_CPR": "1", **environ}
    child: pexpect.spawn[bytes]
    child = pexpect.spawn(sys.executable, [FACE, SCENARIO, *arguments], timeout=30, dimensions=(24, 80), env=env)
    prompt = child.expect([b"Write a message", b"you> "])
    said = output_of(child)
    child.send(f"{typed}\r")
    child.expect(b"quoted.*done")
    said += output_of(child)
    child.send("\x04" if prompt else "\x11")
    child.expect(pexpect.EOF)
    said += output_of(child)
    child.close()
    assert child.exitstatus == 0
    return said.decode("utf-8", "replace")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--plain",)], ids=["app", "prompt"])
@pytest.mark.parametrize("environ", [{}, {"LC_ALL": "C"}, {"TERM": "vt100"}, {"TERM": "no-such-terminal"}], ids=str)
def test_text_of_all_scripts(arguments: tuple[str, ...], environ: dict[str, str]) -> None:
    assert "“quoted”" in conversation(*arguments, **environ)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--plain",)], ids=["app", "prompt"])
def test_a_locale_that_cannot_show_it_ends_nothing(arguments: tuple[str, ...]) -> None:
    assert "quoted" in conversation(*arguments, **ASCII)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--plain",)], ids=["app", "prompt"])
@pytest.mark.parametrize("environ", [{}, ASCII], ids=["utf-8", "ascii"])
def test_what_is_typed_is_what_is_sent(
    arguments: tuple[str, ...], environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    typed = "Grüße, 日本 😀 — done?"
    monkeypatch.setenv("SUBMITTED", str(tmp_path / "submitted.jsonl"))
    conversation(*arguments, typed=typed, **environ)
    assert json.loads((tmp_path / "submitted.jsonl").read_text()) == typed


def test_a_pipe_with_such_a_locale() -> None:
    env = {**os.environ, **ASCII}
    done = subprocess.run([sys.executable, FACE, SCENARIO], input=b"hi\n", capture_output=True, env=env, timeout=60)
    assert (done.returncode, done.stdout) == (0, b'Gr??e, ?? ? "quoted" -- done\n')


@pytest.mark.slow
def test_no_colour_where_none_is_wanted() -> None:
    assert COLOUR.search(conversation("--plain"))
    assert not COLOUR.search(conversation("--plain", NO_COLOR="1"))
    assert not any(len(set(mixed)) > 1 for mixed in RGB.findall(conversation(NO_COLOR="1")))  # greys
    assert any(len(set(mixed)) > 1 for mixed in RGB.findall(conversation()))


@pytest.mark.parametrize("arguments", [(), ("--plain",)], ids=["by itself", "asked for"])
def test_a_dumb_terminal_gets_plain_lines(arguments: tuple[str, ...]) -> None:
    said = conversation(*arguments, TERM="dumb")
    assert "bot> Grüße" in said
    assert "\x1b" not in said
    assert not re.search(r"\r(?![\r\n])", said)  # no line is written over


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--plain",)], ids=["app", "prompt"])
def test_the_window_has_a_title_which_is_restored(arguments: tuple[str, ...]) -> None:
    said = conversation(*arguments)
    titles = ["loading", "ready", "replying", "ready"]
    assert re.findall(r"\x1b\]2;streamchat\S* (?:\S+ )?\((\w+)\)\x1b\\", said) == titles
    assert said.count("\x1b[22;2t") == said.count("\x1b]2;\x1b\\\x1b[23;2t") == 1
    assert said.index("\x1b[22;2t") < said.index("\x1b]2;streamchat")
    assert said.rindex("\x1b[23;2t") > said.rindex("\x1b]2;streamchat")
    for off in (conversation(*arguments, "--no-window-title"), conversation(*arguments, TERM="vt100")):
        assert "\x1b]2;" not in off
        assert ";2t" not in off


@pytest.mark.slow
def test_addresses_at_the_prompt_are_links(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = {"replies": ["See https://a.example. “quoted” done"]}
    monkeypatch.setattr(sys.modules[__name__], "SCENARIO", json.dumps(replies))
    link = "\x1b]8;;https://a.example\x1b\\https://a.example\x1b]8;;\x1b\\"
    assert f"See {link}. “quoted” done" in conversation("--plain")
    assert "\x1b]8;" not in conversation("--plain", TERM="vt100")


@pytest.mark.slow
def test_the_end_of_a_reply_is_reported_without_focus() -> None:
    env = {**os.environ, "TERM": "xterm-kitty", "STREAMCHAT_NOTIFY_AFTER_S": "0"}
    env = {name: value for name, value in env.items() if name not in ("TMUX", "TERM_PROGRAM")}
    child: pexpect.spawn[bytes]
    slow = json.dumps({"replies": [{"text": "word " * 40, "tokens_per_s": 20}]})
    child = pexpect.spawn(sys.executable, [FACE, slow], timeout=30, dimensions=(24, 80), env=env)
    child.expect(b"Write a message")
    child.send("hi\r")
    child.expect(b"word")
    child.send("\x1b[O")  # the terminal lost the focus
    child.expect_exact(b"\x1b]9;streamchat: The reply is complete (")
    child.send("\x11")
    child.expect(pexpect.EOF)
    child.close()
