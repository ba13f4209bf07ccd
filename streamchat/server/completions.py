"""The shapes of chat completions: one object, or a stream of chunks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from streamchat.server.calls import Began, Delta, Ended, News, Usage
from streamchat.server.errors import ApiError

_REASONS = {"stop": "stop", "length": "length", "loop": "length", "cancelled": "length"}
DONE = b"data: [DONE]\n\n"


def usage_of(usage: Usage) -> dict[str, Any]:
    """Return the usage of a chat completion."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.reply,
        "total_tokens": usage.prompt + usage.reply,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


class Completion:
    """Collects the news of a call into a chat completion.

    Args:
        model: Name of the model.
        created: When the request came, in seconds since 1970.
        include_usage: Whether a stream ends with the usage.
    """

    def __init__(self, model: str, created: int, include_usage: bool = False) -> None:
        self._model, self._created, self._include_usage = model, created, include_usage
        self._id = ""
        self._texts = {"answer": "", "thought": ""}
        self._ended: Ended | None = None

    def add(self, news: News) -> Iterator[bytes]:
        """Add news; yield the events of a stream that report it."""
        match news:
            case Began(id=id_):
                self._id = f"chatcmpl-{id_}"
                yield self._chunk({"role": "assistant", "content": ""})
            case Delta(kind=kind, text=text):
                self._texts[kind] += text
                yield self._chunk({"content" if kind == "answer" else "reasoning_content": text})
            case Ended():
                self._ended = news
                yield self._chunk({}, _REASONS[news.finish], store=news.saved)
                if self._include_usage:
                    yield _event(self._head("chat.completion.chunk") | {"choices": [], "usage": usage_of(news.usage)})
                yield DONE
            case ApiError():
                yield _event(news.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Return the whole completion, after its end."""
        assert self._ended is not None
        message: dict[str, Any] = {"role": "assistant", "content": self._texts["answer"], "refusal": None}
        if self._texts["thought"]:
            message["reasoning_content"] = self._texts["thought"]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _REASONS[self._ended.finish]}
        more = {"usage": usage_of(self._ended.usage), "store": self._ended.saved}
        return self._head("chat.completion") | {"choices": [choice]} | more

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        if self._include_usage:
            more["usage"] = None
        return _event(self._head("chat.completion.chunk") | {"choices": [choice]} | more)


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
