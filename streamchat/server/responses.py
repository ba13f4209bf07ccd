"""The shapes of responses: one object, or a stream of events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from streamchat.base.thinking import Kind
from streamchat.server.calls import Began, Delta, Ended, News, Prompt, Usage
from streamchat.server.errors import ApiError

_ITEMS = {"answer": "message", "thought": "reasoning"}
_PREFIXES = {"answer": "msg", "thought": "rs"}


def usage_of(usage: Usage) -> dict[str, Any]:
    """Return the usage of a response."""
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.reply,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.reply,
    }


class Response:
    """Collects the news of a call into a response.

    Args:
        model: Name of the model.
        created: When the request came, in seconds since 1970.
        prompt: What the request asked.
    """

    def __init__(self, model: str, created: int, prompt: Prompt) -> None:
        self._model, self._created, self._prompt = model, created, prompt
        self._id = ""
        self._items: list[tuple[Kind, str]] = []
        """Kind and text of the output items; the last one may grow."""
        self._ended: Ended | None = None
        self._number = -1

    def add(self, news: News) -> Iterator[bytes]:
        """Add news; yield the events of a stream that report it."""
        match news:
            case Began(id=id_):
                self._id = id_
                yield self._event("response.created", response=self._response("in_progress"))
                yield self._event("response.in_progress", response=self._response("in_progress"))
            case Delta(kind=kind, text=text):
                if not self._items or self._items[-1][0] != kind:
                    yield from self._close_item()
                    yield from self._open_item(kind)
                self._items[-1] = kind, self._items[-1][1] + text
                more: dict[str, Any] = {"logprobs": []} if kind == "answer" else {}
                yield self._event(f"response.{_text_type(kind)}.delta", **self._part_place(), delta=text, **more)
            case Ended():
                self._ended = news
                if not self._items:
                    yield from self._open_item("answer")
                yield from self._close_item()
                yield self._event(f"response.{self._status}", response=self.as_dict())
            case ApiError():
                if self._id:
                    error = {"code": "server_error", "message": news.message}
                    yield self._event("response.failed", response=self._response("failed") | {"error": error})
                else:
                    yield self._event("error", code=news.code, message=news.message, param=news.param)

    def as_dict(self) -> dict[str, Any]:
        """Return the whole response, after its end."""
        assert self._ended is not None
        if not self._items:
            self._items.append(("answer", ""))
        done = self._response(self._status)
        done["output"] = [self._item(index, "completed") for index in range(len(self._items))]
        done["usage"] = usage_of(self._ended.usage)
        if self._status == "incomplete":
            done["incomplete_details"] = {"reason": "max_output_tokens"}
        return done

    @property
    def _status(self) -> str:
        assert self._ended is not None
        return "completed" if self._ended.finish == "stop" else "incomplete"

    def _response(self, status: str) -> dict[str, Any]:
        prompt = self._prompt
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": prompt.system,
            "max_output_tokens": prompt.settings.get("max_new_tokens"),
            "metadata": {},
            "model": self._model,
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": prompt.previous or None,
            "store": prompt.keep if self._ended is None else self._ended.saved,
            "temperature": prompt.settings.get("temperature"),
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": prompt.settings.get("top_p"),
            "truncation": "auto",
            "usage": None,
        }

    def _item(self, index: int, status: str) -> dict[str, Any]:
        kind, text = self._items[index]
        item: dict[str, Any] = {"id": self._item_id(index), "type": _ITEMS[kind], "status": status}
        parts = [_part(kind, text)] if status == "completed" else []
        if kind == "thought":
            return item | {"summary": [], "content": parts}
        return item | {"role": "assistant", "content": parts}

    def _item_id(self, index: int) -> str:
        return f"{_PREFIXES[self._items[index][0]]}_{self._id}_{index}"

    def _open_item(self, kind: Kind) -> Iterator[bytes]:
        self._items.append((kind, ""))
        index = len(self._items) - 1
        yield self._event("response.output_item.added", output_index=index, item=self._item(index, "in_progress"))
        yield self._event("response.content_part.added", **self._part_place(), part=_part(kind, ""))

    def _close_item(self) -> Iterator[bytes]:
        if not self._items:
            return
        index = len(self._items) - 1
        kind, text = self._items[-1]
        more: dict[str, Any] = {"logprobs": []} if kind == "answer" else {}
        yield self._event(f"response.{_text_type(kind)}.done", **self._part_place(), text=text, **more)
        yield self._event("response.content_part.done", **self._part_place(), part=_part(kind, text))
        yield self._event("response.output_item.done", output_index=index, item=self._item(index, "completed"))

    def _part_place(self) -> dict[str, Any]:
        index = len(self._items) - 1
        return {"item_id": self._item_id(index), "output_index": index, "content_index": 0}

    def _event(self, kind: str, **more: Any) -> bytes:
        self._number += 1
        data = {"type": kind, "sequence_number": self._number} | more
        return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def _text_type(kind: Kind) -> str:
    return "output_text" if kind == "answer" else "reasoning_text"


def _part(kind: Kind, text: str) -> dict[str, Any]:
    part: dict[str, Any] = {"type": _text_type(kind), "text": text}
    return part | {"annotations": [], "logprobs": []} if kind == "answer" else part
