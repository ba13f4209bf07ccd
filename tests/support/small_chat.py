"""A short chat on a loaded model, for those who compare where it runs."""

from __future__ import annotations

import torch

from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import assemble
from streamchat.models.load import LoadedModel


def replies(loaded: LoadedModel) -> list[str]:
    """Three turns at temperature 0, more than the cache holds; the last one is taken back and asked again."""
    settings = Settings(temperature=0, cache_size=64, max_new_tokens=16)
    with torch.inference_mode():
        made = assemble(Configuration(settings, {"cache_size": "test"}), loaded, lambda _: None, lambda *_: None)
    chat = made.conversation
    turns = [chat.run_turn(f"message {i} of three", lambda: False).reply for i in range(3)]
    assert chat.cache.compression_count > 0
    assert chat.undo().restored > 0
    assert chat.run_turn("message 2 of three", lambda: False).reply == turns[-1]
    return turns
