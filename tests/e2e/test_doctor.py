"""`streamchat doctor`: everything there is to know, and what is broken by name."""

from __future__ import annotations

import json
import sqlite3
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from packaging.requirements import Requirement

from streamchat import __version__
from streamchat.base import paths
from streamchat.base.devices import ATTENTION_ON_GPUS
from streamchat.base.errors import StoreError
from streamchat.base.progress import silent
from streamchat.cli import main as cli
from streamchat.commands import doctor_versions
from streamchat.kernels import build
from streamchat.models import device as devices
from streamchat.models.folder import inspect
from streamchat.models.gguf.convert import converted_copy
from streamchat.store.backup import back_up_daily
from streamchat.store.lock import SessionLock
from streamchat.store.store import Store
from tests.support.gguf_models import FAMILIES, write_family
from tests.support.kernels import needs_kernels
from tests.support.models_help import save, tiny_llama
from tests.support.program import run
from tests.support.saved_sessions import a_session, a_turn


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report."""
    code = cli.main(["doctor", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_what_is_here_and_what_would_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tiny_llama(), tmp_path / "tiny")
    Store().close()
    code, report = told(capsys, "--model", str(folder), "--device", "cpu", "--dtype", "float32")
    assert (code, report["problems"]) == (0, [])
    assert report["versions"]["streamchat"] == __version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["device"]["devices"][-1] == "cpu"
    assert report["terminal"]["face"] == "pipe"
    database = report["files"]["conversations"]
    assert database == {"path": str(Store().path), "bytes": Store().path.stat().st_size}
    assert report["files"]["replays"]["bytes"] is None
    chat = report["chat"]
    assert (chat["device"], chat["dtype"]) == ("cpu (from --device)", "float32 (from --dtype)")
    assert chat["weights bytes"] == 4 * sum(p.numel() for p in tiny_llama().parameters())
    assert report["settings"]["model"] == f"{folder}  (from --model)"


@needs_kernels
def test_weights_that_stay_quantized_have_the_size_of_their_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_family(tmp_path / "a.gguf", FAMILIES["llama"], lambda name: Type.Q4_1)
    folder = converted_copy(tmp_path / "a.gguf", progress=silent)
    inside = inspect(folder)
    for how, size, precision in (
        (("--dtype", "bfloat16"), inside.file_bytes, "int4"),
        (("--dtype", "bfloat16", "--kernels", "torch"), 2 * inside.parameters, None),
        (("--dtype", "float32"), 4 * inside.parameters, None),
    ):
        code, report = told(capsys, "--model", str(folder), "--device", "cpu", *how)
        chat = report["chat"]
        assert (code, chat["weights bytes"], chat.get("precision")) == (0, size, precision)


def test_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--model", "pythia-410m"]) == 0
    out = capsys.readouterr().out
    assert f"  {'streamchat':<21} {__version__}" in out
    assert "EleutherAI/pythia-410m, not fetched yet; the first start fetches it" in out
    assert out.endswith("no problems found\n")


def test_what_is_broken_is_named_and_the_rest_is_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("config.toml").write_text("[streamchat]\n[cache]\ncache_size = 3\n")
    monkeypatch.setitem(sys.modules, "psutil", None)
    paths.private_dir(paths.data_dir()).chmod(0o755)
    code, report = told(capsys, "--model", "./missing")
    assert code == 1
    settings, device, files = report["problems"]
    assert settings.startswith("settings: config.toml: cache_size = 3 is not valid")
    assert device == "device: psutil is not installed; install streamchat again with pip"
    assert files.startswith(f"{paths.data_dir()} can be read by other users")
    assert {"versions", "terminal", "files", "chat"} <= set(report)


def test_a_model_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, report = told(capsys, "--model", "./missing")
    assert (code, len(report["problems"])) == (1, 1)
    assert report["problems"][0].startswith("chat: There is no folder 'missing'")


def test_versions_outside_their_range_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version

    def version(package: str) -> str:
        if package == "gguf":
            raise metadata.PackageNotFoundError(package)
        return "1.0" if package == "transformers" else real(package)

    monkeypatch.setattr(metadata, "version", version)
    code, report = told(capsys)
    assert code == 1
    assert report["problems"][0] == "gguf is not installed; install streamchat again with pip"
    assert report["problems"][1].startswith("transformers 1.0 is installed, but streamchat needs ")


def without_installation(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """As in a checkout that is run with `python -m streamchat`; '' for a package that is missing."""
    real_version, real_distribution = metadata.version, metadata.distribution

    def version(package: str) -> str:
        found = versions.get(package)
        if found == "":
            raise metadata.PackageNotFoundError(package)
        return found or real_version(package)

    def distribution(name: str) -> metadata.Distribution:
        if name == "streamchat":
            raise metadata.PackageNotFoundError(name)
        return real_distribution(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "distribution", distribution)


def test_a_checkout_that_is_not_installed_says_so_and_checks_versions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_installation(monkeypatch)
    code, report = told(capsys)
    folder = Path(doctor_versions.__file__).parents[2]
    assert (code, report["problems"]) == (0, [])
    assert report["versions"]["installation"] == f"none: runs from {folder}; pip install -e {folder} installs it"
    assert report["versions"]["torch"] == torch.__version__


def test_a_checkout_says_how_to_install_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_installation(monkeypatch, gguf="", transformers="1.0")
    monkeypatch.setitem(sys.modules, "psutil", None)
    code, report = told(capsys)
    folder = Path(doctor_versions.__file__).parents[2]
    install = f"pip install -e {folder} installs it"
    assert code == 1
    gguf, transformers, psutil = report["problems"]
    assert gguf == f"gguf is not installed; {install}"
    assert transformers.startswith("transformers 1.0 is installed, but streamchat needs ")
    assert psutil == f"device: psutil is not installed; {install}"


def test_on_a_gpu_it_says_which_attention_serves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, without = told(capsys, "--device", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "gpus", list)
    monkeypatch.setattr(devices, "available_devices", lambda: ["cuda", "cpu"])
    _, report = told(capsys, "--device", "cpu")
    assert report["problems"] == []
    assert report["device"]["attention on GPUs"] == ATTENTION_ON_GPUS
    assert "attention on GPUs" not in without["device"]


@pytest.mark.slow
def test_it_loads_neither_transformers_nor_textual() -> None:
    report = Path("modules.txt")
    run("doctor", scenario={}, LOADED_MODULES=str(report))
    loaded = set(report.read_text().split())
    assert "torch" in loaded
    assert not loaded & {"transformers", "textual", "prompt_toolkit"}


# --- the database -----------------------------------------------------------------------------------------------


def filled() -> Path:
    with Store() as store:
        for number in range(30):
            session = a_session(store, f"title {number}")
            store.write(session, turns=[a_turn(1, f"about {number}", "a reply")])
        return store.path


def test_a_sound_database_and_its_backups_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    path = filled()
    back_up_daily(path)
    _, report = told(capsys)
    assert report["problems"] == []
    assert report["files"]["database"] == "intact, 30 sessions, 30 turns"
    assert report["files"]["backups"].startswith("1 in ")


def test_broken_indexes_are_found_and_mended(capsys: pytest.CaptureFixture[str]) -> None:
    """One of SQLite's, and the one of words: the messages are whole, so nothing needs to be restored."""
    path = filled()
    with sqlite3.connect(path) as connection:
        trigger = connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'messages_changed'").fetchone()[0]
        connection.execute("DROP TRIGGER messages_changed")
        connection.execute("UPDATE messages SET text = 'unindexed' WHERE id = 3")
        connection.execute(trigger)
        # a row that the index of numbers does not have
        index = connection.execute("SELECT rootpage, sql FROM sqlite_schema WHERE name = 'turns_by_number'").fetchone()
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("DELETE FROM sqlite_schema WHERE name = 'turns_by_number'")
        connection.commit()
    connection.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE turns SET number = 7 WHERE id = 5")
        connection.execute(
            "INSERT INTO sqlite_schema (type, name, tbl_name, rootpage, sql) "
            "VALUES ('index', 'turns_by_number', 'turns', ?, ?)",
            tuple(index),
        )
    connection.close()
    code, report = told(capsys)
    assert code == 1
    [problem] = report["problems"]
    assert problem.startswith(
        f"{path} is damaged (row 5 missing from index turns_by_number); `streamchat sessions repair`"
    )
    assert "the search index 'words' does not match the messages" in report["files"]["database"]
    assert cli.main(["sessions", "repair"]) == 0
    assert capsys.readouterr().out == "The indexes were rebuilt; no problems remain.\n"
    assert told(capsys)[1]["problems"] == []
    with Store() as store:
        assert [found.text for found in store.search("unindexed")] == ["unindexed"]


def test_a_damaged_database_is_told_with_its_backup(capsys: pytest.CaptureFixture[str]) -> None:
    path = filled()
    made = back_up_daily(path)
    assert made is not None
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (path.stat().st_size - 4096))
    code, report = told(capsys)
    assert code == 1
    [problem] = report["problems"]
    assert f"`streamchat sessions restore-backup {made.name}`" in problem
    assert cli.main(["sessions", "restore-backup"]) == 0
    capsys.readouterr()
    assert told(capsys)[1]["problems"] == []


def test_a_search_index_of_which_a_part_is_gone_is_damage(capsys: pytest.CaptureFixture[str]) -> None:
    path = filled()
    back_up_daily(path)
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE words_config")
    connection.close()
    code, report = told(capsys)
    assert code == 1
    [problem] = report["problems"]
    assert problem.startswith(f"{path} is damaged (")
    with Store() as store, pytest.raises(StoreError, match="restore-backup streamchat-"):
        store.search("title")


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be deleted there")
def test_a_lost_log_under_a_running_chat_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    path = filled()
    with Store() as store:
        session = store.sessions(limit=1)[0].id
        lock = SessionLock(store.lock_folder, session)
        assert told(capsys)[1]["problems"] == []
        Path(f"{path}-wal").unlink()
        code, report = told(capsys)
        lock.release()
    assert code == 1
    said = f"a running streamchat has the session {session} open, but {path}-wal was deleted"
    assert report["problems"][0].startswith(said)


def test_kernels_that_are_not_compiled_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: ["/usr/bin/gcc"])
    monkeypatch.setattr(build, "library_path", lambda: tmp_path / "kernels.so")
    _code, report = told(capsys)
    assert report["device"]["cpu kernels"] == "not compiled yet; /usr/bin/gcc compiles them at the first start"


def test_every_package_of_an_extra_has_a_row() -> None:
    project = tomllib.loads((Path(doctor_versions.__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    packages = {
        Requirement(line).name for name in extras.keys() - {"dev", "fused", "fuzz", "mutation"} for line in extras[name]
    }
    assert packages - {"streamchat"} == doctor_versions.OPTIONAL.keys() - {"llama-cpp-python"}
