"""Derives the format of turns from a model's chat template.

Tokens can only be appended to the cache of a conversation. So a template is split into parts once (`cutting`), and each
turn is written from these parts. Most templates write whole conversations as exactly these parts. The deviations from
those that do not are reported at the start (`chat_format.Fallback`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import Any

from streamchat.base.errors import ConfigError
from streamchat.conversation.template.arguments import (
    NO_ARGUMENTS,
    Arguments,
    TemplateArguments,
    ignored_sentence,
    read_names,
    switch_of,
    unread_sentence,
)
from streamchat.conversation.template.chat_format import FIXED_TIME, NOTES, ChatFormat, Fallback
from streamchat.conversation.template.contents import Contents, Frame
from streamchat.conversation.template.cutting import Parts, conversation, first_system, measure, natural_close, split
from streamchat.conversation.template.rendering import Renderer, UnusableTemplateError, limited_in_all, new_mark
from streamchat.conversation.template.reply_shape import REASONING_KEYS

__all__ = ["ChatFormat", "choose_format", "plain_format", "template_format"]
_OTHER_TIME = datetime.max
"""A time that no template writes like `FIXED_TIME`."""


def choose_format(
    tokenizer: Any,
    wanted: str,
    system_prompt: str,
    arguments: Arguments = NO_ARGUMENTS,
    defaults: Arguments = NO_ARGUMENTS,
    moment: datetime | None = None,
) -> ChatFormat:
    """Return the format for a model.

    Args:
        tokenizer: The model's tokenizer, with or without a chat template.
        wanted: 'auto', 'template' or 'plain'.
        system_prompt: '' for the template's default.
        arguments: Arguments for the template that the user gave.
        defaults: Arguments that the template gets if it reads them and `arguments` has no others.
        moment: The time that the template's clock shows; now by default.

    Raises:
        ConfigError: 'template' was requested and the model has no usable template.
    """
    ignored = ignored_sentence(arguments)
    if wanted == "plain":
        return _noted(plain_format(tokenizer, system_prompt), ignored)
    if not getattr(tokenizer, "chat_template", None):
        if wanted == "template":
            raise ConfigError("this model has no chat template; use --chat-format plain or auto")
        note = "This model has no chat template: turns are written as plain 'User:' and 'Assistant:' lines."
        return _noted(plain_format(tokenizer, system_prompt), note, ignored)
    try:
        return checked_template_format(tokenizer, system_prompt, moment, arguments, defaults)
    except UnusableTemplateError as error:
        if wanted == "template":
            raise ConfigError(f"the model's chat template cannot be used: {error}; use --chat-format plain") from None
        note = f"The model's chat template cannot be used ({error}): turns are written as plain 'User:' lines."
        return _noted(plain_format(tokenizer, system_prompt), note, ignored)


def checked_template_format(
    tokenizer: Any,
    system_prompt: str,
    moment: datetime | None = None,
    arguments: Arguments = NO_ARGUMENTS,
    defaults: Arguments = NO_ARGUMENTS,
) -> ChatFormat:
    """Return the format of the tokenizer's chat template, with notices about how it differs from the template.

    Args:
        tokenizer: A tokenizer with a chat template.
        system_prompt: '' for the template's default.
        moment: The time that the template's clock shows; now by default.
        arguments: Arguments for the template that the user gave.
        defaults: Arguments that the template gets if it reads them and `arguments` has no others.

    Raises:
        UnusableTemplateError: The template raises, or does not write texts unchanged and in order.
    """
    with limited_in_all(tokenizer):
        chosen = template_format(tokenizer, system_prompt, moment, arguments, defaults)
        checked = _with_check(tokenizer, chosen, system_prompt)
    return _noted(checked, unread_sentence(arguments, chosen.takes.names))


def _noted(chosen: ChatFormat, *notes: str) -> ChatFormat:
    """Return `chosen` with more notices; '' is none."""
    return replace(chosen, notes=(*chosen.notes, *filter(None, notes)))


def plain_format(tokenizer: Any, system_prompt: str) -> ChatFormat:
    """Return a format of 'User:' / 'Assistant:' lines with stop strings, for models without a chat template."""
    return ChatFormat(
        name="plain",
        system_open=_automatic_start(tokenizer),
        system_prompt=system_prompt.strip(),
        system_close="\n\n" if system_prompt.strip() else "",
        first_user_open="User: ",
        user_open="User: ",
        generation="\nAssistant:",
        reply_open="\nAssistant: ",
        assistant_close="\n",
        stop_strings=("\nUser:", "\nAssistant:"),
        strips=True,
    )


def template_format(
    tokenizer: Any,
    system_prompt: str,
    moment: datetime | None = None,
    arguments: Arguments = NO_ARGUMENTS,
    defaults: Arguments = NO_ARGUMENTS,
) -> ChatFormat:
    """Return the format of the tokenizer's chat template.

    Args:
        tokenizer: A tokenizer with a chat template.
        system_prompt: '' for the template's default.
        moment: The time that the template's clock shows; now by default.
        arguments: Arguments for the template.
        defaults: Arguments that the template gets if it reads them and `arguments` has no others.

    Raises:
        UnusableTemplateError: The template raises, or does not write texts unchanged and in order.
    """
    moment = moment or datetime.now()
    takes = _takes(tokenizer, defaults)
    arguments = {**takes.defaults, **arguments}

    def at(moment: datetime, arguments: Arguments = arguments) -> ChatFormat:
        return _format_at(tokenizer, Renderer(tokenizer, moment, arguments), system_prompt)

    def without_arguments(moment: datetime) -> tuple[object, ...]:
        with suppress(UnusableTemplateError):  # it needs an argument
            return at(moment, NO_ARGUMENTS).parts
        return at(moment).parts

    render = Renderer(tokenizer, moment, arguments)
    chosen = replace(at(moment), moment=moment, source=render.source, arguments=arguments, takes=takes)
    if arguments:
        chosen = replace(chosen, fixed_identity=without_arguments(moment))
    if not render.has_clock:
        return chosen
    fixed, later = at(FIXED_TIME), at(_OTHER_TIME)
    if fixed.parts == later.parts and fixed.reply_open == later.reply_open:
        return chosen  # the time is only at the start
    return replace(
        chosen,
        fallbacks=(*chosen.fallbacks, "clock"),
        notes=(*chosen.notes, NOTES["clock"]),
        fixed_identity=without_arguments(FIXED_TIME) if arguments else fixed.parts,
        renew=lambda: _with_check(
            tokenizer, template_format(tokenizer, system_prompt, None, arguments, defaults), system_prompt
        ),
    )


def _takes(tokenizer: Any, defaults: Arguments) -> TemplateArguments:
    """Return what the tokenizer's template takes besides the messages."""
    render = Renderer(tokenizer, FIXED_TIME)
    names = read_names(render.source)
    takes = TemplateArguments(names, {name: value for name, value in defaults.items() if name in names})
    switch = switch_of(names)
    if not switch:
        return takes
    prompt = conversation([new_mark()])
    with suppress(UnusableTemplateError):
        on = Renderer(tokenizer, FIXED_TIME, {switch: True})(prompt, generation=True)
        takes = replace(takes, thinks=on == render(prompt, generation=True))
    return takes


def _format_at(tokenizer: Any, render: Renderer, system_prompt: str) -> ChatFormat:
    """Return the format of a template with a fixed clock."""
    parts, fallbacks, around_prompt = _measure_parts(render, system_prompt)
    folded = "system-folded" in fallbacks
    contents = _contents(render, parts, system_prompt, fallbacks)
    before, after = around_prompt
    head = contents.first.before
    own = head[len(before) : len(head) - len(after)]
    if head != before + own + after:
        own = system_prompt
    if _rewrites_replies(contents, parts):
        fallbacks.append("replies-kept")
    close, user_open = _split_between(tokenizer, render, parts)
    first_open = ""
    if not folded:
        last = before if not system_prompt else after
        last, first_open = _first_opening(last, user_open)
        before, after = (last, after) if not system_prompt else (before, last)
    return ChatFormat(
        name="template",
        system_open=before,
        system_prompt=own,
        system_close=after,
        first_user_open=first_open,
        user_open=user_open,
        generation=parts.generation,
        reply_open=parts.reply_open,
        assistant_close=close,
        strips=contents.message(" a ", first=False) == "a",
        notes=tuple(NOTES[each] for each in fallbacks),
        fallbacks=tuple(fallbacks),
        contents=contents,
    )


def _measure_parts(render: Renderer, system_prompt: str) -> tuple[Parts, list[Fallback], tuple[str, str]]:
    """Return the template's parts, its deviations, and the texts before and after the system prompt."""
    fallbacks: list[Fallback] = []
    try:
        parts = measure(render, with_system=bool(system_prompt))
        around_prompt = parts.system_open, parts.system_close
    except UnusableTemplateError:
        parts = measure(render, with_system=False)
        try:
            around_prompt = first_system(render)
            fallbacks.append("system-first")
        except UnusableTemplateError:
            around_prompt = parts.system_open, "\n\n"
            fallbacks.append("system-folded")
    if not parts.consistent:
        fallbacks.append("newest-turn")
    return parts, fallbacks, around_prompt


def _contents(render: Renderer, parts: Parts, system_prompt: str, fallbacks: Sequence[Fallback]) -> Contents:
    """Return the frames that show how the template writes a text."""
    u1, a1, u2 = new_mark(), new_mark(), new_mark()
    folded, moved = "system-folded" in fallbacks, "system-first" in fallbacks
    first_prompt = None if folded or not system_prompt else system_prompt
    later_prompt = None if moved else first_prompt
    lead = f"{system_prompt}\n\n" if folded else ""

    def before(text: str, prompt: str | None) -> str:
        return split(render(conversation([text], prompt), generation=True), [u1])[0]

    opened = before(u1, later_prompt) + u1 + parts.reply_open
    return Contents(
        render,
        first=Frame(
            lambda text: conversation([lead + text], first_prompt), before(lead + u1, first_prompt), parts.generation
        ),
        later=Frame(
            lambda text: conversation([u1, a1, text], later_prompt), opened + a1 + parts.between, parts.generation
        ),
        reply=Frame(
            lambda text: conversation([u1, text, u2], later_prompt), opened, parts.between + u2 + parts.generation
        ),
    )


def _rewrites_replies(contents: Contents, parts: Parts) -> bool:
    """Return whether the template writes a past reply differently than generated, for example without reasoning."""
    mark = new_mark()
    written = contents.given(f"<think>\n{mark}\n</think>\n\nanswer")
    dropped = written is not None and mark not in written
    # a generation prompt that opens the reasoning, and a past reply without it
    return dropped or not parts.reply_open.startswith(parts.generation.rstrip()) or _drops_reasoning(contents.render)


def _drops_reasoning(render: Renderer) -> bool:
    """Return whether the template writes the reasoning of the newest reply but not that of earlier replies."""
    reasoning = new_mark()
    for key in REASONING_KEYS:
        message, reply, later = conversation([new_mark(), new_mark(), new_mark()])
        turn = [message, {**reply, key: reasoning}]
        try:
            newest, earlier = render(turn), render([*turn, later])
        except UnusableTemplateError:
            continue
        if reasoning in newest and reasoning not in earlier:
            return True
    return False


def _split_between(tokenizer: Any, render: Renderer, parts: Parts) -> tuple[str, str]:
    """Split the text between a reply and the next message into what closes the reply and what opens the message.

    White space at the boundary belongs to the close, unless an end token closes the reply and the opening of the first
    message also has that white space.
    """
    between, head = parts.between, parts.system_open + parts.system_close
    close = natural_close(render)
    if not between.startswith(close):
        close = _through_control(tokenizer, between, head)
    rest = between[len(close) :]
    spaces = len(rest) - len(rest.lstrip())
    if 0 < spaces < len(rest) and not (_has_control(tokenizer, close) and head.endswith(rest)):
        close, rest = close + rest[:spaces], rest[spaces:]
    spaces = len(close) - len(close.rstrip(" "))
    if spaces and rest:  # the next token often starts with a space
        close, rest = close[:-spaces], close[-spaces:] + rest
    return close, rest


def _through_control(tokenizer: Any, between: str, head: str) -> str:
    """Return `between` up to and including its first control token, if the rest also opens the first message."""
    for name in tokenizer.get_added_vocab():
        if name and between.startswith(name) and head.endswith(between[len(name) :]):
            return str(name)
    return ""


def _has_control(tokenizer: Any, text: str) -> bool:
    return any(name in text for name in tokenizer.all_special_tokens)


def _first_opening(before: str, user_open: str) -> tuple[str, str]:
    """Split `before`, the text before the first message, where that message is opened."""
    if user_open and before.endswith(user_open):
        cut = len(before) - len(user_open)
        if not cut:  # directly after the system prompt, whose last characters may merge with line ends
            cut = len(user_open) - len(user_open.lstrip("\n"))
    else:
        cut = len(before)
    cut = len(before[:cut].rstrip(" "))  # the next token often starts with a space
    return before[:cut], before[cut:]


def _with_check(tokenizer: Any, chosen: ChatFormat, system_prompt: str) -> ChatFormat:
    """Compare `chosen` with what the template renders; add the fallback "tokens" if their ids differ."""
    from streamchat.conversation.template.format_check import differs

    if differs(tokenizer, chosen, system_prompt):
        return replace(chosen, fallbacks=(*chosen.fallbacks, "tokens"), notes=(*chosen.notes, NOTES["tokens"]))
    return chosen


def _automatic_start(tokenizer: Any) -> str:
    """Return the start token that the tokenizer adds before a text; '' if it adds none."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return str(tokenizer.bos_token) if bos is not None and ids[:1] == [bos] else ""
