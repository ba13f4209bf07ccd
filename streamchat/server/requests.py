"""Reads the bodies of `/v1/chat/completions` and `/v1/responses`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from streamchat.base.sanitize import encodable
from streamchat.config.settings import Settings
from streamchat.server.calls import Prompt
from streamchat.server.errors import ApiError, wrong_value
from streamchat.server.fields import Fields, shown, system_of
from streamchat.server.messages import Messages, read_messages

_NEUTRAL: dict[str, Collection[Any]] = {
    "metadata": ({},),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "service_tier": ("auto", "default"),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "top_logprobs": (0,),
}
_CHAT_NEUTRAL: dict[str, Collection[Any]] = {
    **_NEUTRAL,
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
}
_CHAT_UNSERVED = frozenset(
    {
        *("audio", "function_call", "functions", "prediction", "prompt_cache_retention", "reasoning_effort"),
        *("verbosity", "web_search_options"),
    }
)
_RESPONSES_NEUTRAL: dict[str, Collection[Any]] = {
    **_NEUTRAL,
    "background": (False,),
    "include": ([],),
    "reasoning": ({},),
    "stream_options": ({}, {"include_obfuscation": False}),
    "text": ({}, {"format": {"type": "text"}}),
    "truncation": ("auto",),
}
_RESPONSES_UNSERVED = frozenset(
    {"context_management", "conversation", "max_tool_calls", "prompt", "prompt_cache_retention"}
)


@dataclass(frozen=True)
class Request:
    """A checked request."""

    prompt: Prompt
    stream: bool = False
    include_usage: bool = False
    """Whether a stream of a chat completion ends with its usage."""


@dataclass(frozen=True)
class Served:
    """What requests may ask for.

    Args:
        models: The names of the loaded model; the first one is listed.
        settings: The settings of the server.
        max_messages: Maximum number of messages of a request.
    """

    models: tuple[str, ...]
    settings: Settings
    max_messages: int


def read_completion(body: Mapping[str, Any], served: Served) -> Request:
    """Return the request of a body of `/v1/chat/completions`.

    Raises:
        ApiError: A field is missing, wrong, unknown, or not served.
    """
    fields = Fields(body, _CHAT_NEUTRAL, _CHAT_UNSERVED)
    _check_model(fields.require("model", str), served)
    read = read_messages(fields.require("messages", list), "messages", served.max_messages)
    keep = fields.take("store", bool)
    stream = fields.take("stream", bool) or False
    options = fields.take("stream_options", dict) or {}
    settings, stop, scope = fields.settings("max_completion_tokens", "max_tokens"), fields.stops(), fields.scope()
    fields.finish()
    include_usage = _include_usage(options, stream)
    prompt = Prompt(
        read.message,
        tuple(read.history),
        system_of(read.system, served.settings),
        bool(read.system),
        scope=scope,
        settings=settings,
        stop=stop,
        keep=keep is not False,
    )
    return Request(prompt, stream, include_usage)


def read_response(body: Mapping[str, Any], served: Served) -> Request:
    """Return the request of a body of `/v1/responses`.

    Raises:
        ApiError: A field is missing, wrong, unknown, or not served.
    """
    fields = Fields(body, _RESPONSES_NEUTRAL, _RESPONSES_UNSERVED)
    _check_model(fields.require("model", str), served)
    given: Any = fields.require("input", object)
    if isinstance(given, str):
        read = Messages(message=encodable(given))
    elif isinstance(given, list):
        read = read_messages(given, "input", served.max_messages)
    else:
        raise wrong_value("input", f"input must be a text or a list of messages, not {shown(given)}")
    instructions = fields.take("instructions", str)
    previous = fields.take("previous_response_id", str) or ""
    if previous and read.system:
        raise wrong_value("input", "a system message cannot follow previous_response_id; leave it out")
    keep = fields.take("store", bool)
    stream = fields.take("stream", bool) or False
    settings, stop, scope = fields.settings("max_output_tokens"), fields.stops(), fields.scope()
    fields.finish()
    system = [encodable(instructions), *read.system] if instructions is not None else read.system
    prompt = Prompt(
        read.message,
        tuple(read.history),
        system_of(system, served.settings),
        bool(system),
        previous=previous,
        scope=scope,
        settings=settings,
        stop=stop,
        keep=keep is not False,
        is_response=True,
    )
    return Request(prompt, stream)


def _check_model(name: str, served: Served) -> None:
    if name not in served.models:
        raise ApiError(
            404, f"the model {shown(name)} is not served here; use {served.models[0]}", "model", "model_not_found"
        )


def _include_usage(options: Mapping[str, Any], stream: bool) -> bool:
    if options and not stream:
        raise wrong_value("stream_options", "stream_options needs stream = true")
    for name, value in options.items():
        if name != "include_usage" and not (name == "include_obfuscation" and value is False):
            param = f"stream_options.{name[:80]}"
            raise ApiError(400, f"{param} is not served; leave it out", param, "unsupported_parameter")
    include = options.get("include_usage", False)
    if not isinstance(include, bool):
        raise wrong_value(
            "stream_options.include_usage", f"stream_options.include_usage must be true or false, not {shown(include)}"
        )
    return include
