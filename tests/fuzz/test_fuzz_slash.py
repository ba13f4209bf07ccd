"""What people may type behind a slash or an @: an answer comes, nothing raises, and no command reaches the model."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamchat.base.errors import ConfigError
from streamchat.config.settings import setting_fields
from streamchat.frontend import mentions
from streamchat.frontend.slash.registry import parse
from tests.support.desk import Desk
from tests.support.odd_values import TEXTS

pytestmark = pytest.mark.fuzz

COMMANDS = st.sampled_from([command.name for command in Desk().registry] + ["nonsense", "", "?", "/", "usr/bin"])
ARGUMENTS = st.one_of(
    TEXTS,
    st.sampled_from(
        ["0", "-1", "9" * 5000, "²", "١", "none", "last", ".", "~", "~nobody-here/x", "/dev/zero", "\0", "a\0b"]
    ),
    st.tuples(st.sampled_from([*setting_fields()]), TEXTS | st.sampled_from(["nan", "1e999", "9" * 5000])).map(
        " ".join
    ),
)


@given(COMMANDS, ARGUMENTS, st.sampled_from([" ", "=", "\n", "\t", "  "]))
@example("pin", "²", " ")
@example("pin", "9" * 5000, " ")
@example("quote", "9" * 5000, " ")
@example("keep", "²", " ")
@example("set", "seed " + "9" * 5000, " ")
@example("export", "a\0b.md", " ")
@example("export", "x" * 300 + ".md", " ")
@example("read", "a\0b", " ")
@example("read", "~nobody-here/x", " ")
@example("resume", "\udcff", " ")
@example("recall", '" OR * NEAR(', " ")
def test_any_command(name: str, argument: str, space: str) -> None:
    desk = Desk()
    desk.board.session = "nothing"
    line = f"/{name}{space}{argument}"
    result = desk.registry.run(desk.context, line)
    assert (result is None) == (parse(line) is None)
    assert not desk.engine.submitted
    if result is not None:
        assert isinstance(result.text, str)
    for cut in range(len(line[:40]) + 1):
        for whole, note in desk.registry.completions(desk.context, line[:cut]):
            assert whole.startswith("/")
            assert isinstance(note, str)


@given(TEXTS)
def test_a_doubled_slash_is_never_a_command(text: str) -> None:
    desk = Desk()
    line = "//" + text
    assert desk.registry.run(desk.context, line) is None
    message = desk.registry.unescape(line)
    # one slash is lost only where the rest would be taken for a command
    assert message == (line if parse(line[1:]) is None else message)
    assert message in (line, line[1:])
    assert desk.registry.unescape(desk.registry.escape(message)) == message


@given(
    st.lists(TEXTS | st.sampled_from(["@", "@note.txt", '@"note.txt"', "@~", "@/", "@.", "@/dev/zero", "\\@x", "a@b"]))
)
@example(["@~nobody-here/x.txt"])
@example(["@" + "x" * 300 + ".txt"])
@example(["@a\0b.txt"])
def test_any_mentions(parts: list[str]) -> None:
    Path("note.txt").write_text("said @note.txt \\@note.txt", encoding="utf-8")
    message = " ".join(parts)
    try:
        said = mentions.expand(message).text
    except ConfigError as error:
        said = str(error)
    assert isinstance(said, str)
    mentions.complete_path(message)
