"""Copying text from a conversation."""

from __future__ import annotations

from streamchat.tui.widgets.reply import make_parser

SENT = "sent to the terminal's clipboard (OSC 52); or select it with Shift+drag"
"""Terminals do not confirm OSC 52, so this says 'sent', not 'copied'."""


def last_code(markdown: str) -> str:
    """The last code block of a reply; '' if it has none."""
    blocks = [token.content for token in make_parser().parse(markdown) if token.type in ("fence", "code_block")]
    return blocks[-1].rstrip("\n") if blocks else ""
