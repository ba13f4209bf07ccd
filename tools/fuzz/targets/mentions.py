"""Files that a message mentions: their text is attached, or one sentence says why not, or the message is unchanged."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from streamchat.base.sanitize import one_line
from streamchat.frontend import mentions
from tools.fuzz.target import Target


def run(data: bytes) -> None:
    """Expand a message, and complete what is at its end."""
    folder = Path("files")
    if not folder.exists():
        folder.mkdir()
        (folder / "note.txt").write_text("said @files/note.txt", encoding="utf-8")
        (folder / "a b.py").write_text("```\nx\n```", encoding="utf-8")
        (folder / "empty.md").touch()
        (folder / "binary.json").write_bytes(b"\0\xff")
    message = data.decode("utf-8", "surrogateescape")
    for name, note in mentions.complete_path(mentions.partial_mention(message) or ""):
        assert name.isprintable()
        assert note
    path, rest = mentions.split_path(message)
    assert isinstance(mentions.mention_of(path) + rest, str)
    expanded = mentions.expand(message)
    assert expanded.notice == one_line(expanded.notice)
    assert not any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in expanded.notice)
    if "@" not in message:
        assert expanded.text == message


def seeds() -> dict[str, bytes]:
    """Names with and without quotes, in code, in words, and paths that do not exist."""
    return {
        "plain": b"look at @files/note.txt, please",
        "quoted": b'@"files/a b.py" and \\@files/note.txt a@b.c',
        "refused": b"@./missing.txt",
        "binary": b"@files/binary.json",
        "empty": b"@files/empty.md",
        "code": b"`@files/note.txt`\n```\n@files/note.txt\n```\n@files/",
        "letters": "@files/note.txt的内容 @~nobody/x @/dev/zero".encode(),
    }


TARGET = Target(
    "mentions",
    run,
    seeds,
    ("streamchat.frontend.mentions", "streamchat.frontend.code_spans", "streamchat.base.text_files"),
    words=(
        b"@",
        b'@"',
        b"@./",
        b"@../",
        b"@~/",
        b"`",
        b"```",
        b"\\",
        b"files/",
        b"note.txt",
        b"\0",
        b"\n",
        b"\xff",
        b".md",
    ),
    max_bytes=512,
    suite_runs=200,
)
