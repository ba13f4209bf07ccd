"""The line of key hints at the bottom."""

from __future__ import annotations

from textual.widgets import Footer


class KeyHints(Footer):
    """Textual's footer, without keeping the widgets of earlier hints.

    The footer creates new widgets whenever a key becomes available or not, several times per turn. Each of them watches
    a property of the footer, and Textual drops the watchers of removed widgets only when that property is set: each
    turn would keep 230 kB.
    """

    async def recompose(self) -> None:
        """Show the hints that are valid now."""
        await super().recompose()
        self.mutate_reactive(Footer.compact)
