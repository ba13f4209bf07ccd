"""The slash commands on an engine that never ran."""

from __future__ import annotations

from streamchat.config.settings import Settings
from streamchat.frontend.slash.commands import default_registry
from streamchat.frontend.slash.registry import SlashContext, SlashResult
from streamchat.frontend.status import StatusBoard
from tests.support.scripted_engine import ScriptedEngine


class Desk:
    """A registry with an engine that never ran."""

    def __init__(self, turns: int = 3) -> None:
        self.engine = ScriptedEngine(settings=Settings(system_prompt="Be kind."))
        self.board = StatusBoard(turns=turns)
        self.registry = default_registry()
        self.context = SlashContext(self.engine, self.board)

    def say(self, text: str) -> SlashResult:
        result = self.registry.run(self.context, text)
        assert result is not None
        return result

    def offered(self, text: str) -> list[str]:
        return [line for line, _ in self.registry.completions(self.context, text)]
