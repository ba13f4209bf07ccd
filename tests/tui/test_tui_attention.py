"""The app calls the user who looks elsewhere, titles its window, and hides no link."""

from __future__ import annotations

import pytest
from textual import events as tui_events

from streamchat.base import events as ev
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.tui.app import StreamchatApp
from streamchat.tui.attention import AttentionCall
from streamchat.tui.widgets.reply import make_parser
from tests.support.app_driver import driving
from tests.support.scripted_engine import Reply, ScriptedEngine

STATS = ev.TurnStats(1, 1, 1, 1, 1, 0, 0, None, None, 0, 0, None, "stop")


class AwayUser:
    """A user who is away, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
        monkeypatch.delenv("TMUX", raising=False)
        monkeypatch.setenv("TERM", "xterm-kitty")
        monkeypatch.delenv("TERM_PROGRAM", raising=False)
        self.is_away, self.now = True, 0.0
        self.call = AttentionCall(lambda: settings, lambda: self.is_away, lambda: self.now)

    def turn(self, seconds: float, reason: ev.FinishReason = "stop") -> str:
        """What a turn of that length writes."""
        assert self.call.after(ev.TurnStarted(1, "hi", 1)) == ""
        self.now += seconds
        assert self.call.after(ev.TextDelta(1, "x")) == ""
        return self.call.after(ev.TurnFinished(STATS, reason, "x"))


def test_a_long_reply_calls_a_user_who_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    user = AwayUser(monkeypatch, Settings())
    assert user.turn(9.9) == ""
    assert user.turn(12) == "\x1b]9;streamchat: The reply is complete (12.0 s).\x1b\\"
    assert user.turn(90, "error") == "\x1b]9;streamchat: The turn failed (1 min 30 s).\x1b\\"
    assert user.turn(90, "cancelled") == ""  # by the user
    user.is_away = False
    assert user.turn(90) == ""


def test_the_settings_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    assert AwayUser(monkeypatch, Settings(notify="off")).turn(60) == ""
    assert AwayUser(monkeypatch, Settings(notify="bell")).turn(60) == "\a"
    assert AwayUser(monkeypatch, Settings(notify="bell", notify_after_s=100.0)).turn(60) == ""


async def test_the_app_writes_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(StreamchatApp, "write_code", lambda app, code: written.append(code))
    monkeypatch.setenv("TERM", "xterm-256color")
    replies: list[Reply | str] = ["one", Reply("two words", hold_after=1), "three", "four"]
    engine = ScriptedEngine(replies, settings=Settings(notify="bell", notify_after_s=0.0))
    async with driving(engine) as driver:
        await driver.ask("here")
        assert "\a" not in "".join(written)
        await driver.enter("away")
        await driver.until(lambda: len(driver.turns) == 2 and driver.turns[1].reply_text)
        await driver.enter("queued")
        driver.app.post_message(tui_events.AppBlur())
        await driver.until(lambda: not driver.app.app_focus)
        engine.release()
        await driver.answered(3)
        await driver.until(lambda: "\a" in "".join(written))
        assert "".join(written).count("\a") == 1  # at the end of the queue
        names = [code.partition("Instruct ")[2].partition("\x1b")[0] for code in written if "]2;" in code]
        assert names[:3] == ["(ready)", "(replying)", "(ready)"]
        driver.app.post_message(tui_events.AppFocus())
        await driver.until(lambda: driver.app.app_focus)
        await driver.ask("back")
        assert "".join(written).count("\a") == 1


@pytest.mark.parametrize(
    ("markdown", "shown"),
    [
        ("[the bank](https://evil.example)", "the bank (https://evil.example)"),
        ("[https://good.example](https://evil.example)", "https://good.example (https://evil.example)"),
        ("**[a `b`](mailto:x@y.z)**", "a b (mailto:x@y.z)"),
        ("[https://a.example](https://a.example)", "https://a.example"),
        ("https://a.example/x and b.com", "https://a.example/x and b.com"),
        ("x@y.com <https://c.example>", "x@y.com https://c.example"),
    ],
)
def test_a_link_shows_its_address(markdown: str, shown: str) -> None:
    tokens = make_parser().parse(markdown)
    assert "".join(child.content for token in tokens for child in token.children or ()) == shown


@pytest.mark.parametrize(("term", "found"), [("xterm-256color", True), ("linux", False)])
async def test_addresses_in_replies_are_links_of_the_terminal(
    monkeypatch: pytest.MonkeyPatch, term: str, found: bool
) -> None:
    monkeypatch.setenv("TERM", term)
    async with driving(ScriptedEngine(["See https://a.example/x and [b](https://b.example) or `c`"])) as driver:
        await driver.ask("hi")
        await driver.pilot.pause()
        strips = driver.app.screen._compositor.render_strips()
        links = {segment.style.link for strip in strips for segment in strip if segment.style and segment.style.link}
        assert links == ({"https://a.example/x", "https://b.example"} if found else set())


@pytest.mark.parametrize(("value", "is_gray"), [("", False), ("1", True), (None, False)])
def test_an_empty_no_color_means_nothing(monkeypatch: pytest.MonkeyPatch, value: str | None, is_gray: bool) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if value is not None:
        monkeypatch.setenv("NO_COLOR", value)
    assert StreamchatApp(ScriptedEngine(), Configuration()).no_color is is_gray
