"""Files of conversations: streamchat's own, ChatGPT's export, lists of messages, JSON lines, plain text."""

from __future__ import annotations

import json
from pathlib import Path

from streamchat.base.errors import StreamchatError
from streamchat.replay.script import read_scripts, steps
from streamchat.sessions.transcripts.imported import read_sessions
from tools.fuzz.target import Target


def run(data: bytes) -> None:
    """Import the file, and read it as a script of a replay."""
    path = Path("conversation.jsonl")
    path.write_bytes(data)
    refusals: list[StreamchatError] = []
    for read in (_import, _replay):
        try:
            read(path)
        except StreamchatError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def _import(path: Path) -> None:
    for session in read_sessions(path):
        made = session.as_new()
        assert [turn.number for turn in made.turns] == list(range(1, len(made.turns) + 1))
        assert "\n" not in made.title
        json.dumps(dict(made.settings))
        for turn in made.turns:
            (turn.text + turn.reply).encode()


def _replay(path: Path) -> None:
    script = read_scripts([path])
    for problem in script.problems:
        assert problem.strip()
    for step in steps(script, fresh=False, teacher_forced=True, repeat=1):
        assert isinstance(step.text, str)


def seeds() -> dict[str, bytes]:
    """One file of each format."""
    user, reply = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", "at": 1700000000.5}
    ours = [{"streamchat": 1, "title": "a", "model": "default", "settings": {"cache_size": 64}}, user, reply]
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}
    node = {"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["hi"]}, "create_time": 1.5}
    answer = {"author": {"role": "assistant"}, "content": {"content_type": "text", "parts": ["yo"]}, "recipient": "all"}
    tree = {
        "title": "t",
        "mapping": {
            "r": {"parent": None, "children": ["a"]},
            "a": {"parent": "r", "message": node},
            "b": {"parent": "a", "message": answer},
        },
        "current_node": "b",
    }
    return {
        "ours": b"\n".join(json.dumps(each).encode() for each in ours),
        "chatgpt": json.dumps([tree]).encode(),
        "messages": json.dumps({"messages": [user, reply]}).encode(),
        "array": json.dumps([user, reply, parts]).encode(),
        "mt-bench": json.dumps({"turns": ["a", "b"]}).encode(),
        "text": "a line\r\nanother “line”\n".encode(),
        "utf-16": json.dumps(user).encode("utf-16"),
    }


WORDS = (
    *b'"role" "content" "parts" "mapping" "parent" "current_node" "system" "settings" "streamchat" null [] {}'.split(),
    *(b'"at"', b"\n", b"\\ud800", b"\\u0000", b"\xff\xfe", b"\xef\xbb\xbf"),
)
TARGET = Target(
    "transcripts",
    run,
    seeds,
    ("streamchat.sessions.transcripts", "streamchat.replay.script", "streamchat.base.text_files"),
    words=WORDS,
    suite_runs=300,
)
