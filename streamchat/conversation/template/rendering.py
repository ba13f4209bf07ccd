"""Renders chat templates; the only module that does."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from streamchat.base.errors import first_line, short
from streamchat.base.sanitize import encodable, one_line
from streamchat.conversation.template.arguments import MOST_SOURCE, NO_ARGUMENTS, Arguments
from streamchat.conversation.template.bounded import LimitError, TimeLimit, run_bounded

Message = dict[str, Any]
MOST_CHARACTERS, MOST_TIMES = 200_000, 20
"""Limits on rendered text: characters that a template may add, and how often it may repeat its messages."""
_BEYOND = "_streamchat_template_beyond_limit"
_CLOCK = "strftime_now"
_IN_ALL = "_streamchat_template_in_all"
# transformers removes functions from a template's variables, so the clock is replaced inside the template, by a table
# of results for each string literal with a percent sign.
_FIXED_CLOCK = (
    "{% macro strftime_now(format) -%}"
    "{{ streamchat_moment[format] if format in streamchat_moment else format }}"
    "{%- endmacro %}"
)
SECONDS_IN_ALL = 10.0
"""Limit on the time of all renderings while a format is chosen."""


class UnusableTemplateError(Exception):
    """The template raises, or does not write texts unchanged and in order."""


class Renderer:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: A tokenizer with `apply_chat_template`.
        moment: The time that the template's clock shows.
        arguments: Values that the template reads besides the messages.
    """

    def __init__(self, tokenizer: Any, moment: datetime, arguments: Arguments = NO_ARGUMENTS) -> None:
        self._tokenizer = tokenizer
        try:
            self.source = str(tokenizer.get_chat_template())
        except Exception as error:  # several templates without a default
            raise UnusableTemplateError(_reason(error)) from None
        if len(self.source) > MOST_SOURCE:
            raise UnusableTemplateError(f"it has {len(self.source):,} characters, more than {MOST_SOURCE:,}")
        self.has_clock = _CLOCK in self.source
        self._options: dict[str, Any] = dict(arguments)
        if self.has_clock:
            # Jinja drops a newline after a block
            newline = "\n" if self.source.startswith("\n") else ""
            self._options["chat_template"] = _FIXED_CLOCK + newline + self.source
            self._options["streamchat_moment"] = _answers(self.source, moment)

    def __call__(
        self, messages: Sequence[Message], *, generation: bool = False, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """Return the text of a conversation.

        Args:
            messages: Messages with `role` and `content`. The template gets them as they are, with all keys.
            generation: Whether to open the next reply at the end.
            tools: Descriptions of tools, which the template gets as they are.

        Raises:
            UnusableTemplateError: The template raises.
        """
        options = {**self._options, "tools": list(tools)} if tools else self._options
        return render(self._tokenizer, messages, add_generation_prompt=generation, **options)


@contextmanager
def limited_in_all(tokenizer: Any) -> Iterator[None]:
    """Limit the time of all renderings with a tokenizer's chat template together.

    Raises:
        UnusableTemplateError: One of them exceeded a limit.
    """
    setattr(tokenizer, _IN_ALL, TimeLimit(SECONDS_IN_ALL))
    try:
        yield
    finally:
        delattr(tokenizer, _IN_ALL)
    reason = getattr(tokenizer, _BEYOND, "")
    if reason:
        raise UnusableTemplateError(reason)


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """Render `messages` with the tokenizer's chat template, within limits on time, memory and length.

    Raises:
        UnusableTemplateError: The template raises or exceeds a limit. After a limit it is never rendered again.
    """
    reason = getattr(tokenizer, _BEYOND, "")
    if reason:
        raise UnusableTemplateError(reason)
    from streamchat.conversation.template.environment import use_for_chat_templates  # imports jinja2

    use_for_chat_templates()
    in_all: TimeLimit | None = getattr(tokenizer, _IN_ALL, None)
    try:
        text = str(
            run_bounded(
                lambda: tokenizer.apply_chat_template(list(messages), tokenize=False, **options),
                in_all=in_all,
            )
        )
    except LimitError as error:
        reason = str(error)
        if in_all is not None and not in_all.left:
            reason = f"it takes more than {SECONDS_IN_ALL:g} s to write short conversations"
    except Exception as error:  # a template may raise anything
        raise UnusableTemplateError(f"it raises: {_reason(error)}") from None
    else:
        given = [*messages, *options.get("tools", ())]
        longest = MOST_CHARACTERS + MOST_TIMES * sum(len(str(each)) for each in given)
        if encodable(text) != text:
            raise UnusableTemplateError("it writes characters that are not valid Unicode")
        if len(text) <= longest:
            return text
        reason = f"it writes {len(text):,} characters for {len(messages)} messages"
    setattr(tokenizer, _BEYOND, reason)
    raise UnusableTemplateError(reason)


def _reason(error: Exception) -> str:
    """Return the text of an error on one short line."""
    try:
        return short(one_line(first_line(error)))
    except Exception:  # a template may raise a value that has no text
        return type(error).__name__


MARK = re.compile(r"q[0-9a-f]{12,}q")
"""Pattern of a mark."""


@dataclass(frozen=True)
class Marks:
    """Placeholder texts for the system prompt, messages and replies while a template is measured.

    They are random, so no text contains one by chance or on purpose. They start and end with a letter, so trimming does
    not change them.
    """

    system: str
    users: tuple[str, ...]
    replies: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """All marks."""
        return (self.system, *self.users, *self.replies)


def new_mark(length: int = 6) -> str:
    """Return a mark of `2 * length + 2` letters and digits; `MARK` finds those of 6 or more."""
    return f"q{secrets.token_hex(length)}q"


def new_marks(length: int = 6) -> Marks:
    """Return marks of `2 * length + 2` letters and digits for conversations of four turns."""
    users, replies = (tuple(new_mark(length) for _ in range(4)) for _ in range(2))
    return Marks(new_mark(length), users, replies)


def _answers(source: str, moment: datetime) -> dict[str, str]:
    try:
        formats = _formats(source)
    except Exception as error:  # as in `render`
        raise UnusableTemplateError(f"it raises: {_reason(error)}") from None
    answers = {}
    for text in formats:
        with suppress(ValueError):  # no valid text
            answers[text] = moment.strftime(text)
    return answers


@lru_cache(8)
def _formats(source: str) -> frozenset[str]:
    """Return the string literals of a template that have a percent sign."""
    from jinja2.nodes import Const

    from streamchat.conversation.template.environment import parsed

    def found() -> frozenset[str]:
        values = [node.value for node in parsed(source).find_all(Const)]
        return frozenset(value for value in values if isinstance(value, str) and "%" in value)

    return run_bounded(found)
