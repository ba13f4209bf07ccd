"""The log file and the file of statistics: private, bounded, and never in the way of a chat."""

from __future__ import annotations

import json
import logging
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamchat.base import paths
from streamchat.base.errors import ConfigError
from streamchat.telemetry import log_file
from streamchat.telemetry.stats_log import StatsLog


@pytest.fixture(autouse=True)
def _no_handler_stays() -> Iterator[None]:
    """The root logger is the process's: neither one of another test nor one of these stays."""
    _without_handler()
    yield
    _without_handler()


def _without_handler() -> None:
    if log_file._handler is not None:
        logging.getLogger().removeHandler(log_file._handler)
        log_file._handler.close()
        log_file._handler = None
        logging.captureWarnings(False)


# --- log -------------------------------------------------------------------------------------------------------


def test_records_and_warnings_go_to_a_private_file() -> None:
    log_file.start_logging()
    assert not log_file.log_path().exists()  # nothing was said yet
    logging.getLogger("some.library").warning("careful")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn("old", stacklevel=1)
    text = log_file.log_path().read_text()
    assert "WARNING some.library: careful" in text
    assert "old" in text
    assert stat.S_IMODE(log_file.log_path().stat().st_mode) == 0o600
    assert stat.S_IMODE(log_file.log_path().parent.stat().st_mode) == 0o700


def test_a_crash_is_logged_whole_and_its_file_named() -> None:
    assert log_file.log_crash("Traceback\n  line\nError: x\n") == log_file.log_path()
    assert "Traceback\n  line\nError: x\n" in log_file.log_path().read_text()


def test_the_log_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "MAX_BYTES", 2_000)
    for number in range(200):
        log_file.log_crash(f"crash {number}")
    kept = sorted(path.name for path in log_file.log_path().parent.iterdir())
    assert kept == ["streamchat.log", "streamchat.log.1"]
    assert all(path.stat().st_size <= 2_000 for path in log_file.log_path().parent.iterdir())
    assert "crash 199" in log_file.log_path().read_text()
    assert stat.S_IMODE(log_file.log_path().stat().st_mode) == 0o600


def test_a_log_that_cannot_be_written_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    folder = paths.state_dir()
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("a file where a folder should be")
    assert log_file.log_crash("Traceback") is None
    assert capsys.readouterr() == ("", "")


def test_undecodable_text_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest keeps what is logged for its report, which cannot cross to another process with such text in it
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    log_file.log_crash("bytes \ud800")
    assert "bytes \\ud800" in log_file.log_path().read_text()


@pytest.mark.parametrize(("value", "wanted"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_debug(monkeypatch: pytest.MonkeyPatch, value: str, wanted: bool) -> None:
    monkeypatch.setenv("STREAMCHAT_DEBUG", value)
    assert log_file.is_debug() == wanted


# --- statistics ------------------------------------------------------------------------------------------------


def test_each_line_is_there_at_once_and_earlier_runs_stay() -> None:
    file = Path("stats.jsonl")
    file.write_text('{"turn": 0}\n')
    log = StatsLog(str(file))
    log.write({"turn": 1, "ttft_s": None})
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"turn": 0}, {"turn": 1, "ttft_s": None}]
    log.close()
    log.write({"turn": 2})  # a late event
    assert len(file.read_text().splitlines()) == 2
    assert log.failure == ""


@pytest.mark.parametrize("path", ["no/such/folder/x", ".", "nul\0byte", "~nobody-of-that-name/x"])
def test_a_file_that_cannot_be_opened_is_said_at_the_start(path: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be written \(.+\); give another file"):
        StatsLog(path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_ends_the_statistics_and_not_the_chat() -> None:
    log = StatsLog("/dev/full")
    log.write({"turn": 1})
    log.write({"turn": 2})
    log.close()
    assert log.failure == "/dev/full is incomplete: No space left on device"
