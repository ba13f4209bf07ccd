"""`streamchat acp` in a process of its own, driven by the client of the official SDK."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from streamchat.base.errors import ExitCode
from streamchat.cli import main as cli
from streamchat.commands import acp as command
from streamchat.store.store import Store

acp = pytest.importorskip("acp", reason="needs the extra streamchat[acp]")

from streamchat.acp.lines import pass_on  # noqa: E402 - after the skip

FACE = str(Path(__file__).parents[1] / "support" / "acp_face.py")
FLAGS = ("--cache-size", "96", "--max-new-tokens", "24", "--seed", "1")


class Editor:
    """A client that keeps the updates it gets."""

    def __init__(self) -> None:
        self.updates: list[tuple[str, Any]] = []
        self.news = asyncio.Event()
        self.conn: Any = None

    def on_connect(self, conn: Any) -> None:
        """Nothing to prepare."""

    async def session_update(self, session_id: str, update: Any, **_: Any) -> None:
        self.updates.append((session_id, update))
        self.news.set()

    def of(self, kind: str) -> list[Any]:
        return [update for _, update in self.updates if update.session_update == kind]

    def text(self, kind: str = "agent_message_chunk") -> str:
        return "".join(update.content.text for update in self.of(kind))

    async def until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            self.news.clear()
            await asyncio.wait_for(self.news.wait(), 60)


@asynccontextmanager
async def editing(*flags: str, **environ: str) -> AsyncIterator[Editor]:
    """An editor that has started the agent; at the end the agent ends by itself, without an error."""
    editor = Editor()
    env = {**os.environ, **environ}
    async with acp.spawn_agent_process(editor, sys.executable, FACE, *FLAGS, *flags, env=env) as (conn, process):
        editor.conn = conn
        answer = await conn.initialize(protocol_version=acp.PROTOCOL_VERSION)
        assert (answer.protocol_version, answer.agent_info.name) == (acp.PROTOCOL_VERSION, "streamchat")
        assert answer.agent_capabilities.load_session
        yield editor
        process.stdin.close()
        assert await asyncio.wait_for(process.wait(), 60) == 0


def block(text: str) -> Any:
    return acp.text_block(text)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_kernels")
async def test_prompts_stream_and_a_session_is_loaded_elsewhere(tmp_path: Path) -> None:
    async with editing() as editor:
        conn = editor.conn
        session = (await conn.new_session(cwd=str(tmp_path), mcp_servers=[])).session_id
        unused = (await conn.new_session(cwd=str(tmp_path), mcp_servers=[])).session_id
        answer = await conn.prompt(session_id=session, prompt=[block("Tell me about the sea.\nAll of it.")])
        assert answer.stop_reason in ("end_turn", "max_tokens")
        reply = editor.text()
        assert reply
        assert {each for each, _ in editor.updates} == {session}
        for number in range(5):
            linked = acp.resource_link_block("notes", f"file:///notes/{number}.md")
            file = acp.resource_block(acp.embedded_text_resource("file:///a/b.py", "x = 1\n"))
            await conn.prompt(session_id=session, prompt=[block("More"), linked, file])
        assert "no longer in context" in editor.text("agent_thought_chunk")
        usage = editor.of("usage_update")
        assert all(0 < update.used <= update.size == 96 for update in usage)
        other = (await conn.new_session(cwd=str(tmp_path), mcp_servers=[])).session_id
        await conn.prompt(session_id=other, prompt=[block("Another one")])
        await conn.prompt(session_id=session, prompt=[block("Back here")])
        with pytest.raises(acp.RequestError, match="no saved session has the id 'zzzzzz'"):
            await conn.load_session(cwd=str(tmp_path), session_id="zzzzzz", mcp_servers=[])
        with pytest.raises(acp.RequestError, match="the prompt has no text"):
            await conn.prompt(session_id=session, prompt=[block(" ")])
        with pytest.raises(acp.RequestError, match="content of type image cannot be sent"):
            await conn.prompt(session_id=session, prompt=[acp.image_block("aGk=", "image/png")])
    with Store() as store:
        assert {info.id: (info.title, info.turns) for info in store.sessions()} == {
            session: ("Tell me about the sea.", 7),
            other: ("Another one", 1),
        }
        turns = store.load(session).turns
    assert unused not in {session, other}
    assert turns[0].reply == reply
    assert turns[1].text == "More\n[notes](file:///notes/0.md)\nb.py:\n```py\nx = 1\n```\n"
    async with editing() as editor:
        await editor.conn.load_session(cwd=str(tmp_path), session_id=session, mcp_servers=[])
        assert editor.text("user_message_chunk") == "".join(turn.text for turn in turns)
        assert editor.text() == "".join(turn.reply for turn in turns)
        assert editor.of("usage_update")[-1].used > 0
        await editor.conn.prompt(session_id=session, prompt=[block("Go on")])
    with Store() as store:
        assert store.find(session).turns == 8


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_kernels")
async def test_a_reply_is_cancelled_and_the_session_continues(tmp_path: Path) -> None:
    async with editing("--max-new-tokens", "1000000", "--temperature", "0", ENDLESS="1") as editor:
        session = (await editor.conn.new_session(cwd=str(tmp_path), mcp_servers=[])).session_id
        for number in (1, 2):
            editor.updates.clear()
            prompt = asyncio.create_task(editor.conn.prompt(session_id=session, prompt=[block("Without end")]))
            await editor.until(lambda: len(editor.of("agent_message_chunk")) > 3)
            await editor.conn.cancel(session_id="another")
            await editor.conn.cancel(session_id=session)
            assert (await asyncio.wait_for(prompt, 60)).stop_reason == "cancelled"
            with Store() as store:
                assert store.find(session).turns == number


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_kernels")
async def test_a_prompt_that_waits_is_cancelled_and_the_one_before_it_continues(tmp_path: Path) -> None:
    async with editing("--max-new-tokens", "1000000", "--temperature", "0", ENDLESS="1") as editor:
        conn = editor.conn
        first, second = [(await conn.new_session(cwd=str(tmp_path), mcp_servers=[])).session_id for _ in range(2)]
        running = asyncio.create_task(conn.prompt(session_id=first, prompt=[block("Without end")]))
        await editor.until(lambda: len(editor.of("agent_message_chunk")) > 3)
        waiting = asyncio.create_task(conn.prompt(session_id=second, prompt=[block("Without end either")]))
        await asyncio.sleep(0.1)
        await conn.cancel(session_id=second)
        seen = len(editor.updates)
        await editor.until(lambda: len(editor.updates) > seen + 5)
        assert not running.done()
        await conn.cancel(session_id=first)
        assert (await asyncio.wait_for(running, 60)).stop_reason == "cancelled"
        assert (await asyncio.wait_for(waiting, 30)).stop_reason == "cancelled"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"[1]", -32600),
        (b"7", -32600),
        (b"null", -32600),
        (b'"text"', -32600),
        (b'[{"jsonrpc": "2.0", "id": 1, "method": "initialize"}]', -32600),
        (b'{"jsonrpc": "2.0", "id": [1], "method": "initialize"}', -32600),
        (b'{"jsonrpc": "2.0", "id": {}, "result": 1}', -32600),
        (b'{"jsonrpc": "2.0", "id": 5, "method": ["initialize"]}', -32600),
        (b'{"jsonrpc": "2.0", "id": 0, "error": [1]}', -32600),
        (b"{", -32700),
        (b"\xff", -32700),
        (b"[" * 50_000, -32700),
    ],
)
async def test_a_line_that_is_not_a_message_is_answered_with_an_error(line: bytes, code: int) -> None:
    lines, valid, answers = asyncio.StreamReader(), asyncio.StreamReader(), list[bytes]()
    hello = b'{"jsonrpc": "2.0", "id": 2, "method": "initialize", "params": {}}'
    lines.feed_data(line + b"\n\n" + hello)  # the last line has no end
    lines.feed_eof()
    await pass_on(lines, valid, answers.append)
    [answer] = map(json.loads, answers)
    assert answer["error"]["code"] == code
    assert (await valid.read()).strip() == hello


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_kernels")
async def test_lines_that_are_not_messages_do_not_end_the_agent(tmp_path: Path) -> None:
    editor = Editor()
    async with acp.spawn_agent_process(editor, sys.executable, FACE, *FLAGS, env=dict(os.environ)) as (conn, process):
        await conn.initialize(protocol_version=acp.PROTOCOL_VERSION)
        for line in (b"[1]", b"null", b'{"id": [1]}', b'{"jsonrpc": "2.0", "id": 9, "method": "no/such"}'):
            process.stdin.write(line + b"\n")
        session = await conn.new_session(cwd=str(tmp_path), mcp_servers=[])
        answer = await conn.prompt(session_id=session.session_id, prompt=[block("hello")])
        assert answer.stop_reason in ("end_turn", "max_tokens")
        process.stdin.close()
        assert await asyncio.wait_for(process.wait(), 60) == 0


async def test_a_model_that_is_missing_is_one_sentence(tmp_path: Path) -> None:
    editor = Editor()
    arguments = ("-m", "streamchat", "acp", "--model", "./missing.gguf")
    async with acp.spawn_agent_process(editor, sys.executable, *arguments, env=dict(os.environ)) as (conn, _):
        await conn.initialize(protocol_version=acp.PROTOCOL_VERSION)
        with pytest.raises(acp.RequestError, match=r"missing\.gguf"):
            await conn.new_session(cwd=str(tmp_path), mcp_servers=[])


def test_what_a_user_reads_who_starts_it_by_hand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert cli.main(["acp"]) == ExitCode.USAGE
    assert "speaks a protocol on stdin; let an editor start it" in capsys.readouterr().err
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert cli.main(["acp"]) == ExitCode.USAGE
    assert "pip install 'streamchat[acp]'" in capsys.readouterr().err
