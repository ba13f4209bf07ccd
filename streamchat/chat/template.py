"""How turns are written for a model, taken apart so that each turn feeds only its own tokens.

A chat template renders whole conversations, and many render past turns differently from how they were generated. So a
template is rendered once, with marks in place of the texts, and cut at the marks; history is never rendered again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from streamchat.errors import ConfigError

# Words no template contains. No spaces around: whether a template trims is tested apart.
SYSTEM, USER_1, ASSISTANT_1, USER_2 = "qSYSTEMq", "qFIRSTUSERq", "qASSISTANTq", "qSECONDUSERq"


@dataclass(frozen=True)
class ChatFormat:
    """The fixed texts around what people and model say.

    A conversation reads: system_block, then for each turn user_open + message + generation + reply + assistant_close;
    the first turn has first_user_open instead of user_open.
    """

    name: str
    """'template' or 'plain'."""
    system_open: str
    """What the format writes before the system prompt."""
    system_prompt: str
    """The owner's words; '' for none."""
    system_close: str
    """What the format writes between the system prompt and the first turn."""
    first_user_open: str
    user_open: str
    generation: str
    """Closes the message and opens the reply."""
    assistant_close: str
    stop_strings: tuple[str, ...] = ()
    """Texts that end a reply, for models without an end token for it."""
    strips: bool = False
    """Messages are stripped of white space at both ends."""
    notes: tuple[str, ...] = ()
    """What the user should know, a sentence each."""

    @property
    def system_block(self) -> str:
        """Everything before the first turn, system prompt included; pinned in the cache."""
        return self.system_open + self.system_prompt + self.system_close

    def message(self, text: str) -> str:
        """The message as the format writes it."""
        return text.strip() if self.strips else text


def choose_format(tokenizer: Any, wanted: str, system_prompt: str) -> ChatFormat:
    """The format for a model.

    Args:
        tokenizer: Its tokenizer, with or without a chat template.
        wanted: 'auto', 'template' or 'plain'.
        system_prompt: '' for what the template says by itself.

    Raises:
        ConfigError: 'template' was asked for and there is none that can be used.
    """
    if wanted == "plain":
        return plain_format(tokenizer, system_prompt)
    if not getattr(tokenizer, "chat_template", None):
        if wanted == "template":
            raise ConfigError("this model has no chat template; use --chat-format plain or auto")
        note = "This model has no chat template: turns are written as plain 'User:' and 'Assistant:' lines."
        return replace(plain_format(tokenizer, system_prompt), notes=(note,))
    try:
        return template_format(tokenizer, system_prompt)
    except _UnusableTemplateError as error:
        if wanted == "template":
            raise ConfigError(f"the model's chat template cannot be used: {error}; use --chat-format plain") from None
        note = f"The model's chat template cannot be used ({error}): turns are written as plain 'User:' lines."
        return replace(plain_format(tokenizer, system_prompt), notes=(note,))


def plain_format(tokenizer: Any, system_prompt: str) -> ChatFormat:
    """'User:' / 'Assistant:' lines for models without a chat template, with text stop strings."""
    return ChatFormat(
        name="plain",
        system_open=_automatic_start(tokenizer),
        system_prompt=system_prompt.strip(),
        system_close="\n\n" if system_prompt.strip() else "",
        first_user_open="User: ",
        user_open="User: ",
        generation="\nAssistant:",
        assistant_close="\n",
        stop_strings=("\nUser:", "\nAssistant:"),
        strips=True,
    )


def template_format(tokenizer: Any, system_prompt: str) -> ChatFormat:
    """The format that the tokenizer's chat template describes.

    Raises:
        _UnusableTemplateError: It raises, or does not write texts as they are and in their order.
    """
    system = [{"role": "system", "content": SYSTEM}] if system_prompt else []
    notes: tuple[str, ...] = ()
    fold = False
    if system:
        try:
            fold = _render(tokenizer, [*system, _user(USER_1)]).count(SYSTEM) != 1
        except _UnusableTemplateError:
            fold = True
        if fold:
            system = []
            notes = (
                "This model's chat template has no place for a system prompt: it is put before the first message.",
            )
    turns = [_user(USER_1), {"role": "assistant", "content": ASSISTANT_1}]
    text = _render(tokenizer, [*system, *turns, _user(USER_2)], add_generation_prompt=True)
    head, rest = _cut(text, USER_1)
    _, rest = _cut(rest, ASSISTANT_1)
    between, generation = _cut(rest, USER_2)

    closed = _render(tokenizer, [*system, *turns])
    close = closed.partition(ASSISTANT_1)[2]
    if not between.startswith(close):
        close = ""
    user_open = between[len(close) :]
    if user_open and head.endswith(user_open):
        block, first_open = head[: len(head) - len(user_open)], user_open
    else:
        block, first_open = head, ""
    if fold:
        before, after, first_open = head, "\n\n", ""
    else:
        before, _, after = block.partition(SYSTEM)
    spaced = _render(tokenizer, [_user(f" {USER_1} ")])
    return ChatFormat(
        name="template",
        system_open=before,
        system_prompt=system_prompt,
        system_close=after,
        first_user_open=first_open,
        user_open=user_open,
        generation=generation,
        assistant_close=close,
        strips=f" {USER_1} " not in spaced,
        notes=notes,
    )


class _UnusableTemplateError(Exception):
    pass


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _render(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template may raise anything
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise _UnusableTemplateError(f"it raises: {first}") from None
    return str(text)


def _cut(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise _UnusableTemplateError("it does not write each message once and in order")
    before, _, after = text.partition(mark)
    return before, after


def _automatic_start(tokenizer: Any) -> str:
    """The start token that the tokenizer itself puts before a text; '' for those that put none."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return str(tokenizer.bos_token) if bos is not None and ids[:1] == [bos] else ""
