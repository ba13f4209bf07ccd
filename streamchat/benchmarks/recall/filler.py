"""Facts to recall, and the turns between them: from chats with replies, or from a book."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from streamchat.base.errors import ConfigError
from streamchat.base.text_files import read_text
from streamchat.replay.script import read_scripts

DIGITS = 5
PASSAGE_WORDS, MOST_WORDS = 100, 200
"""Words of a book per message, and maximum words of a turn of a chat: the distances would be exceeded by much."""
SHORT_REPLY = "I have read it."
NOTED = "I will remember it."
"""Reply to a fact."""
_PEOPLE = "Alma Brice Conrad Dilys Edgar Fenna Gustav Hilde Ivor Jonna Kasimir Lorne Mattia Nils Orla Percy Rosa Sten"
_THINGS = "shed safe locker gate cabin cellar archive rack garage vault kiosk trunk attic depot boat cart stable studio"
_SAYS = (
    "The code of {person}'s {thing} is {digits}.",
    "Please remember that the code for the {thing} of {person} is {digits}.",
    "By the way, {person} opens the {thing} with {digits}.",
)
_ASKS = (
    "What is the code of {person}'s {thing}?",
    "Which code opens the {thing} of {person}?",
    "I forgot the code for {person}'s {thing}. What was it?",
)


@dataclass(frozen=True)
class Fact:
    """A number that the user states once, and asks for later."""

    statement: str
    question: str
    answer: str
    """The right reply; it has the digits."""


def make_facts(count: int, seed: int) -> list[Fact]:
    """Return different facts; people and things occur in many of them.

    Raises:
        ConfigError: There are not so many.
    """
    rng = random.Random(seed)
    pairs = [(person, thing) for person in _PEOPLE.split() for thing in _THINGS.split()]
    if count > len(pairs):
        raise ConfigError(f"{count} facts are too many; there are {len(pairs)}")
    facts = []
    for person, thing in rng.sample(pairs, count):
        words = {"person": person, "thing": thing, "digits": f"{rng.randrange(10**DIGITS):0{DIGITS}}"}
        says, asks = rng.choice(_SAYS).format(**words), rng.choice(_ASKS).format(**words)
        facts.append(Fact(says, asks, "The code of {person}'s {thing} is {digits}.".format(**words)))
    return facts


def read_turns(paths: Sequence[Path], seed: int) -> Iterator[tuple[str, str]]:
    """Yield (message, reply) without end, alternately from each file; chats are in random order.

    Raises:
        ConfigError: A file cannot be read, or has no turns.
    """
    sources = []
    for path in paths:
        turns = _chat_turns(path, seed) if path.suffix in (".jsonl", ".json") else _book_turns(path)
        if not turns:
            raise ConfigError(f"{path} has no messages with replies")
        sources.append(cycle(turns))
    return (next(source) for source in cycle(sources))


def _chat_turns(path: Path, seed: int) -> list[tuple[str, str]]:
    dialogues = read_scripts([path]).dialogues
    random.Random(seed).shuffle(dialogues)
    turns = [(turn.text, turn.reply) for dialogue in dialogues for turn in dialogue.turns if turn.reply]
    return [turn for turn in turns if len(" ".join(turn).split()) <= MOST_WORDS]


def _book_turns(path: Path) -> list[tuple[str, str]]:
    words = read_text(path, guess=True).text.split()
    pieces = [" ".join(words[at : at + PASSAGE_WORDS]) for at in range(0, len(words), PASSAGE_WORDS)]
    return [(piece, SHORT_REPLY) for piece in pieces]
