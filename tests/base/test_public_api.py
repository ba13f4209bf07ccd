"""What programs and scripts of users rely on: the names of the package, their arguments, and exit codes."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import streamchat
import tests
from streamchat.base import errors
from tests.support.tiny import tiny_model

ROOT = Path(tests.__path__[0]).parent
REQUIRED = inspect.Parameter.empty
SIGNATURES: dict[str, dict[str, Any]] = {
    "StreamingPress": {
        "model": REQUIRED,
        "*": None,
        "num_sink_tokens": 4,
        "cache_size": None,
        "compression_ratio": None,
        "options": None,
        "fit": None,
        "dtype": None,
    },
    "StreamingCache": {"config": REQUIRED, "fit": REQUIRED, "*": None, "cache_size": REQUIRED}
    | {"num_sink_tokens": 4, "options": None, "dtype": None},
    "StreamingHook": {"model": REQUIRED, "cache": REQUIRED},
    "Chat": {"model": "default", "*": None, "session": None, "save": False, "trust_model": False, "settings": REQUIRED},
}
"""Arguments and their defaults; those after `*` are given by name."""
MEMBERS = {
    "StreamingPress": "cache cache_size method compression_count tokens_evicted tokens_seen lengths reset",
    "StreamingCache": "lengths length tokens_evicted compression_count get_seq_length kv_bytes pin unpin reset",
    "StreamingHook": "attach remove attached",
    "Chat": "send ask show retry undo clear stop pin unpin set history status settings session save open recall export "
    "close",
}
EXIT_CODES = {
    "ConfigError": 2,
    "ModelError": 3,
    "ModelNotFoundError": 3,
    "UnsupportedModelError": 3,
    "OutOfMemoryError": 3,
    "LimitError": 1,
    "CacheError": 1,
    "WireError": 1,
    "ChunkTooLargeError": 1,
    "CacheFullError": 1,
    "EvictionPlanError": 1,
    "CacheNotSeenError": 1,
    "HungUpError": 129,
    "OutputError": 1,
    "TurnError": 1,
    "StoreError": 5,
    "SessionError": 5,
    "MissingSessionError": 5,
}


def arguments(function: Any) -> dict[str, Any]:
    """Name -> default, with `*` where arguments by name begin."""
    found: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            found.setdefault("*", None)
        found[parameter.name] = parameter.default
    return found


def test_the_public_names() -> None:
    assert set(streamchat.__all__) == {*SIGNATURES, "__version__", "events"}
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?\w+)?", streamchat.__version__)
    with pytest.raises(AttributeError, match="no attribute 'StreamingPres'"):
        _ = streamchat.StreamingPres


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_arguments_of_public_classes(name: str) -> None:
    assert list(arguments(getattr(streamchat, name)).items()) == list(SIGNATURES[name].items())


@pytest.mark.smoke
def test_the_members_of_public_classes() -> None:
    from streamchat import StreamingCache, StreamingHook, StreamingPress

    press = StreamingPress(tiny_model("llama"), cache_size=32)
    hook = StreamingHook(press.model, press.cache)
    for public in (press, press.cache, hook):
        missing = [name for name in MEMBERS[type(public).__name__].split() if not hasattr(public, name)]
        assert not missing, f"{type(public).__name__} lacks {missing}"
    assert [name for name in MEMBERS["Chat"].split() if not hasattr(streamchat.Chat, name)] == []
    assert {"TextDelta", "TokensEvicted", "TurnFinished"} <= set(vars(streamchat.events))
    assert isinstance(press.cache, StreamingCache)
    assert press.lengths == [0, 0, 0]


def test_the_exit_codes() -> None:
    assert {code.value for code in errors.ExitCode} == {0, 1, 2, 3, 4, 5, 129, 130, 141, 143}
    assert {name: int(getattr(errors, name).exit_code) for name in EXIT_CODES} == EXIT_CODES
    known = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert known == {*EXIT_CODES, "StreamchatError"}


def test_the_readme_lists_every_exit_code() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("| exit code | meaning |")[2].partition("\n\n")[0]
    listed = [int(code) for cell in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) for code in cell.split(",")]
    assert listed == sorted(code.value for code in errors.ExitCode)
