"""Chats on a real engine that are saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamchat.store.store import Store
from tests.support.real_engine import Watched

QUESTIONS = ["Tell me of the sea.", "And of the dragon?", "What then?", "Why is that, and how does it end?", "Go on."]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "data" / "streamchat.db"


def said(chat: Watched, questions: list[str]) -> list[str]:
    return [chat.turn(question).reply for question in questions]


def session_of(database: Path) -> str:
    with Store(database) as store:
        return store.find("last").id
