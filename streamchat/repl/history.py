"""The history of what was typed, for prompt-toolkit."""

from __future__ import annotations

from collections.abc import Iterable

from prompt_toolkit.history import History

from streamchat.frontend.typed_history import TypedHistory


class PromptToolkitHistory(History):
    """Reads from and writes to a `TypedHistory`."""

    def __init__(self, typed: TypedHistory) -> None:
        super().__init__()
        self._typed = typed

    def load_history_strings(self) -> Iterable[str]:
        """The entries, newest first."""
        return reversed(self._typed.entries)

    def store_string(self, string: str) -> None:
        """Append an entry."""
        self._typed.add(string)
