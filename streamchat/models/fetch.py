"""Fetches the model that a name means, without loading it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamchat.base.progress import Progress

if TYPE_CHECKING:  # imported when it is needed: the app imports this module at its start
    from streamchat.models.resolve import Source


def must_be_fetched(name: str) -> bool:
    """Return whether loading `name` would fetch something. Uses no network.

    Raises:
        ModelNotFoundError: `name` is not a valid name.
    """
    from streamchat.models.resolve import resolve

    return not resolve(name).available


def fetch_model(name: str, progress: Progress) -> None:
    """Fetch the model that `name` means, unless it is on this machine.

    Args:
        name: As for `load_model`.
        progress: Called with bytes; may raise to cancel.

    Raises:
        ModelNotFoundError, UnsupportedModelError: It does not exist, cannot be fetched, or is of another kind.
    """
    from streamchat.models.resolve import resolve

    source = resolve(name)
    if not source.available:
        fetch_source(source, name, progress)


def fetch_source(source: Source, asked: str, progress: Progress) -> Source:
    """Return the local source of `source`; fetch it if needed. Arguments and errors are those of `fetch_model`."""
    if source.kind == "bundled":
        from streamchat.models.bundled.default import ensure_default_model

        ensure_default_model(progress)
    elif source.kind == "hub":
        from streamchat.models.hub import fetch_from_hub

        return fetch_from_hub(source, asked, progress=progress)
    return source
