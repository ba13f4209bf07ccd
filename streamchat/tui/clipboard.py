"""What can be copied out of a conversation."""

from __future__ import annotations

from streamchat.tui.widgets.reply import make_parser

SENT = "sent to the terminal's clipboard (OSC 52); Shift+drag selects by hand"
"""Honest: no terminal says whether it took it."""


def last_code(markdown: str) -> str:
    """The last code block of a reply; '' without one."""
    blocks = [token.content for token in make_parser().parse(markdown) if token.type in ("fence", "code_block")]
    return blocks[-1].rstrip("\n") if blocks else ""
