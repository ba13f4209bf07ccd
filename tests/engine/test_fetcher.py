"""A model is fetched beside the running chat: its own thread, one at a time, canceled at once."""

from __future__ import annotations

import logging
import queue
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import utils

from streamchat.base import events as ev
from streamchat.base.errors import ModelNotFoundError
from streamchat.base.progress import Progress
from streamchat.base.requests import CancelFetch, FetchModel, Submit, SwitchModel
from streamchat.conversation.assemble import load_from_settings as load_configured
from streamchat.engine.fetcher import Fetcher, fetch_model
from streamchat.models.quiet import quiet
from tests.support.fake_hub import FakeHub, serve_hub
from tests.support.models_help import save, tiny_llama, tiny_neox
from tests.support.real_engine import running


class Recorded:
    """The events of a fetcher, as they come."""

    def __init__(self) -> None:
        self.events: queue.Queue[ev.Event] = queue.Queue()

    def end(self) -> ev.ModelFetched:
        """Wait for the next end of a fetch."""
        while not isinstance(event := self.events.get(timeout=10), ev.ModelFetched):
            pass
        return event


def endless(name: str, progress: Progress) -> None:
    pause = threading.Event()
    while True:
        progress(f"Fetching {name}", 1, 2, "bytes")
        pause.wait(0.001)


def test_progress_and_end() -> None:
    def fetch(name: str, progress: Progress) -> None:
        progress(f"Fetching {name}", 5, 10, "bytes")

    recorded = Recorded()
    Fetcher(fetch, recorded.events.put).start("a/b")
    assert recorded.end() == ev.ModelFetched("a/b")


@pytest.mark.parametrize(
    ("error", "words"),
    [(ModelNotFoundError("no network; connect"), "no network; connect"), (ValueError("x"), "(ValueError: x)")],
)
def test_errors_are_sentences(error: Exception, words: str, caplog: pytest.LogCaptureFixture) -> None:
    def fetch(name: str, progress: Progress) -> None:
        raise error

    recorded = Recorded()
    Fetcher(fetch, recorded.events.put).start("a/b")
    assert words in recorded.end().error


def test_cancellation_and_another_fetch() -> None:
    recorded = Recorded()
    fetcher = Fetcher(endless, recorded.events.put)
    fetcher.cancel()  # nothing runs
    fetcher.start("a/b")
    fetcher.start("c/d")
    assert recorded.end() == ev.ModelFetched("a/b", canceled=True)
    fetcher.cancel()
    assert recorded.end() == ev.ModelFetched("c/d", canceled=True)


def test_the_chat_continues_meanwhile() -> None:
    with running(fetch=endless) as chat:
        chat.engine.send(FetchModel("a/b"))
        chat.wait(ev.ModelFetching)
        assert chat.turn("Tell me of the sea.").finish_reason
        chat.engine.send(CancelFetch())
        assert chat.wait(ev.ModelFetched) == ev.ModelFetched("a/b", canceled=True)


def test_a_reply_does_not_delay_a_fetch() -> None:
    """Requests of a fetch do not wait in the queue."""
    fetched = threading.Event()
    with running(fetch=lambda name, progress: fetched.set()) as chat:
        for _ in range(3):
            chat.engine.send(Submit("Tell me of the sea."))
        chat.engine.send(FetchModel("a/b"))
        assert fetched.wait(10)


def test_closing_ends_the_fetch() -> None:
    with running(fetch=endless) as chat:
        chat.engine.send(FetchModel("a/b"))
        chat.wait(ev.ModelFetching)
    assert chat.wait(ev.ModelFetched).canceled


def test_two_threads_in_quiet_blocks_restore_everything() -> None:
    """One thread loads while another fetches; the one that entered first leaves first."""
    hub: Any = utils
    before = logging.getLogger("huggingface_hub").level, hub.are_progress_bars_disabled(), list(warnings.filters)
    first, second = quiet(), quiet()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logging.getLogger("huggingface_hub").level == logging.CRITICAL
    second.__exit__(None, None, None)
    after = logging.getLogger("huggingface_hub").level, hub.are_progress_bars_disabled(), list(warnings.filters)
    assert after == before


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    yield from serve_hub(monkeypatch)


def test_a_model_of_the_hub_is_fetched_and_then_loaded(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.repositories["a/next"] = save(tiny_neox(), tmp_path / "next")
    first = str(save(tiny_llama(), tmp_path / "first"))
    settings: dict[str, Any] = {"model": first, "device": "cpu", "kernels": "torch"}
    with running(load_configured, **settings) as chat:
        chat.wait(ev.ModelReady)
        chat.engine.send(FetchModel("a/nothing"))
        assert chat.wait(ev.ModelFetched).error.startswith("There is no model a/nothing on 127.0.0.1")
        chat.engine.send(FetchModel("a/next"))
        assert chat.wait(ev.ModelFetched, 2) == ev.ModelFetched("a/next")
        fake_hub.close()  # loading fetches nothing
        chat.engine.send(SwitchModel("a/next"))
        assert chat.wait(ev.ModelReady, 2).info.name == "next"
        chat.engine.send(FetchModel("a/next"))  # nothing to do
        assert chat.wait(ev.ModelFetched, 3) == ev.ModelFetched("a/next")


def test_a_name_that_is_no_name() -> None:
    recorded = Recorded()
    Fetcher(fetch_model, recorded.events.put).start("./nothing")
    assert "There is no folder" in recorded.end().error
