"""Runs the agent on stdin and stdout, which carry nothing but the protocol."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO, cast

from acp import Agent, run_agent
from acp.core import DEFAULT_STDIO_BUFFER_LIMIT_BYTES
from acp.stdio import stdio_streams

from streamchat.acp.agent import StreamchatAgent
from streamchat.acp.lines import pass_on
from streamchat.config.loader import Configuration


def serve(configuration: Configuration) -> None:
    """Serve one client until it closes stdin."""
    with _private_stdout() as protocol:
        asyncio.run(_serve(configuration, protocol))


async def _serve(configuration: Configuration, protocol: TextIO) -> None:
    sys.stdout = protocol  # the SDK looks it up there
    reader, writer = await stdio_streams(limit=DEFAULT_STDIO_BUFFER_LIMIT_BYTES)
    if os.name == "posix":
        sys.stdout = sys.stderr
    valid = asyncio.StreamReader(limit=DEFAULT_STDIO_BUFFER_LIMIT_BYTES)
    passing = asyncio.create_task(pass_on(reader, valid, writer.write))
    agent = StreamchatAgent(configuration)
    try:
        await run_agent(cast(Agent, agent), writer, valid)
    finally:
        passing.cancel()
        await agent.close()


@contextmanager
def _private_stdout() -> Iterator[TextIO]:
    """Yield stdout for the protocol alone; what anything else prints goes to stderr."""
    before, private = sys.stdout, os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(private, "w", encoding="utf-8", closefd=False) as protocol:
            yield protocol
    finally:
        os.dup2(private, 1)
        os.close(private)
        sys.stdout = before
