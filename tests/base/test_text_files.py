"""Text files of users: encodings, sizes, and what is not text."""

from __future__ import annotations

import io
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from streamchat.base.errors import ConfigError
from streamchat.base.text_files import decode_text, read_stdin, read_text
from streamchat.benchmarks.texts import read_documents
from streamchat.config import loader
from streamchat.frontend import mentions
from streamchat.frontend.editor import edit
from streamchat.replay.script import read_scripts
from streamchat.sessions.transcripts.imported import read_sessions
from streamchat.tui.themes import user_themes

CJK = "東京の桜"


@pytest.mark.parametrize(
    ("content", "text", "note"),
    [
        (b"", "", ""),
        (b"plain\n", "plain\n", ""),
        ("ä\n".encode(), "ä\n", ""),
        ("ä\n".encode("utf-8-sig"), "ä\n", "starts with a byte order mark, which was removed"),
        ("ä\r\nb\rc".encode(), "ä\nb\nc", "has carriage returns; its line ends were normalized"),
        ("hé\n".encode("utf-16"), "hé\n", "is UTF-16"),
        ("hé".encode("utf-16-be").join([b"\xfe\xff", b""]), "hé", "is UTF-16"),
        ("hé".encode("utf-32"), "hé", "is UTF-32"),
    ],
)
def test_a_text_is_read_in_the_encoding_of_its_mark_or_as_utf_8(content: bytes, text: str, note: str) -> None:
    for guess in (True, False):
        found = decode_text(content, "x.txt", guess=guess)
        assert (found.text, found.notes, found.guess) == (text, (note,) if note else (), "")


@pytest.mark.parametrize(
    ("content", "text", "note"),
    [
        ("ä€".encode("cp1252"), "ä€", "(byte 0); it was decoded as Windows-1252"),
        (b"a\x81b\xe4", "a\ufffdbä", "it was decoded as Windows-1252, with 1 undefined byte replaced by U+FFFD"),
        (b"\xef\xbb\xbfa\xff", "aÿ", "it was decoded as Windows-1252"),
        # cut inside a character: all of it as Windows-1252 would be unreadable
        (CJK.encode()[:-1], CJK[:-1] + "\ufffd", "(byte 9); 1 damaged byte became U+FFFD"),
        (CJK.encode() + b"\xff" + CJK.encode(), f"{CJK}\ufffd{CJK}", "(byte 12); 1 damaged byte became U+FFFD"),
    ],
)
def test_what_is_not_utf_8_is_refused_or_guessed(content: bytes, text: str, note: str) -> None:
    found = decode_text(content, "x.txt", guess=True)
    assert found.text == text
    assert found.notes == (found.guess,)
    assert note in found.guess
    with pytest.raises(ConfigError, match=r"^x\.txt is not UTF-8 text \(byte \d+\); save it as UTF-8$"):
        decode_text(content, "x.txt")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a\0b", "x.bin is not a text file (byte 1 is NUL)"),
        (b"\x7fELF\0\0", "x.bin is not a text file (byte 4 is NUL)"),
        ("no mark".encode("utf-16-le"), "x.bin is not a text file (byte 1 is NUL)"),
        (b"\xff\xfea", "x.bin starts as UTF-16 and is damaged at byte 2"),
        (b"\xff\xfe\x00\xd8", "x.bin starts as UTF-16 and is damaged at byte 2"),
    ],
)
def test_what_is_not_text_is_refused(content: bytes, sentence: str) -> None:
    for guess in (True, False):
        with pytest.raises(ConfigError) as caught:
            decode_text(content, "x.bin", guess=guess)
        assert str(caught.value) == sentence


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_text("x" * 11)
    assert read_text(big, max_bytes=11).text == "x" * 11
    os.mkfifo(tmp_path / "pipe")
    refused = {
        big: "is too large (11 B; the limit is 10 B); use a part of it",
        tmp_path: "is a folder; choose a file in it",
        tmp_path / "none": "no such file",
        tmp_path / "pipe": "is not a regular file",
        big / "below": "cannot be read (Not a directory)",
    }
    for path, reason in refused.items():
        with pytest.raises(ConfigError) as caught:
            read_text(path, max_bytes=10, regular=True)
        assert str(caught.value).removeprefix(str(path)).lstrip(": ") == reason
    with pytest.raises(ConfigError, match=r"^a.*b cannot be read \(embedded null byte\)$"):
        read_text("a\0b")


def test_stdin_is_read_as_a_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("hé".encode("utf-16"))))
    assert read_stdin().text == "hé"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\0")))
    with pytest.raises(ConfigError, match=r"^standard input is not a text file"):
        read_stdin(guess=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_stream_of_zeros_is_refused_before_all_of_it_is_read(tmp_path: Path) -> None:
    pipe, written = tmp_path / "zeros", [0]
    os.mkfifo(pipe)

    def write() -> None:
        with suppress(BrokenPipeError), open(pipe, "wb", buffering=0) as file:
            for _ in range(64):
                written[0] += file.write(bytes(2**20)) or 0

    writer = threading.Thread(target=write)
    writer.start()
    with pytest.raises(ConfigError, match=r"zeros is not a text file \(byte 0 is NUL\)$"):
        read_text(pipe)
    writer.join(10)
    assert written[0] < 8 * 2**20


def test_every_reader_of_users_files_follows_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that PowerShell or Notepad wrote as UTF-16 is read everywhere; a binary one nowhere."""

    def put(text: str, name: str) -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode("utf-16"))
        return path

    said = '{"messages": [{"role": "user", "content": "grüß"}, {"role": "assistant", "content": "dich"}]}\r\n'
    script = put(said, "said.jsonl")
    assert read_scripts([script]).dialogues[0].turns[0].text == "grüß"
    assert read_scripts([script]).problems == []
    assert read_sessions(script)[0].turns[0].text == "grüß"
    assert read_documents([str(script)])[0].text.endswith("}]}\n")
    assert "grüß" in mentions.read_file(str(script))
    monkeypatch.setenv("VISUAL", f"cp {script}")
    assert "grüß" in edit("")
    config = put('[streamchat]\n[generation]\nsystem_prompt = "grüß"\n', "own.toml")
    with pytest.raises(ConfigError, match=r"system_prompt belongs in \[chat\]"):  # so it was decoded
        loader.load(config_file=config, environ={})
    put('primary = "#0178D4"\n', "blue.toml")
    themes, problems = user_themes(tmp_path)
    assert [theme.name for theme in themes] == ["blue"]
    assert len(problems) == 1  # the configuration
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"[streamchat]\n\0")
    readers = [lambda: read_scripts([binary]), lambda: read_documents([str(binary)]),
               lambda: mentions.read_file(str(binary)),
               lambda: loader.load(config_file=binary, environ={})]  # fmt: skip
    for reader in readers:
        with pytest.raises(ConfigError, match=r"is not a text file \(byte 13 is NUL\)"):
            reader()  # type: ignore[no-untyped-call]
    assert any("is not a text file" in problem for problem in user_themes(tmp_path)[1])
