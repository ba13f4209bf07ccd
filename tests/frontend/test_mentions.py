"""Files in messages."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamchat.base.errors import ConfigError
from streamchat.frontend import mentions
from streamchat.frontend.code_spans import code_spans


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
    assert mentions.expand("Sum up @notes.txt, please").text == ("Sum up notes.txt:\n```txt\none\ntwo\n```\n, please")
    assert mentions.expand('@"with space.md"').text == "with space.md:\n```md\nspaced\n```\n"
    assert mentions.expand("@sub/deep.txt").text == "deep.txt:\n```txt\ndeep\n```\n"
    assert mentions.expand("read @README").text == "read README:\n```\nno suffix\n```\n"


def test_the_fence_is_longer_than_any_in_the_file() -> None:
    assert mentions.expand("@code.py").text.startswith("code.py:\n````py\n")


@pytest.mark.parametrize(
    "text",
    [
        *("a@b.c", "mail me: jo.doe@example.org", "@somebody said so", "@", "@@x", "no mention", "3 @ 4"),
        *("@pytest.fixture\ndef x():\n    return 1", "    @v.setter", "@app.route('/')", "@Override public"),
        *(
            "npm i @types/node",
            "import x from '@/components/Button'",
            "@media (max-width: 9em)",
            "50 @1.25",
            "@.",
            "@/",
        ),
        *(
            'var path = @"C:\\temp";',
            '@"a string"',
            "https://medium.com/@notes.txt",
            "a\\@notes.txt",
            "josé@example.md",
        ),
        *("@notes(1)", "@notes.txt.missing", "@a\0b", "jo@notes.txt", "user_@notes.txt"),
    ],
)
def test_what_is_no_file_stays_text(text: str) -> None:
    assert mentions.expand(text) == mentions.ExpandedMessage(text)
    assert not mentions.expand(text).notice


@pytest.mark.parametrize(
    ("text", "notice"),
    [
        ("请阅读@demo.txt", "demo.txt: no such file; sent as text"),
        ("read @missing.txt, please", "missing.txt: no such file; sent as text"),
        ("see @sub/nothing", "sub/nothing: no such file; sent as text"),
        ('@"two words.md"', "two words.md: no such file; sent as text"),
        ("@a.py @b.py @a.py @c.py @d.py", "a.py, b.py, c.py and 1 other: no such file; sent as text"),
        ("@a.py @b.py @c.py @d.py @e.py", "a.py, b.py, c.py and 2 others: no such file; sent as text"),
    ],
)
def test_what_looks_like_a_file_is_sent_as_text_with_a_word(text: str, notice: str) -> None:
    assert mentions.expand(text).text == text
    assert mentions.expand(text).notice == notice


BLOCK = "notes.txt:\n```txt\none\ntwo\n```\n"


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("请阅读@notes.txt", f"请阅读{BLOCK}"),
        ("请阅读@notes.txt的内容。谢谢", f"请阅读{BLOCK}的内容。谢谢"),
        ("「@notes.txt」を読んで", f"「{BLOCK}」を読んで"),
        ("@notes.txt，谢谢", f"{BLOCK}，谢谢"),
        ("파일@notes.txt을 읽어", f"파일{BLOCK}을 읽어"),
        ("อ่าน@notes.txt", f"อ่าน{BLOCK}"),
        ("прочти @notes.txt…", f"прочти {BLOCK}…"),
        ("прочти@notes.txt", f"прочти{BLOCK}"),
        ("@文档.txt的内容", "文档.txt:\n```txt\nthree\n```\n的内容"),
        ("(@notes.txt).", f"({BLOCK})."),
        ("Is it @notes.txt?!", f"Is it {BLOCK}?!"),
        ("@notes.txt...", f"{BLOCK}..."),
        ("@notes.txt\n@notes.txt", f"{BLOCK}\n{BLOCK}"),
        ("-@notes.txt", f"-{BLOCK}"),
    ],
)
def test_neighbours_of_any_script(text: str, sent: str) -> None:
    Path("文档.txt").write_text("three")
    assert mentions.expand(text) == mentions.ExpandedMessage(sent)


@pytest.mark.parametrize(
    "text",
    [
        "```python\n@notes.txt\n```",
        "~~~\n@notes.txt\n```\n@notes.txt\n~~~",
        "````\n```\n@notes.txt\n````",
        "> ```\n> @notes.txt\n> ```",
        "1. do\n   ```\n   @notes.txt\n   ```",
        "```\n@notes.txt",  # never closed
        "`@notes.txt`",
        "``a ` @notes.txt``",
        "`a\n@notes.txt`",
    ],
)
def test_code_has_no_mentions(text: str) -> None:
    assert mentions.expand(text) == mentions.ExpandedMessage(text)


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("a ` b @notes.txt", f"a ` b {BLOCK}"),
        ("`one` @notes.txt `two`", f"`one` {BLOCK} `two`"),
        ("`a\n\n@notes.txt` b", f"`a\n\n{BLOCK}` b"),  # code ends with its paragraph
        ("```\nx\n```\n@notes.txt", f"```\nx\n```\n{BLOCK}"),
        ("``` not `a` fence\n@notes.txt", f"``` not `a` fence\n{BLOCK}"),
        ("``x` @notes.txt", f"``x` {BLOCK}"),
    ],
)
def test_beside_code_there_are(text: str, sent: str) -> None:
    assert mentions.expand(text).text == sent


WORDS = [
    "@notes.txt",
    "@pytest.fixture",
    "@types/node",
    "`",
    "``",
    "```\n",
    "~~~\n",
    "\n",
    " ",
    "请",
    "。",
    "a",
    ".",
    "\\",
]


@given(st.lists(st.sampled_from(WORDS), max_size=25).map("".join))
def test_any_message_can_be_sent_and_no_file_is_lost_silently(message: str) -> None:
    """Every mention outside of code and words is sent, told or escaped; everything else is as it was."""
    expanded = mentions.expand(message)
    assert expanded.notice == ""
    left = expanded.text.replace(BLOCK, "@notes.txt")
    assert left.replace("\\", "") == message.replace("\\", "")  # only an escape is taken away
    code = code_spans(message)
    for match in re.finditer("@notes", message):
        before = message[: match.start()][-1:]
        after = message[match.start() + len("@notes.txt") :][:1]
        in_code = any(start <= match.start() < end for start, end in code)
        if before in ("", " ", "\n", "请", "。", ".") and after in ("", " ", "\n", "请", "。", "`") and not in_code:
            assert BLOCK in expanded.text
            break


def test_a_long_message_with_many_signs_is_quick() -> None:
    text = "@a的" * 20_000 + "`@x` " * 20_000 + "``` @y " * 1_000
    began = time.process_time()
    assert mentions.expand(text).text == text
    assert time.process_time() - began < 5


def test_a_backslash_keeps_an_at_sign() -> None:
    assert mentions.expand(r"\@notes.txt and \@x/y").text == "@notes.txt and @x/y"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("@./missing.txt", r"./missing.txt: no such file \(use \\@ instead of @ to send the name as text\)"),
        ("see @../nothing", "../nothing: no such file"),
        ("@~/nothing.md", "~/nothing.md: no such file"),
        ("@./sub", "./sub is a folder; choose a file in it"),
        ("@binary.bin", "binary.bin is not a text file"),
        ("@latin.txt", r"latin.txt is not UTF-8 text \(byte 1\)"),
        ("@empty.txt", "empty.txt is empty"),
        ("@large.txt", r"large.txt is too large \(2.0 MB; the limit is 2.0 MB\)"),
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
    assert mentions.partial_mention("tell me about @no") == "no"
    assert mentions.partial_mention("mail a@b") is None
    assert mentions.partial_mention(r"\@no") is None


def test_paths_of_commands() -> None:
    assert mentions.split_path('"with space.md" sum up') == ("with space.md", "sum up")
    assert mentions.split_path("notes.txt") == ("notes.txt", "")
    assert mentions.split_path("  ") == ("", "")
    assert mentions.mention_of("with space.md") == '@"with space.md"'
