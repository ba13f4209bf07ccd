"""The identity of the loaded model, which saved ids and caches belong to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamchat.sessions.settings import portable_model_name

if TYPE_CHECKING:  # torch is imported on the engine's thread only
    from streamchat.conversation.assemble import StartedConversation
    from streamchat.store.records import ModelIdentity


class Identities:
    """Computes the identity of a model, which takes about 50 ms, once per model and format. Archives may share one."""

    def __init__(self) -> None:
        self._known: tuple[Any, tuple[object, ...], ModelIdentity] | None = None

    def of(self, active: StartedConversation) -> ModelIdentity:
        """Return the identity of the model of a conversation."""
        from streamchat.models.fingerprint import model_fingerprint, tokenizer_fingerprint
        from streamchat.store.records import ModelIdentity

        conversation = active.conversation
        parts = conversation.encoder.format.identity
        if self._known is None or self._known[:2] != (conversation.model, parts):
            self._known = None  # release the old model
            identity = ModelIdentity(
                portable_model_name(conversation.settings.model),
                active.info.name,
                active.info.precision,
                model_fingerprint(conversation.model),
                tokenizer_fingerprint(conversation.tokenizer, parts),
                active.info.compute_precision,
            )
            self._known = (conversation.model, parts, identity)
        return self._known[2]

    def release_model(self) -> None:
        """Drop the reference to the model after another one was loaded."""
        self._known = None
