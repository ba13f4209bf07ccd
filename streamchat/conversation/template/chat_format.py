"""The fixed texts of a conversation, and the ways in which they deviate from the model's chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

from streamchat.conversation.template.arguments import Arguments, TemplateArguments
from streamchat.conversation.template.contents import Contents
from streamchat.conversation.template.rendering import MARK, UnusableTemplateError

Fallback = Literal["system-folded", "system-first", "newest-turn", "clock", "replies-kept", "tokens", "start-kept"]
"""A deviation from the chat template.

system-folded: The template does not accept a system prompt; here the prompt is put before the first message.
system-first: The template moves the system prompt from turn to turn; here it stays in the first turn.
newest-turn: The template writes earlier turns differently; here each turn keeps the form of the second turn of two.
clock: The template writes the time into every turn; here each turn keeps its own time.
replies-kept: The template rewrites earlier replies, for example without reasoning; here they stay as generated.
tokens: The whole text is tokenized differently than turn by turn.
start-kept: The arguments of the template have changed, and it would write the start of the conversation differently.
"""
NOTES: dict[Fallback, str] = {
    "system-folded": (
        "This model's chat template does not accept a system prompt: here the prompt is put before the first message."
    ),
    "system-first": (
        "This model's chat template moves the system prompt to the newest message: here it stays before the first one."
    ),
    "newest-turn": "This model's chat template rewrites earlier turns: here they keep their original form.",
    "clock": "This model's chat template writes the time into every turn: here each turn keeps its start time.",
    "replies-kept": (
        "This model's chat template rewrites earlier replies, for example without their reasoning: here they stay as "
        "generated."
    ),
    "tokens": (
        "This model's tokenizer splits some texts differently in a whole conversation than turn by turn: a few tokens "
        "differ from the chat template's."
    ),
    "start-kept": (
        "This model's chat template also writes its arguments at the start of the conversation: that stays as it is "
        "until /clear."
    ),
}
FIXED_TIME = datetime(2000, 1, 1)
"""A fixed time, for texts that must not depend on the clock."""


@dataclass(frozen=True)
class ChatFormat:
    """The fixed texts around messages and replies.

    A conversation is system_block, then for each turn user_open + message + generation + reply + assistant_close. The
    first turn has first_user_open instead of user_open, and a given reply has reply_open instead of generation.
    """

    name: str
    """'template' or 'plain'."""
    system_open: str
    """Text before the system prompt."""
    system_prompt: str
    """System prompt text; '' for none."""
    system_close: str
    """Text between the system prompt and the first turn."""
    first_user_open: str
    user_open: str
    generation: str
    """Closes the message and opens a generated reply."""
    assistant_close: str
    """Closes a reply before another message."""
    reply_open: str = ""
    """Closes the message and opens a given reply."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a reply, for models without an end token."""
    strips: bool = False
    """Whether white space is stripped from both ends of messages."""
    notes: tuple[str, ...] = ()
    """Notices for the user, one sentence each."""
    fallbacks: tuple[Fallback, ...] = ()
    """Deviations from the chat template; empty if it is followed exactly."""
    moment: datetime = FIXED_TIME
    """The time that the template's clock shows."""
    source: str = ""
    """The source of the chat template."""
    arguments: Arguments = field(default_factory=dict, hash=False)
    """The values that the template gets besides the messages."""
    takes: TemplateArguments = field(default_factory=TemplateArguments, compare=False, repr=False)
    """The arguments that it reads."""
    contents: Contents | None = field(default=None, compare=False, repr=False)
    renew: Callable[[], ChatFormat] | None = field(default=None, compare=False, repr=False)
    """Returns the format for the current time, if the template writes the time into every turn."""
    fixed_identity: tuple[object, ...] = ()
    """Value of `identity`, if it differs from `parts`."""

    def __post_init__(self) -> None:
        around = (self.system_open, self.system_close, self.first_user_open, self.user_open)
        if any(MARK.search(text) for text in (*around, self.generation, self.reply_open, self.assistant_close)):
            raise UnusableTemplateError("it writes a text more than once")

    @property
    def system_block(self) -> str:
        """Everything before the first turn, system prompt included; pinned in the cache."""
        return self.system_open + self.system_prompt + self.system_close

    @property
    def identity(self) -> tuple[object, ...]:
        """What the ids of saved turns depend on; independent of the time and of the template's arguments."""
        return self.fixed_identity or self.parts

    @property
    def parts(self) -> tuple[object, ...]:
        """The current texts around messages and replies."""
        return (self.first_user_open, self.user_open, self.generation, self.assistant_close, self.strips)

    def after(self, earlier: ChatFormat) -> ChatFormat:
        """Return the format for later turns of a conversation that started in the format `earlier`.

        What was fed stays: the start, and the close of the newest reply.
        """
        start: dict[str, Any] = {
            name: getattr(earlier, name) for name in ("system_open", "system_prompt", "system_close", "first_user_open")
        }
        changed = any(getattr(self, name) != value for name, value in start.items())
        more: tuple[Fallback, ...] = ("start-kept",) if changed else ()
        renew = self.renew
        return replace(
            self,
            **start,
            fallbacks=(*self.fallbacks, *more),
            notes=(*self.notes, *(NOTES[each] for each in more)),
            renew=None if renew is None else lambda: renew().after(earlier),
        )

    def message(self, text: str, first: bool = False) -> str:
        """Return a message as the format writes it."""
        written = None if self.contents is None else self.contents.message(text, first)
        return self._stripped(text) if written is None else written

    def given_reply(self, text: str) -> str:
        """Return a given reply as the format writes it."""
        written = None if self.contents is None else self.contents.given(text)
        return self._stripped(text) if written is None else written

    def _stripped(self, text: str) -> str:
        return text.strip() if self.strips else text
