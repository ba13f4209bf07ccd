"""The slash command `/model`: show the model, or load another one."""

from __future__ import annotations

from streamchat.base.errors import ConfigError
from streamchat.base.requests import SwitchModel
from streamchat.frontend import file_access
from streamchat.frontend.model_list import find_models, models_text
from streamchat.frontend.model_names import complete_model
from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashResult


def _model(context: SlashContext, argument: str) -> SlashResult:
    if argument:
        require_allowed(context, argument)
        context.engine.send(SwitchModel(argument))
        return SlashResult()
    info = context.board.info
    if info is None:
        return SlashResult(f"{context.engine.settings.model} is loading")
    if context.engine.server:
        return SlashResult(f"{info.name} ({info.precision} on {info.device}), on {context.engine.server}")
    now = f"{info.name} ({info.precision} on {info.device}), from {info.source}"
    return SlashResult(f"{now}\n\n{models_text(find_models(info))}\n\n/model NAME loads one and starts over.")


def require_allowed(context: SlashContext, argument: str) -> None:
    """Refuse any model on a server, and local model paths, except the configured one, if file access is refused.

    Raises:
        ConfigError: The model is refused.
    """
    if context.engine.server:
        raise ConfigError(
            f"/model is off: the model belongs to the server {context.engine.server}; to change it, start "
            f"`streamchat serve` with --model {argument}"
        )
    from streamchat.models.resolve import is_local

    if argument != context.engine.settings.model and not file_access.allowed() and is_local(argument):
        file_access.require("/model with a folder or a file")


MODEL = SlashCommand(
    "model",
    "[NAME]",
    "list the models, or load one and start over with it",
    _model,
    complete=lambda context, argument: complete_model(argument),
    starts_over=bool,
)
