"""Builds a `Conversation` from settings: loads the model, checks its positions, chooses the chat format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError
from streamchat.base.progress import Progress
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.config.template_args import from_text, shown, to_text

if TYPE_CHECKING:  # torch is imported on the engine's thread only
    from streamchat.conversation.conversation import Conversation
    from streamchat.conversation.template.chat_format import ChatFormat
    from streamchat.models.load import LoadedModel

Load = Callable[[Configuration, Progress], "LoadedModel"]


@dataclass(frozen=True)
class StartedConversation:
    """A conversation and its model."""

    conversation: Conversation
    info: ev.ModelInfo
    notes: tuple[str, ...]
    """Notices for the user, one sentence each."""


def load_from_settings(configuration: Configuration, progress: Progress) -> LoadedModel:
    """Load the model that the settings name."""
    from streamchat.models import load

    return load.load_from_settings(configuration.settings, progress)


def assemble(
    configuration: Configuration, loaded: LoadedModel, emit: Callable[[ev.Event], None], progress: Progress
) -> StartedConversation:
    """Return a conversation on `loaded`, with its system block prefilled.

    Raises:
        StreamchatError: The model is not supported, or the settings do not fit it.
    """
    from streamchat.cache.context import context_length
    from streamchat.conversation.budget import resolve_cache_size
    from streamchat.conversation.conversation import Conversation
    from streamchat.models.checked_fit import choose_checked_fit
    from streamchat.models.quantize.weight_storage import stored_bytes

    settings = configuration.settings
    context = context_length(loaded.model.config)
    cache_size, note = resolve_cache_size(configuration, context)
    chat_format = format_from_settings(loaded.tokenizer, settings)
    progress("Checking positions")
    fit = choose_checked_fit(loaded.model)
    conversation = Conversation(loaded.model, loaded.tokenizer, fit, chat_format, settings, cache_size, emit)
    info = ev.ModelInfo(
        name=loaded.name,
        source=loaded.source,
        device=loaded.device,
        dtype=loaded.dtype,
        parameters=sum(p.numel() for p in loaded.model.parameters()),
        weights=loaded.weights,
        cache_dtype=loaded.cache_dtype,
        decode_step=loaded.step.name if loaded.step is not None else "",
        decode_reason=loaded.step.reason if loaded.step is not None else "",
        weight_bytes=stored_bytes(loaded.model) + loaded.quantized_bytes,
        context_length=context or 0,
        cache_size=cache_size,
        num_sink_tokens=settings.num_sink_tokens,
        pinned_tokens=conversation.state().pinned,
        attention=str(loaded.model.config._attn_implementation),
        chat_format=chat_format.name,
        template_prompt=_template_prompt(loaded.tokenizer, settings, None if settings.system_prompt else chat_format),
        template_reads=chat_format.takes.names,
        template_defaults=to_text(chat_format.takes.defaults),
        thinks=chat_format.takes.thinks,
    )
    notes = [*loaded.notes, *([note] if note else []), *chat_format.notes]
    if fit.method == "recompute":
        notes.append(
            "This model's positions cannot be moved: when the cache is full, its newer half is prefilled again."
        )
    return StartedConversation(conversation, info, tuple(notes))


def format_from_settings(tokenizer: Any, settings: Settings, moment: datetime | None = None) -> ChatFormat:
    """Return the format of turns that the settings ask for.

    Args:
        tokenizer: The model's tokenizer.
        settings: The settings; the catalogue adds the template arguments of their model.
        moment: The time that the template's clock shows; now by default.

    Raises:
        ConfigError: 'template' was requested and the model has no usable template.
    """
    from streamchat.conversation.template.format import choose_format
    from streamchat.models.catalogue import template_args_of

    given, defaults = from_text(settings.template_args), template_args_of(settings.model)
    return choose_format(tokenizer, settings.chat_format, settings.system_prompt, given, defaults, moment)


def format_with_arguments(tokenizer: Any, settings: Settings, before: ChatFormat) -> ChatFormat:
    """Return the format of later turns with the template arguments of `settings`.

    Args:
        tokenizer: The model's tokenizer.
        settings: The settings.
        before: The format of the conversation; one without the template stays without it.

    Raises:
        ConfigError: The template cannot be used with these arguments.
    """
    from streamchat.conversation.template.format import checked_template_format
    from streamchat.conversation.template.rendering import UnusableTemplateError
    from streamchat.models.catalogue import template_args_of

    if before.name != "template":
        return format_from_settings(tokenizer, replace(settings, chat_format="plain"), before.moment)
    given, defaults = from_text(settings.template_args), template_args_of(settings.model)
    try:
        return checked_template_format(tokenizer, settings.system_prompt, before.moment, given, defaults)
    except UnusableTemplateError as error:
        raise ConfigError(
            f"the model's chat template cannot be used with {_short(shown(given)) or 'no arguments'}: {error}; the "
            "arguments stay as they were"
        ) from None


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"


def _template_prompt(tokenizer: Any, settings: Settings, known: ChatFormat | None = None) -> str:
    """Return the system block that the template writes without a system prompt; '' if it is only a control token.

    Args:
        tokenizer: The model's tokenizer.
        settings: The settings.
        known: The format without a system prompt, if it is known.
    """
    block = (known or format_from_settings(tokenizer, replace(settings, system_prompt=""))).system_block.strip()
    return "" if block in getattr(tokenizer, "all_special_tokens", ()) else block
