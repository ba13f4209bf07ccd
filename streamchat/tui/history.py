"""Input history for the arrow keys of the app."""

from __future__ import annotations

from streamchat.frontend.typed_history import TypedHistory


class PromptHistory(TypedHistory):
    """`TypedHistory` with a cursor, which starts after the newest entry."""

    _index: int | None = None
    """Position of the cursor; None at the end."""
    _draft = ""

    def add(self, text: str) -> None:
        """Append `text` and move to the end."""
        super().add(text)
        self._index, self._draft = None, ""

    def older(self, current: str) -> str | None:
        """Move to the previous entry; None at the oldest. At the end, `current` (the input) is saved as the draft."""
        at = len(self.entries) if self._index is None else self._index
        if at == 0:
            return None
        if self._index is None:
            self._draft = current
        self._index = at - 1
        return self.entries[self._index]

    def newer(self) -> str | None:
        """Move to the next entry, finally to the draft; None at the draft."""
        if self._index is None:
            return None
        self._index = self._index + 1 if self._index + 1 < len(self.entries) else None
        return self._draft if self._index is None else self.entries[self._index]
