"""An imported conversation names a model: it is loaded only after the user saw its source and agreed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from streamchat.base import events as ev
from streamchat.base.errors import ExitCode
from streamchat.base.requests import OpenSession
from streamchat.cli import main as cli
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.models.load import LoadedModel
from streamchat.sessions.settings import foreign_model, portable_model_name
from streamchat.store.database import database_path
from streamchat.store.store import Store
from tests.support.desk import Desk
from tests.support.real_engine import running, tiny_loaded


def imported(tmp_path: Path, model: str, name: str = "SmolLM2-135M-Instruct") -> str:
    """Import a conversation whose file names `model` under the display name `name`; returns its id."""
    head = {"streamchat": 1, "title": "A gift", "model": model, "model_name": name, "settings": {"model": model}}
    rows = [head, {"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hi."}]
    file = tmp_path / "gift.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert cli.main(["sessions", "import", str(file)]) == ExitCode.OK
    with Store() as store:
        return store.find("last").id


@pytest.fixture
def evil(tmp_path: Path) -> str:
    """The folder of a stranger's model."""
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return str(folder.resolve())


class Terminal(io.StringIO):
    """Standard input of a user who answers."""

    def isatty(self) -> bool:
        return True


def engines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str | None, str]]:
    """(model of the settings, model agreed to, session, ...) of every engine that would be made."""
    made: list[tuple[str, str, str | None, str]] = []

    def make(configuration: Configuration, save: bool, session: str | None, agreed_model: str = "") -> object:
        made.append((configuration.settings.model, agreed_model, session, ""))
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "make_engine", make)
    return made


def test_a_pipe_refuses_and_names_the_source(
    tmp_path: Path, evil: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = imported(tmp_path, evil)
    made = engines(monkeypatch)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    capsys.readouterr()
    assert cli.main(["--resume", session]) == ExitCode.STORE
    assert capsys.readouterr().err == (
        f"streamchat: the imported session {session} names the model {evil} (displayed as “SmolLM2-135M-Instruct”), "
        f"which was never used for it here; give --model {evil} to load it, or --model NAME to resume with "
        "another one\n"
    )
    assert made == []
    for model in (evil, "default"):
        assert cli.main(["--resume", session, "--model", model]) == ExitCode.INTERRUPTED
    assert [(model, agreed) for model, agreed, *_ in made] == [(evil, ""), ("default", "")]


@pytest.mark.parametrize(("answer", "agreed"), [("y", True), ("YES", True), ("n", False), ("", False), (None, False)])
def test_at_a_terminal_the_user_is_asked(
    tmp_path: Path,
    evil: str,
    answer: str | None,
    agreed: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = imported(tmp_path, evil)
    made = engines(monkeypatch)
    monkeypatch.setattr("sys.stdin", Terminal("" if answer is None else f"{answer}\n"))
    monkeypatch.setattr(cli, "choose_front_end", lambda *_: "app")
    capsys.readouterr()
    code = cli.main(["--resume", session])
    assert f"names the model {evil} (displayed as" in capsys.readouterr().err
    if agreed:
        assert code == ExitCode.INTERRUPTED
        assert made == [("default", evil, session, "")]
    else:
        assert code == ExitCode.STORE
        assert made == []


def test_the_bundled_model_and_the_users_own_need_no_question(tmp_path: Path, evil: str) -> None:
    with Store() as store:
        for model, configured, question in (
            ("default", "pythia-410m", ""),
            ("pythia-410m", "pythia-410m", ""),
            (evil, evil, ""),
            (evil, "default", evil),
            ("someone/else", "default", "someone/else"),
        ):
            info = store.find(imported(tmp_path, model))
            configuration = Configuration(Settings(model=configured), {"model": "the file"})
            assert foreign_model(configuration, info) == question


def test_a_relative_name_is_shown_as_what_it_would_read(
    tmp_path: Path, evil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = imported(tmp_path, "evil")
    monkeypatch.chdir(tmp_path)
    with Store() as store:
        assert foreign_model(Configuration(), store.find(session)) == evil


def test_default_is_the_bundled_model_whatever_the_folder_holds(
    tmp_path: Path, evil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(evil).rename(tmp_path / "default")
    (tmp_path / "pythia-410m").mkdir()  # no model in it
    assert portable_model_name("default") == "default"
    assert portable_model_name("pythia-410m") == "pythia-410m"


def test_the_engine_itself_refuses_and_loads_what_was_agreed(tmp_path: Path, evil: str) -> None:
    session = imported(tmp_path, evil)
    loaded: list[str] = []

    def load(configuration: Configuration, progress: object) -> LoadedModel:
        loaded.append(configuration.settings.model)
        return tiny_loaded()

    with running(load, store=database_path(), session=session) as chat:
        assert f"names the model {evil}" in chat.wait(ev.EngineFailed).message
    assert loaded == []

    with running(load, store=database_path()) as chat:
        chat.wait(ev.ModelReady)
        chat.turn("ours")
        chat.engine.send(OpenSession(session))
        assert f"`/resume {session} yes` loads it; the current conversation continues" in chat.wait(ev.Notice).text
        assert loaded == ["default"]
        chat.engine.send(OpenSession(session, evil))
        chat.wait(ev.ConversationResumed)
        assert loaded == ["default", evil]
    with Store() as store:
        info = store.find(session)
        assert not info.is_imported
        assert (info.model, info.settings["model"]) == (evil, evil)
        assert info.model_name != "SmolLM2-135M-Instruct"  # the name of what was loaded, and not the file's
        assert foreign_model(Configuration(), info) == ""


def test_another_model_given_once_stays_the_conversations_own(tmp_path: Path, evil: str) -> None:
    session = imported(tmp_path, evil)
    settings: dict[str, Any] = {"model": "pythia-410m"}
    with running(lambda *_: tiny_loaded(), start=False, store=database_path(), session=session, **settings) as chat:
        configuration = chat.engine._owner.host._configuration
        object.__setattr__(configuration, "origins", {"model": "--model"})
        chat.engine.start()
        chat.wait(ev.ConversationResumed)
    with Store() as store:
        assert store.find(session).settings["model"] == "pythia-410m"


def test_resume_in_a_chat_takes_a_yes(tmp_path: Path, evil: str) -> None:
    session = imported(tmp_path, evil)
    desk = Desk()
    desk.say(f"/resume {session}")
    desk.say(f"/resume {session} yes")
    assert desk.say(f"/resume {session} perhaps").error
    assert desk.engine.sent == [OpenSession(session), OpenSession(session, evil)]


def test_show_and_list_say_that_it_is_imported(tmp_path: Path, evil: str, capsys: pytest.CaptureFixture[str]) -> None:
    session = imported(tmp_path, evil)
    capsys.readouterr()
    assert cli.main(["sessions", "show", session]) == ExitCode.OK
    assert f"imported, not resumed yet; model: {evil}\n" in capsys.readouterr().out
    assert cli.main(["sessions", "list", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["imported"] is True
