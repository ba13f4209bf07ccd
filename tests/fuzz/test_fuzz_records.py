"""Files of conversations as they may be: cut off, of wrong types, deep, with odd characters and line ends."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamchat.base.errors import ConfigError, StoreError
from streamchat.base.jsonlines import json_line, split_lines
from streamchat.cli import main as cli
from streamchat.replay.script import FORMATS, read_scripts, steps
from streamchat.sessions.transcripts.export import export, write_export
from streamchat.sessions.transcripts.imported import read_sessions
from streamchat.store.health import examine
from streamchat.store.records import StoredTurn
from streamchat.store.store import Store
from tests.support.odd_values import ANYTHING, TEXTS

pytestmark = pytest.mark.fuzz

ROLES = st.sampled_from(["user", "assistant", "system", "tool", ""])
MESSAGES = st.fixed_dictionaries({"role": ROLES | ANYTHING, "content": TEXTS | ANYTHING}, optional={"at": ANYTHING})
SETTINGS = st.dictionaries(
    st.sampled_from(["system_prompt", "num_sink_tokens", "cache_size", "seed", "model", "unknown"]) | TEXTS,
    ANYTHING,
    max_size=4,
)
HEADS = st.fixed_dictionaries(
    {"streamchat": st.just(1) | ANYTHING},
    optional={"title": ANYTHING, "model": ANYTHING, "model_name": ANYTHING, "settings": SETTINGS | ANYTHING},
)
NODES = st.fixed_dictionaries(
    {"parent": st.sampled_from(["a", "b", "c", None]) | ANYTHING},
    optional={
        "message": st.fixed_dictionaries(
            {"author": st.fixed_dictionaries({"role": ROLES}) | ANYTHING},
            optional={
                "content": st.fixed_dictionaries(
                    {"content_type": st.sampled_from(["text", "multimodal_text", "code"]) | ANYTHING},
                    optional={"parts": st.lists(TEXTS | ANYTHING, max_size=3) | ANYTHING, "text": TEXTS | ANYTHING},
                )
                | ANYTHING,
                "recipient": st.just("all") | ANYTHING,
                "create_time": ANYTHING,
                "metadata": ANYTHING,
            },
        )
        | ANYTHING
    },
)
TREES = st.fixed_dictionaries(
    {
        "mapping": st.dictionaries(st.sampled_from(["a", "b", "c"]), NODES, max_size=3) | ANYTHING,
        "current_node": st.sampled_from(["a", "b", None]) | ANYTHING,
    },
    optional={"title": TEXTS | ANYTHING, "default_model_slug": TEXTS | ANYTHING},
)
RECORDS = (
    MESSAGES
    | TREES
    | HEADS
    | st.fixed_dictionaries({"messages": st.lists(MESSAGES, max_size=4) | ANYTHING}, optional={"title": ANYTHING})
    | st.fixed_dictionaries({"turns": st.lists(TEXTS, max_size=3) | ANYTHING})
)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A file that is nearly one of ours."""
    lines = []
    for record in draw(st.lists(RECORDS | ANYTHING, max_size=6)):
        line = json.dumps(record, ensure_ascii=draw(st.booleans()))
        lines.append(
            line if draw(st.integers(0, 9)) else draw(st.sampled_from(["[" * 3000, '{"role":', "\0", line[:-2]]))
        )
    ends = st.sampled_from(["\n", "\r\n", "\r", "\n\n", "\u2028"])
    data = "".join(line + draw(ends) for line in lines).encode("utf-8", "surrogatepass")
    if draw(st.booleans()):
        data = data[: draw(st.integers(0, len(data)))]
    return draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\xff"])) + data


_numbers = itertools.count()


def written(data: bytes) -> Path:
    """A new file with `data`."""
    path = Path(f"file-{next(_numbers)}.jsonl")
    path.write_bytes(data)
    return path


@given(files())
@example(b'{"streamchat": 1, "settings": {"num_sink_tokens": "abc"}}\n{"role": "user", "content": "a"}')
@example(b'{"streamchat": 1, "settings": null}\n{"role": "system", "content": "s"}\n{"role": "user", "content": "a"}')
@example(b'{"role": "user", "content": "a", "at": 1e999}\n{"role": "user", "content": "b", "at": 1' + b"0" * 400 + b"}")
@example('{"role": "user", "content": "a\u2028b"}\r{"role": "assistant", "content": "\\ud800\\u0000"}'.encode())
def test_what_can_be_imported_can_be_listed_shown_exported_and_imported_again(data: bytes) -> None:
    """Or it is refused with one sentence and nothing is kept of it."""
    path = written(data)
    try:
        imported = read_sessions(path)
    except StoreError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert str(path) in refusal
        assert cli.main(["sessions", "import", str(path)]) == 5
        return
    assert cli.main(["sessions", "import", str(path), "--all"]) == 0
    assert cli.main(["sessions", "import", str(path)]) == (0 if len(imported) == 1 else 5)
    assert cli.main(["sessions"]) == 0
    assert cli.main(["sessions", "list", "--json"]) == 0
    assert cli.main(["sessions", "show", "last"]) == 0
    with Store() as store:
        saved = store.load(store.find("last").id)
        assert said(saved.turns) == said(imported[-1].turns)
        assert examine(store.path).problems == []
    assert export(saved, "markdown")
    for kind in ("jsonl", "replay"):
        again = path.with_suffix(f".{kind}.out")
        write_export(again, export(saved, kind))
        assert [said(read.turns) for read in read_sessions(again)] == [said(saved.turns)]


def said(turns: Iterable[StoredTurn]) -> list[tuple[str, str]]:
    """Question and answer of each turn."""
    return [(turn.text, turn.reply) for turn in turns]


@given(files(), st.sampled_from(FORMATS), st.booleans(), st.booleans())
def test_a_script_is_read_and_what_is_wrong_in_it_is_told(data: bytes, kind: Any, fresh: bool, forced: bool) -> None:
    path = written(data)
    try:
        script = read_scripts([path], kind)
    except ConfigError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert refusal.startswith((f"{path}: it ", f"{path} is not a text file"))
        assert "\n" not in refusal
        return
    assert all(re.match(rf"{re.escape(str(path))}(:\d+)?: .", problem) for problem in script.problems)
    run = list(steps(script, fresh=fresh, teacher_forced=forced, repeat=1))
    assert len(run) == script.turns
    assert all(isinstance(step.text, str) and isinstance(step.reply, str | None) for step in run)


@given(ANYTHING)
def test_a_json_line_is_one_line_for_everybody_and_means_the_same(value: Any) -> None:
    line = json_line(value)
    assert line.splitlines() == split_lines(line) == [line]
    assert line.encode().decode() == line
    assert not any("\x7f" <= letter <= "\x9f" or letter < " " for letter in line)
    assert repr(json.loads(line)) == repr(json.loads(json.dumps(value)))
