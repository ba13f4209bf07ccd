"""The slash command `/read`: attach a text file to a message."""

from __future__ import annotations

from streamchat.base.formatting import human_bytes, plural
from streamchat.frontend import file_access, mentions
from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashResult


def _read(context: SlashContext, argument: str) -> SlashResult:
    file_access.require("/read")
    path, text = mentions.split_path(argument)
    if not path:
        return SlashResult("usage: /read FILE [TEXT]", error=True)
    mention = mentions.mention_of(path)
    content = mentions.read_file(path)
    if text:
        return SlashResult(message=f"{mention} {text}")
    lines = content.count("\n") + (not content.endswith("\n"))
    size = f"{plural(lines, 'line')}, {human_bytes(len(content.encode()))}"
    return SlashResult(f"{path} ({size}) will be attached to your next message", insert=f"{mention} ")


def _complete_read(context: SlashContext, argument: str) -> list[tuple[str, str]]:
    return [] if " " in argument else mentions.complete_path(argument)


READ = SlashCommand(
    "read",
    "FILE [TEXT]",
    "send a text file with a message, or insert @FILE into the input",
    _read,
    complete=_complete_read,
)
