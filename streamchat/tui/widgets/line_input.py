"""The line in which search words and values of settings are typed."""

from __future__ import annotations

from textual.widgets import Input

from streamchat.base.sanitize import printable


class LineInput(Input):
    """An `Input` without control characters: Textual writes what is pasted or set to the terminal as it is."""

    def validate_value(self, value: str) -> str:
        """Return the value as it may be shown; a line break or a tab is a space."""
        return printable(value).replace("\n", " ").replace("\t", " ")
