"""The fixed texts of a conversation, and how they differ from the model's chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from streamchat.conversation.template.contents import Contents
from streamchat.conversation.template.rendering import MARK, UnusableTemplateError

Fallback = Literal["system-folded", "system-first", "newest-turn", "clock", "replies-kept", "tokens"]
"""In which way a chat template is not followed.

system-folded: It has no place for a system prompt, which is put before the first message.
system-first: It moves the system prompt from turn to turn; here it stays in the first one.
newest-turn: It writes a turn differently later on; here each turn stays as it is written when it is the second of two.
clock: It writes the time into every turn; here each turn keeps its own time.
replies-kept: It rewrites earlier replies, for example without their reasoning; here they stay as they were generated.
tokens: Its text is tokenized differently in one piece than turn by turn.
"""
NOTES: dict[Fallback, str] = {
    "system-folded": "This model's chat template has no place for a system prompt: it is put before the first message.",
    "system-first": (
        "This model's chat template moves the system prompt to the newest message: here it stays before the first one."
    ),
    "newest-turn": (
        "This model's chat template rewrites earlier turns: here they stay as they were written when they were new."
    ),
    "clock": "This model's chat template writes the time into every turn: here each turn keeps the time it began at.",
    "replies-kept": (
        "This model's chat template rewrites earlier replies, for example without their reasoning: here they stay as "
        "they were generated."
    ),
    "tokens": (
        "This model's tokenizer splits some texts differently in a whole conversation than turn by turn: a few tokens "
        "differ from the chat template's own."
    ),
}
LASTING = datetime(2000, 1, 1)
"""What a clock shows where the time must not matter."""


@dataclass(frozen=True)
class ChatFormat:
    """The fixed texts around what people and model say.

    A conversation reads: system_block, then for each turn user_open + message + generation + reply + assistant_close;
    the first turn has first_user_open instead of user_open, and a reply that is given has reply_open before it instead
    of generation.
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
    """Closes the message and opens a reply that the model generates."""
    assistant_close: str
    """Closes a reply; another message follows."""
    reply_open: str = ""
    """Closes the message and opens a reply that is given."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a reply, for models without an end token for it."""
    strips: bool = False
    """Messages are stripped of white space at both ends."""
    notes: tuple[str, ...] = ()
    """What the user should know, a sentence each."""
    fallbacks: tuple[Fallback, ...] = ()
    """In which ways the chat template is not followed; empty if each conversation is written as the template does."""
    moment: datetime = LASTING
    """What the template's clock shows."""
    source: str = ""
    """The chat template itself."""
    contents: Contents | None = field(default=None, compare=False, repr=False)
    renew: Callable[[], ChatFormat] | None = field(default=None, compare=False, repr=False)
    """Returns the format as it is now, if the time is written into every turn."""
    lasting: tuple[object, ...] = ()
    """What `identity` says, if that is not made of the texts above."""

    def __post_init__(self) -> None:
        around = (self.system_open, self.system_close, self.first_user_open, self.user_open)
        if any(MARK.search(text) for text in (*around, self.generation, self.reply_open, self.assistant_close)):
            raise UnusableTemplateError("it writes a text at more than one place")

    @property
    def system_block(self) -> str:
        """Everything before the first turn, system prompt included; pinned in the cache."""
        return self.system_open + self.system_prompt + self.system_close

    @property
    def identity(self) -> tuple[object, ...]:
        """What ids of saved turns depend on. It does not depend on the time."""
        return self.lasting or self.parts

    @property
    def parts(self) -> tuple[object, ...]:
        """The texts around messages and replies, as they are now."""
        return (self.first_user_open, self.user_open, self.generation, self.assistant_close, self.strips)

    def message(self, text: str, first: bool = False) -> str:
        """The message as the format writes it."""
        written = None if self.contents is None else self.contents.message(text, first)
        return self._stripped(text) if written is None else written

    def given_reply(self, text: str) -> str:
        """A reply as the format writes it when it is given."""
        written = None if self.contents is None else self.contents.given(text)
        return self._stripped(text) if written is None else written

    def _stripped(self, text: str) -> str:
        return text.strip() if self.strips else text
