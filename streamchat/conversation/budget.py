"""Resolves the cache budget from the settings and the model's context length."""

from __future__ import annotations

from streamchat.base.errors import ConfigError
from streamchat.cache.room import budget_from_ratio
from streamchat.config.loader import SESSION_ORIGIN, Configuration


def resolve_cache_size(configuration: Configuration, context: int | None) -> tuple[int, str | None]:
    """Return the cache budget in tokens, and a notice if the model's context is smaller than the setting.

    Args:
        configuration: Settings and their origins.
        context: `context_length` of the model.

    Raises:
        ConfigError: The budget exceeds the model's context length, or is smaller than the sinks.
    """
    settings = configuration.settings
    sinks = settings.num_sink_tokens
    if settings.compression_ratio > 0:
        place = configuration.origin("compression_ratio")
        if context is None:
            raise ConfigError(
                f"{place}: compression_ratio needs a model with a known context length, and this one has none; set "
                "cache_size instead"
            )
        size = budget_from_ratio(context, settings.compression_ratio, sinks)
        if size > context:
            raise ConfigError(
                f"{configuration.origin('num_sink_tokens')}: num_sink_tokens = {sinks} is too large for this model's "
                f"context length of {context} tokens; it must be from 0 to {context - 10}"
            )
        return size, None
    size = settings.cache_size
    if context is not None and size > context:
        if configuration.is_explicit("cache_size") and not configuration.origin("cache_size").startswith(
            SESSION_ORIGIN
        ):
            raise ConfigError(
                f"{configuration.origin('cache_size')}: cache_size = {size} exceeds this model's context length of "
                f"{context} tokens; it must be from {max(16, sinks + 1)} to {context}"
            )
        if sinks >= context:
            raise ConfigError(
                f"{configuration.origin('num_sink_tokens')}: num_sink_tokens = {sinks} does not fit into this model's "
                f"context length of {context} tokens; it must be from 0 to {context - 1}"
            )
        return context, f"cache_size was lowered from {size} to {context} tokens, this model's context length."
    return size, None
