"""When which disturbance happens: a function of the seed and the turn, so that a run can be repeated and resumed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from streamchat.replay.chaos.kind import Kind, Values

FIRST_TURN = 2
"""From this turn on, each kind has one turn of its own, in random order; later, each comes at random."""
MAX_PIECE = 40
BEFORE_PROMPT = 0.3
"""Probability of a disturbance before the prompt is prefilled."""


@dataclass(frozen=True)
class Moment:
    """A disturbance and its moment."""

    turn: int
    """Turn of the run, counted from 1."""
    piece: int
    """Number of pieces of the reply before it; 0 = before the prompt is prefilled."""
    kind: Kind
    values: Values


def moments(seed: int, turn: int, kinds: Sequence[Kind]) -> list[Moment]:
    """Return the disturbances of a turn, in order."""
    found = [_moment(seed, turn, kind) for kind in kinds if _is_due(seed, turn, kind, len(kinds))]
    found += [_moment(seed, turn, _first(seed, kinds)[turn - FIRST_TURN])] if _is_first(turn, len(kinds)) else []
    return sorted(found, key=lambda moment: moment.piece)


def _is_first(turn: int, kinds: int) -> bool:
    return FIRST_TURN <= turn < FIRST_TURN + kinds


def _first(seed: int, kinds: Sequence[Kind]) -> list[Kind]:
    return sorted(kinds, key=lambda kind: random.Random(f"{seed}/{kind.name}").random())


def _is_due(seed: int, turn: int, kind: Kind, kinds: int) -> bool:
    return turn >= FIRST_TURN + kinds and random.Random(f"{seed}/{turn}/{kind.name}/due").random() < 1 / kind.every


def _moment(seed: int, turn: int, kind: Kind) -> Moment:
    rng = random.Random(f"{seed}/{turn}/{kind.name}")
    piece = 0 if rng.random() < BEFORE_PROMPT else rng.randint(1, MAX_PIECE)
    return Moment(turn, piece, kind, kind.draw(rng))
