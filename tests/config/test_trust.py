"""`./config.toml` of a folder that may be anybody's: what it may set, and what only after the user trusted it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from streamchat.base import paths
from streamchat.base.errors import ConfigError, ExitCode
from streamchat.cli import main as cli
from streamchat.cli import parser
from streamchat.config import files, loader, trust
from streamchat.config.files import MAX_BYTES
from streamchat.config.render import render_toml
from streamchat.config.settings import Spec, default_of, setting_fields, spec_of
from streamchat.tui.app import StreamchatApp
from tests.support.app_driver import Driver
from tests.support.scripted_engine import ScriptedEngine

HOSTILE = """[streamchat]
[model]
model = "./weights"
adapter = "./lora"
[generation]
top_k = 7
[chat]
system_prompt = "Talk like a pirate."
[sessions]
save = "never"
snapshot_turns = 0
archive = "off"
archive_session_mb = 1000000
archive_total_mb = 1000000
[interface]
history = false
metrics_port = 9100
metrics_host = "0.0.0.0"
stats_json = "/etc/cron.d/x"
[keys]
app.quit = "f9"
"""
ARCHIVE = ("archive", "archive_session_mb", "archive_total_mb")
NEED_TRUST = (
    "model",
    "adapter",
    "save",
    "snapshot_turns",
    *ARCHIVE,
    "history",
    "metrics_port",
    "metrics_host",
    "stats_json",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder of somebody else's making."""
    place = tmp_path / "clone"
    place.mkdir()
    monkeypatch.chdir(place)
    return place.resolve()


def put(text: str, file: Path = Path("config.toml")) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def test_every_setting_is_classified_on_purpose() -> None:
    declared = {each.name: each for each in fields(Spec)}["needs_trust"]
    assert declared.default is MISSING
    assert declared.default_factory is MISSING
    assert tuple(name for name in setting_fields() if spec_of(name).needs_trust) == NEED_TRUST


def test_what_needs_trust_is_ignored_and_told_in_one_sentence(folder: Path) -> None:
    put(HOSTILE)
    loaded = loader.load(environ={})
    for name in NEED_TRUST:
        assert getattr(loaded.settings, name) == default_of(name)
        assert not loaded.is_explicit(name)
    assert loaded.settings.top_k == 7
    assert loaded.settings.system_prompt == "Talk like a pirate."
    assert loaded.keys == {}
    assert loaded.local_notice == (
        f"{folder / 'config.toml'} sets top_k, system_prompt, but is not trusted to set {', '.join(NEED_TRUST)}, keys; "
        "review the file, then run `streamchat config --trust` to allow it"
    )


def test_the_users_own_settings_hold_against_a_folder(folder: Path) -> None:
    put("[streamchat]\n[sessions]\nsave = 'never'\n[keys]\napp.help = 'f2'\n", paths.config_dir() / "config.toml")
    put("[streamchat]\n[sessions]\nsave = 'always'\n[generation]\ntop_k = 7\n[keys]\napp.help = 'f3'\n")
    loaded = loader.load(environ={})
    assert (loaded.settings.save, loaded.settings.top_k) == ("never", 7)
    assert loaded.keys == {"app.help": "f2"}
    assert loaded.origin("save") == str(loader.user_file())


def test_trust_holds_for_this_place_and_these_contents(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(HOSTILE)
    assert cli.main(["config", "--trust"]) == ExitCode.OK
    said = capsys.readouterr().out
    assert said.splitlines()[0].startswith(f"{folder / 'config.toml'} is trusted until it changes")
    assert 'model = "./weights"' in said
    assert 'app.quit = "f9"' in said
    loaded = loader.load(environ={})
    assert (loaded.settings.model, loaded.settings.metrics_port, loaded.settings.save) == ("./weights", 9100, "never")
    assert loaded.keys == {"app.quit": "f9"}
    assert "not trusted" not in loaded.local_notice
    assert loaded.local_notice.startswith(f"{folder / 'config.toml'} sets model, adapter, top_k")

    put(HOSTILE.replace("9100", "9101"))
    assert loader.load(environ={}).settings.metrics_port == 0
    put(HOSTILE)
    assert loader.load(environ={}).settings.metrics_port == 9100

    assert cli.main(["config", "--untrust", str(folder)]) == ExitCode.OK
    assert loader.load(environ={}).settings.metrics_port == 0
    capsys.readouterr()
    assert cli.main(["config", "--untrust"]) == ExitCode.USAGE
    assert capsys.readouterr().err == f"streamchat: {folder / 'config.toml'} was not trusted\n"


def test_a_copy_or_a_link_elsewhere_is_not_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(HOSTILE)
    trust.trust(folder / "config.toml", Path("config.toml").read_bytes())
    for name, link in (("copy", False), ("link", True)):
        other = folder / name
        other.mkdir()
        if link:
            (other / "config.toml").symlink_to(folder / "config.toml")
        else:
            put(HOSTILE, other / "config.toml")
        monkeypatch.chdir(other)
        loaded = loader.load(environ={})
        assert (loaded.settings.metrics_port, loaded.settings.top_k) == (0, 7)
        assert f"{other / 'config.toml'} sets" in loaded.local_notice
    link_to_folder = folder.parent / "same"
    link_to_folder.symlink_to(folder)
    monkeypatch.chdir(link_to_folder)
    assert loader.load(environ={}).settings.metrics_port == 9100


def test_what_the_user_names_needs_no_trust(folder: Path) -> None:
    put(HOSTILE)
    assert loader.load(config_file=Path("config.toml"), environ={}).settings.metrics_port == 9100
    loaded = loader.load({"model": "./weights"}, environ={"STREAMCHAT_CONFIG": "config.toml"})
    assert (loaded.settings.metrics_port, loaded.local_notice) == (9100, "")
    assert loader.load({}, environ={"STREAMCHAT_METRICS_PORT": "9200"}).settings.metrics_port == 9200


def test_a_file_with_the_defaults_says_nothing(folder: Path) -> None:
    put(render_toml())
    loaded = loader.load(environ={})
    assert loaded.file == Path("config.toml")
    assert (loaded.origins, loaded.local_notice) == ({}, "")


def test_the_users_own_folder_is_no_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    put(HOSTILE, loader.user_file())
    monkeypatch.chdir(loader.user_file().parent)
    loaded = loader.load(environ={})
    assert (loaded.settings.metrics_port, loaded.local_notice) == (9100, "")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_does_not_hold_up_the_start(folder: Path) -> None:
    os.mkfifo("config.toml")
    done = subprocess.run(
        [sys.executable, "-m", "streamchat", "--model", "./nope"],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    told = [line for line in done.stderr.splitlines() if "config.toml" in line]
    assert told == [
        f"streamchat: {folder / 'config.toml'} is not a regular file and is ignored; `--config FILE` reads it anyway"
    ]
    with pytest.raises(ConfigError, match="is not a regular file; it cannot be trusted"):
        parser.command("config").run(parser.parse(["config", "--trust"]))


def test_a_huge_file_is_ignored_in_one_sentence(folder: Path) -> None:
    with put(HOSTILE).open("ab") as file:
        file.truncate(MAX_BYTES + 1)
    loaded = loader.load(environ={})
    assert loaded.settings.top_k == 0
    assert "config.toml is larger than 1,000,000 bytes and is ignored" in loaded.local_notice
    Path("config.toml").write_bytes(b"#" * (MAX_BYTES + 1))  # of another program
    assert loader.load(environ={}).local is None


def test_another_users_file_is_ignored_until_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(HOSTILE)
    monkeypatch.setattr(files, "_is_safe_owner", lambda owner: False)
    loaded = loader.load(environ={})
    assert (loaded.settings.top_k, loaded.settings.system_prompt) == (0, "")
    assert f"belongs to another user (uid {os.getuid()}) and is ignored" in loaded.local_notice
    assert cli.main(["config", "--trust"]) == ExitCode.OK
    assert loader.load(environ={}).settings.metrics_port == 9100


def test_owners_that_count_as_mine() -> None:
    assert files._is_safe_owner(os.geteuid())
    assert files._is_safe_owner(0)
    assert not files._is_safe_owner(os.geteuid() + 1)


def test_the_list_is_private_and_a_damaged_one_trusts_nothing(folder: Path) -> None:
    put(HOSTILE)
    data = Path("config.toml").read_bytes()
    trust.trust(folder / "config.toml", data)
    assert trust.store_file().stat().st_mode & 0o077 == 0
    for damaged in (b"[1, 2]", b"{", b"\xff", b"[" * 100_000):
        trust.store_file().write_bytes(damaged)
        assert not trust.is_trusted(folder / "config.toml", data)
        assert loader.load(environ={}).settings.metrics_port == 0


def test_a_full_disk_loses_no_earlier_decision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trust.trust(folder / "a.toml", b"a")
    with monkeypatch.context() as patch:
        patch.setattr(paths, "fsync", full)
        with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\); free some disk space$"):
            trust.trust(folder / "b.toml", b"b")
    assert trust.is_trusted(folder / "a.toml", b"a")
    assert not trust.is_trusted(folder / "b.toml", b"b")
    assert os.listdir(trust.store_file().parent) == [trust.store_file().name]


@pytest.mark.parametrize("content", [None, "[tool]\nname = 'x'\n"])
def test_trusting_a_folder_without_a_file_of_ours(
    folder: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        put(content)
    assert cli.main(["config", "--trust", str(folder)]) == ExitCode.USAGE
    assert "does not exist or is not a streamchat configuration" in capsys.readouterr().err


def test_trusting_a_file_with_a_wrong_value_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put("[streamchat]\n[interface]\nmetrics_port = 70000\n")
    assert cli.main(["config", "--trust"]) == ExitCode.USAGE
    assert "metrics_port = 70000 is not valid" in capsys.readouterr().err
    assert not trust.store_file().exists()


async def test_the_app_shows_it_in_the_conversation(folder: Path) -> None:
    put("[streamchat]\n[interface]\nmetrics_port = 9100\n")
    engine = ScriptedEngine()
    app = StreamchatApp(engine, loader.load(environ={}))
    async with app.run_test(size=(140, 40)) as pilot:
        driver = Driver(app, engine, pilot)
        shown = f"{folder / 'config.toml'} is not trusted to set metrics_port; review the file, then"
        await driver.until(lambda: any(shown in line for line in driver.lines))
    assert engine.close(60)


def test_commands_say_it_on_stderr_and_config_in_its_comments(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put("[streamchat]\n[interface]\nmetrics_port = 9100\n")
    assert cli.main(["config"]) == ExitCode.OK
    out, err = capsys.readouterr()
    assert err == ""
    assert "is not trusted to set metrics_port" in out.replace("\n# ", " ")
    assert "\nmetrics_port = 0\n" in out
    assert cli.main(["ppl", "missing.txt"]) != ExitCode.OK
    assert capsys.readouterr().err.count("is not trusted to set metrics_port") == 1
