"""Compares a turn in the token log with the output of the chat template, id by id."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from streamchat.conversation.template.reference import Exchange, Reference, common_start


@dataclass(frozen=True)
class FedTurn:
    """The newest turn of a conversation, and its ids."""

    history: Sequence[Exchange]
    """Earlier turns: at least the first one and the previous one."""
    message: str
    reply: str
    ids: Sequence[int]
    """Ids from the start of the previous turn to the end of this one."""
    prompt_end: int
    """One past the index in `ids` of the last id fed before the reply."""
    given: bool
    """Whether the reply was given, not generated."""


def turn_difference(reference: Reference, tokenizer: Any, control_ids: Collection[int], turn: FedTurn) -> str:
    """Return how the turn differs from the template's output; '' if it does not.

    The close of a reply is checked with the next turn. If the texts contain names of control tokens, which the template
    would write as control tokens, decoded texts are compared instead of ids.
    """

    def controls(ids: Sequence[int]) -> int:
        return sum(token in control_ids for token in ids)

    def has_control(text: str) -> bool:
        return controls(reference.tokenized(text)) > 0

    history = reference.window(turn.history)
    if turn.given and "newest-turn" not in reference.fallbacks:
        ids, tail = reference.replied(history, turn.message, turn.reply)
        fed, least = list(turn.ids), 1
    else:
        ids, tail = reference.ids(history, turn.message), 0
        fed, least = list(turn.ids[: turn.prompt_end]), 0
    whole = not turn.history and not {"clock", "start-kept"}.intersection(reference.fallbacks)
    behind = ids if whole else reference.behind_opening(history, ids)
    named = has_control(turn.message)
    as_text = named or (turn.given and has_control(turn.reply))
    expected = behind
    for seam in _seams(reference, ids, behind) if turn.history else [[]]:
        expected = [*seam, *behind]
        for rest in range(least, tail + 1):
            count = len(expected) - rest
            if as_text and _same_text(tokenizer, fed, expected[:count]):
                fewer = controls(fed[-count:]) < controls(expected[:count])
                return "" if fewer or not named else "its message became control tokens"
            if not as_text and fed[-count:] == expected[:count] and (not whole or len(fed) == count):
                return ""
    wanted, actual = _decoded(tokenizer, expected), _decoded(tokenizer, fed[-len(expected) :])
    at = max(0, common_start(wanted, actual) - 20)
    return f"the chat template writes {wanted[at : at + 80]!r}, and {actual[at : at + 80]!r} was fed"


def _seams(reference: Reference, ids: Sequence[int], behind: Sequence[int]) -> list[list[int]]:
    """Return the possible ids between the previous reply and the message.

    The last alternative is for a given reply that merges with its close.
    """
    start = len(ids) - len(behind)
    return [list(ids[start - len(reference.between) : start]), reference.between]


def _same_text(tokenizer: Any, fed: Sequence[int], expected: Sequence[int]) -> bool:
    """Return whether the text of `fed` ends with that of `expected`; a name in single letters takes more ids."""
    return _decoded(tokenizer, fed[-16 * len(expected) :]).endswith(_decoded(tokenizer, expected))


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
