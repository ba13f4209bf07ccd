"""Where files of this machine must not be named (in a browser): nothing reads, writes, lists or betrays one."""

from __future__ import annotations

from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamchat.base.errors import ConfigError
from streamchat.base.requests import SwitchModel
from streamchat.cli import main as cli
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.frontend import editor, file_access, mentions
from streamchat.frontend.slash.registry import SlashContext
from streamchat.tui.commands import add_app_commands
from streamchat.tui.state import ChatState
from tests.support.desk import Desk
from tests.support.saved_sessions import stored
from tests.support.scripted_engine import ScriptedEngine

WHY = "in the browser"


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a file in it, which is the current one, after a refusal."""
    (tmp_path / "here.txt").write_text("the word is quetzal")
    (tmp_path / "plain").write_text("the word is quetzal")
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").mkdir()
    monkeypatch.chdir(tmp_path)
    file_access.refuse(WHY)
    yield tmp_path
    file_access.refuse("")


def test_a_message_takes_no_file_and_tells_of_none(refused: Path) -> None:
    for there, missing in (("here.txt", "gone.txt"), (f"{refused}/here.txt", f"{refused}/gone.txt")):
        sentences = []
        for name in (there, missing):
            found = mentions.expand(f"look at @{name}")
            assert found.text == f"look at @{name}"
            sentences.append(found.notice.replace(name, "NAME"))
        assert sentences[0] == sentences[1]
        assert WHY in sentences[0]
        assert sentences[0].endswith("sent as text")
    for name in ("./here.txt", "./gone.txt"):
        with pytest.raises(ConfigError, match=WHY):
            mentions.expand(f"look at @{name}")
    for harmless in ("ask @plain and @nobody", "a@b.c"):
        assert mentions.expand(harmless) == mentions.ExpandedMessage(harmless)
    assert mentions.expand("\\@here.txt") == mentions.ExpandedMessage("@here.txt")
    assert mentions.complete_path("") == mentions.complete_path("he") == mentions.complete_path("/") == []


def test_commands_with_files_are_refused(refused: Path) -> None:
    desk = Desk()
    desk.board.session = stored()
    before = sorted(refused.rglob("*"))
    for text in (
        "/read here.txt",
        "/read here.txt and say",
        "/read",
        "/import here.txt",
        "/import",
        "/export",
        "/export new.md",
        f"/export {refused}/new.jsonl",
        "/model ./owner",
        f"/model {refused}",
        "/model gone.gguf",
        "/model owner",
        "/model owner/name",
        "/model ~",
    ):
        result = desk.say(text)
        assert result.error, text
        assert result.text.endswith(f"is off {WHY}"), text
    assert desk.offered("/read ") == desk.offered("/model /") == desk.offered("/model ./") == []
    assert desk.engine.sent == []
    assert sorted(refused.rglob("*")) == before
    with pytest.raises(ConfigError, match=f"the editor is off {WHY}"):
        editor.edit("text")


def test_models_by_name_are_not(refused: Path) -> None:
    desk = Desk()
    started_with = str(refused / "owner")
    desk.engine = ScriptedEngine(settings=Settings(model=started_with))
    desk.context = SlashContext(desk.engine, desk.board)
    names = ("default", "pythia-410m", "someone/else", started_with)
    for name in names:
        assert not desk.say(f"/model {name}").error
    assert desk.engine.sent == [SwitchModel(name) for name in names]


def test_an_export_is_downloaded(refused: Path) -> None:
    downloads: list[tuple[str, str]] = []

    class App:
        def deliver_text(self, file: StringIO, *, save_filename: str) -> None:
            downloads.append((save_filename, file.read()))

    app: Any = App()
    desk = Desk()
    desk.board.session = session = stored()
    context = SlashContext(desk.engine, desk.board)
    chat: Any = SimpleNamespace(state=ChatState(desk.engine, Configuration()))
    add_app_commands(app, chat)
    registry = chat.state.registry
    before = sorted(refused.rglob("*"))
    for argument, name in (("", f"streamchat-{session}.md"), ("a.json", "a.json"), (f"{refused}/b.md", "b.md")):
        result = registry.run(context, f"/export {argument}")
        assert result is not None
        assert result.text == f"{name} (1 turn) was sent to the browser"
        assert downloads[-1][0] == name
        assert "very green" in downloads[-1][1]
    assert sorted(refused.rglob("*")) == before
    result = registry.run(context, "/export a.exe")
    assert result is not None
    assert result.error
    file_access.refuse("")
    chat.state = ChatState(desk.engine, Configuration())
    add_app_commands(app, chat)
    assert chat.state.registry.run(context, "/export c.md") is not None
    assert (refused / "c.md").is_file()
    assert len(downloads) == 3


@pytest.mark.parametrize(
    ("driver", "arguments", "allowed"),
    [
        ("textual.drivers.web_driver:WebDriver", [], False),
        ("textual.drivers.web_driver:WebDriver", ["--tab-files"], True),
        ("", [], True),
    ],
)
def test_a_tab_is_refused_files_unless_they_were_allowed(
    monkeypatch: pytest.MonkeyPatch, driver: str, arguments: list[str], allowed: bool
) -> None:
    seen: list[bool] = []

    def chat(*_: object) -> int:
        seen.append(file_access.allowed())
        return 0

    monkeypatch.setattr(cli, "chat", chat)
    monkeypatch.setenv("TEXTUAL_DRIVER", driver)
    try:
        assert cli.main(arguments) == 0
    finally:
        file_access.refuse("")
    assert seen == [allowed]
