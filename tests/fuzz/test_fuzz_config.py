"""Configuration files and variables as they may be: a configuration comes out, or one sentence that names the place."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamchat.base.errors import ConfigError
from streamchat.config import keymap, loader
from streamchat.config.render import render_toml
from streamchat.config.settings import setting_fields, spec_of
from tests.support.odd_values import ANYTHING, ODD, TEXTS

pytestmark = pytest.mark.fuzz

NAMES = st.sampled_from([*setting_fields(), *(key.id for key in keymap.KEYS)]) | TEXTS
TABLES = st.sampled_from(["streamchat", "keys", *{spec_of(name).section for name in setting_fields()}]) | TEXTS
VALUES = st.sampled_from(
    ["1", "0.5", "true", "nan", "inf", "-1", "1" + "0" * 400, "1" * 5000, '"auto"', '"ctrl+q"', "1979-05-27", "[[]]"]
) | ANYTHING.map(lambda value: json.dumps(value))


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A file that is nearly a configuration."""
    lines = ["[streamchat]", draw(st.sampled_from(["config_version = 1", "config_version = 2", ""]))]
    for table in draw(st.lists(TABLES, max_size=3)):
        lines.append(draw(st.sampled_from([f"[{table}]", f"[[{table}]]", f"{json.dumps(table)} = 1", table])))
        for name in draw(st.lists(NAMES, max_size=4)):
            key = draw(st.sampled_from([name, json.dumps(name)]))
            lines.append(f"{key} = {draw(VALUES)}")
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    data = end.join(lines).encode("utf-8", "surrogatepass")
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe"])) + data[: draw(st.integers(0, len(data) + 200))]


_numbers = itertools.count()


@given(files() | st.binary(max_size=40))
@example(b"[streamchat]\n[cache]\ncache_size = " + b"[" * 5000)
@example(b"[streamchat]\n[chat]\nsystem_prompt = '''\n\x1b'''")
def test_any_file(data: bytes) -> None:
    path = Path(f"file-{next(_numbers)}.toml")
    path.write_bytes(data)
    check(lambda: loader.load(config_file=path, environ={}), str(path))


@given(
    st.dictionaries(st.sampled_from([*setting_fields()]), st.text(alphabet="0123456789.-e inftrueNa" + ODD), max_size=3)
)
def test_any_variables(texts: dict[str, str]) -> None:
    variables = {f"STREAMCHAT_{name.upper()}": text for name, text in texts.items()}
    check(lambda: loader.load(environ=variables), "STREAMCHAT_")


@given(st.dictionaries(st.sampled_from([*setting_fields()]), ANYTHING, max_size=3))
def test_any_flags(values: dict[str, Any]) -> None:
    check(lambda: loader.load(values, environ={}), "--")


def check(load: Any, place: str) -> None:
    """Loads, and what was loaded is written so that it means the same; or names its place."""
    try:
        loaded = load()
    except ConfigError as error:
        refusal = str(error)
    else:
        path = Path(f"rendered-{next(_numbers)}.toml")
        path.write_text(render_toml(loaded), encoding="utf-8")
        again = loader.load(config_file=path, environ={})
        assert again.settings == loaded.settings
        assert dict(again.keys) == dict(loaded.keys)
        return
    assert place in refusal
    assert len(refusal) < 1000
