"""The line of key hints at the bottom."""

from __future__ import annotations

from typing import Any

from textual.widgets import Footer


class KeyHints(Footer):
    """Textual's footer, which creates new widgets only if a hint differs, and does not keep those of earlier hints.

    The footer creates new widgets whenever a key may have become available or not, many times per turn. Each of them
    watches a property of the footer, and Textual drops the watchers of removed widgets only when that property is set:
    each turn would keep 230 kB.
    """

    _shown: list[Any] | None = None

    async def recompose(self) -> None:
        """Show the hints that are valid now."""
        valid = self._valid() if self.is_attached else None
        if valid is not None and valid == self._shown:
            return
        self._shown = valid
        await super().recompose()
        self.mutate_reactive(Footer.compact)

    def _valid(self) -> list[Any]:
        """Return all that the hints show."""
        return [
            (each.binding, self.app.get_key_display(each.binding), each.enabled, each.tooltip)
            for each in self.screen.active_bindings.values()
            if each.binding.show or each.binding.action == "command_palette"
        ]
