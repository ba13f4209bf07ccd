"""What the app and the parts of its chat screen share."""

from __future__ import annotations

from streamchat.base.requests import Submit
from streamchat.config.loader import Configuration
from streamchat.engine.protocol import ChatEngine
from streamchat.frontend.model_list import find_models
from streamchat.frontend.model_switch import ModelSwitch
from streamchat.frontend.outbox import Outbox
from streamchat.frontend.settings_table import SettingsTable
from streamchat.frontend.slash.commands import default_registry
from streamchat.frontend.slash.registry import SlashContext
from streamchat.frontend.status import StatusBoard
from streamchat.tui.history import PromptHistory


class ChatState:
    """One chat: its engine, figures, messages and commands.

    Args:
        watching: Another component sends the messages; the user only reads.
    """

    def __init__(self, engine: ChatEngine, configuration: Configuration, *, watching: bool = False) -> None:
        self.engine, self.configuration, self.watching = engine, configuration, watching
        self.board = StatusBoard()
        self.context = SlashContext(engine, self.board)
        self.outbox = Outbox(lambda text: engine.send(Submit(text)))
        self.switch = ModelSwitch(engine.send)
        self.find_models = find_models
        """Lists the models to choose from; replaceable for tests."""
        self.registry = default_registry()
        self.settings = SettingsTable(engine, configuration)
        self.history = PromptHistory.open(configuration.settings.history)
