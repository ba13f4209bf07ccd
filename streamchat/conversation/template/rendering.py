"""Renders chat templates; no other module does."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from streamchat.conversation.template.bounded import LimitError, run_bounded

Message = dict[str, str]
MOST_CHARACTERS, MOST_TIMES = 1_000_000, 20
"""A template may add this much text by itself, and repeat its messages so often."""
_BEYOND = "_streamchat_template_beyond_limit"
_CLOCK = "strftime_now"
# The library removes functions from a template's variables, so the clock is replaced inside the template: its answers
# for every text in the template that has a percent sign.
_FIXED_CLOCK = (
    "{% macro strftime_now(format) -%}"
    "{{ streamchat_moment[format] if format in streamchat_moment else format }}"
    "{%- endmacro %}"
)
_LITERAL = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")


class UnusableTemplateError(Exception):
    """The template raises, or does not write texts as they are and in their order."""


class Renderer:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: Has `apply_chat_template`.
        moment: What the template's clock shows.
    """

    def __init__(self, tokenizer: Any, moment: datetime) -> None:
        self._tokenizer = tokenizer
        try:
            self.source = str(tokenizer.get_chat_template())
        except Exception as error:  # several templates, and none of them is the default
            raise UnusableTemplateError(_first_line(error)) from None
        self.has_clock = _CLOCK in self.source
        self._options: dict[str, Any] = {}
        if self.has_clock:
            # a newline behind a block is not written
            newline = "\n" if self.source.startswith("\n") else ""
            self._options["chat_template"] = _FIXED_CLOCK + newline + self.source
            self._options["streamchat_moment"] = _answers(self.source, moment)

    def __call__(self, messages: Sequence[Message], *, generation: bool = False) -> str:
        """Return the text of a conversation.

        Args:
            messages: With `role` and `content`.
            generation: Open the next reply at the end.

        Raises:
            UnusableTemplateError: The template raises.
        """
        return render(self._tokenizer, messages, add_generation_prompt=generation, **self._options)


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """Return what the tokenizer's chat template makes of `messages`, within limits of time, memory and length.

    Raises:
        UnusableTemplateError: It raises, or goes beyond a limit; it is not rendered again then.
    """
    reason = getattr(tokenizer, _BEYOND, "")
    if reason:
        raise UnusableTemplateError(reason)
    try:
        text = str(run_bounded(lambda: tokenizer.apply_chat_template(list(messages), tokenize=False, **options)))
    except LimitError as error:
        reason = str(error)
    except Exception as error:  # a template may raise anything
        raise UnusableTemplateError(f"it raises: {_first_line(error)}") from None
    else:
        longest = MOST_CHARACTERS + MOST_TIMES * sum(len(str(message)) for message in messages)
        if len(text) <= longest:
            return text
        reason = f"it makes {len(text):,} characters of {len(messages)} messages"
    setattr(tokenizer, _BEYOND, reason)
    raise UnusableTemplateError(reason)


def system(text: str) -> Message:
    """A system message."""
    return {"role": "system", "content": text}


def user(text: str) -> Message:
    """A user message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """A reply."""
    return {"role": "assistant", "content": text}


MARK = re.compile(r"q[0-9a-f]{12,}q")
"""What a mark looks like."""


@dataclass(frozen=True)
class Marks:
    """Texts that stand for the system prompt, messages and replies while a template is measured.

    They are made at random, so nobody can write one by chance or on purpose. They begin and end with a letter, so
    trimming does not change them.
    """

    system: str
    users: tuple[str, ...]
    replies: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """Each of them."""
        return (self.system, *self.users, *self.replies)


def new_marks(length: int) -> Marks:
    """Return marks of `2 * length + 2` letters and digits for conversations of four turns."""

    def mark() -> str:
        return f"q{secrets.token_hex(length)}q"

    return Marks(mark(), tuple(mark() for _ in range(4)), tuple(mark() for _ in range(4)))


def _answers(source: str, moment: datetime) -> dict[str, str]:
    formats = {first or second for first, second in _LITERAL.findall(source)}
    return {text: moment.strftime(text) for text in formats if "%" in text}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
