"""Files in messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamchat.chat import mentions
from streamchat.errors import ConfigError


@pytest.fixture(autouse=True)
def files() -> None:
    """The test's own folder (see conftest) with some files."""
    Path("notes.txt").write_bytes("﻿one\r\ntwo\r\n".encode())
    Path("code.py").write_text("def f():\n    return '```'\n")
    Path("with space.md").write_text("spaced")
    Path("README").write_text("no suffix")
    Path("sub").mkdir()
    Path("sub/deep.txt").write_text("deep")


def test_a_mention_becomes_a_block_under_its_name() -> None:
    assert mentions.expand("Sum up @notes.txt, please") == ("Sum up notes.txt:\n```txt\none\ntwo\n```\n, please")
    assert mentions.expand('@"with space.md"') == "with space.md:\n```md\nspaced\n```\n"
    assert mentions.expand("@sub/deep.txt") == "deep.txt:\n```txt\ndeep\n```\n"
    assert mentions.expand("read @README") == "read README:\n```\nno suffix\n```\n"


def test_the_fence_is_longer_than_any_in_the_file() -> None:
    assert mentions.expand("@code.py").startswith("code.py:\n````py\n")


@pytest.mark.parametrize(
    "text",
    ["a@b.c", "mail me: jo.doe@example.org", "@somebody said so", "@", "@@x", "no mention", "3 @ 4"],
)
def test_what_is_no_file_stays_text(text: str) -> None:
    assert mentions.expand(text) == text


def test_a_backslash_keeps_an_at_sign() -> None:
    assert mentions.expand(r"\@notes.txt and \@x/y") == "@notes.txt and @x/y"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("@missing.txt", "missing.txt: no such file"),
        ("see @sub/nothing", "sub/nothing: no such file"),
        ("@sub", "sub is a folder; name a file in it"),
        ("@binary.bin", "binary.bin is not a text file"),
        ("@latin.txt", r"latin.txt is not UTF-8 text \(byte 1\)"),
        ("@empty.txt", "empty.txt is empty"),
        ("@large.txt", "large.txt has 2.0 MB, and at most 2.0 MB can be sent"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(text: str, sentence: str) -> None:
    Path("binary.bin").write_bytes(b"\x7fELF\0\0")
    Path("latin.txt").write_bytes(b"h\xe9llo")
    Path("empty.txt").write_text(" \n")
    Path("large.txt").write_text("x" * 2_000_001)
    with pytest.raises(ConfigError, match=sentence):
        mentions.expand(text)


def test_paths_complete() -> None:
    assert mentions.complete_path("no") == [("notes.txt", "13 B")]
    assert mentions.complete_path("sub/") == [("sub/deep.txt", "4 B")]
    assert ("sub/", "folder") in mentions.complete_path("")
    assert mentions.complete_path("nowhere/") == []
    assert mentions.mention_under_way("tell me about @no") == "no"
    assert mentions.mention_under_way("mail a@b") is None
    assert mentions.mention_under_way(r"\@no") is None


def test_paths_of_commands() -> None:
    assert mentions.split_path('"with space.md" sum up') == ("with space.md", "sum up")
    assert mentions.split_path("notes.txt") == ("notes.txt", "")
    assert mentions.split_path("  ") == ("", "")
    assert mentions.mention_of("with space.md") == '@"with space.md"'
