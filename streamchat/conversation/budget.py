"""The size of the cache for a model: from the settings, against what the model can address."""

from __future__ import annotations

from streamchat.base.errors import ConfigError
from streamchat.config.loader import SESSION_ORIGIN, Configuration


def resolve_cache_size(configuration: Configuration, context: int | None) -> tuple[int, str | None]:
    """The budget in tokens, and a sentence if it is smaller than the default, or than what a saved conversation had.

    Args:
        configuration: Settings and where they came from.
        context: `context_length` of the model.

    Raises:
        ConfigError: The budget is above what the model can address, or smaller than the sinks.
    """
    settings = configuration.settings
    sinks = settings.num_sink_tokens
    if settings.compression_ratio > 0:
        place = configuration.origin("compression_ratio")
        if context is None:
            raise ConfigError(
                f"{place}: compression_ratio needs a model with a known context length, and this one has none; give "
                "cache_size instead"
            )
        size = max(sinks + 10, int(context * (1 - settings.compression_ratio)))
        if size > context:
            raise ConfigError(
                f"{configuration.origin('num_sink_tokens')}: num_sink_tokens = {sinks} is too many for this model; it "
                f"addresses {context} tokens, so it must be from 0 to {context - 10}"
            )
        return size, None
    size = settings.cache_size
    if context is not None and size > context:
        if configuration.is_explicit("cache_size") and not configuration.origin("cache_size").startswith(
            SESSION_ORIGIN
        ):
            raise ConfigError(
                f"{configuration.origin('cache_size')}: cache_size = {size} is above the {context} tokens that this "
                f"model can address; it must be from {max(16, sinks + 1)} to {context}"
            )
        if sinks >= context:
            raise ConfigError(
                f"{configuration.origin('num_sink_tokens')}: num_sink_tokens = {sinks} does not fit into the {context} "
                f"tokens that this model can address; it must be from 0 to {context - 1}"
            )
        return context, f"The cache is {context} tokens, all that this model can address, instead of {size}."
    return size, None
