"""Ways to bound the cache, or not to, by name: `sinks`, `sinks:512`, `sinks:512:8`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from streamchat.base.errors import ConfigError

Kind = Literal["dense", "window", "sinks", "no-rerotation", "recompute"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Policy:
    """One way to keep the cache."""

    kind: Kind
    budget: int = 0
    """Tokens, sinks included; 0 for `dense`."""
    sinks: int = 0
    """First tokens that never leave; only `sinks` and `no-rerotation` have them."""

    @property
    def name(self) -> str:
        """`dense`, `window 512`, `sinks 512 (4)`."""
        if self.kind == "dense":
            return self.kind
        return f"{self.kind} {self.budget}" + (f" ({self.sinks})" if self.has_sinks else "")

    @property
    def has_sinks(self) -> bool:
        """Whether a number of sinks means anything here."""
        return self.kind in ("sinks", "no-rerotation")

    @property
    def spec(self) -> str:
        """As it is written on the command line."""
        numbers = [] if self.kind == "dense" else [self.budget, *([self.sinks] if self.has_sinks else [])]
        return ":".join([self.kind, *map(str, numbers)])


def make_policy(kind: Kind, budget: int, sinks: int) -> Policy:
    """A policy with the numbers that it has.

    Raises:
        ConfigError: The sizes are impossible.
    """
    if kind == "dense":
        return Policy(kind)
    policy = Policy(kind, budget, sinks if kind in ("sinks", "no-rerotation") else 0)
    if budget < MIN_BUDGET:
        raise ConfigError(f"{policy.spec}: the budget must be at least {MIN_BUDGET} tokens")
    if not 0 <= policy.sinks <= budget // 2:
        raise ConfigError(f"{policy.spec}: of a budget of {budget} tokens from 0 to {budget // 2} can be sinks")
    return policy


MIN_BUDGET = 8


def parse_policies(text: str, budget: int, sinks: int) -> list[Policy]:
    """Policies from `KIND[:BUDGET[:SINKS]],...`, each once, in order.

    Args:
        text: As typed.
        budget: Where none is named.
        sinks: Where none is named.

    Raises:
        ConfigError: A name or number is wrong.
    """
    found: dict[Policy, None] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind, *numbers = part.split(":")
        if kind not in KINDS:
            raise ConfigError(f"{kind} is no policy; there are {', '.join(KINDS)}")
        most = {"dense": 0, "window": 1, "recompute": 1}.get(kind, 2)
        if len(numbers) > most or not all(number.isdecimal() for number in numbers):
            form = ("", ":BUDGET", ":BUDGET:SINKS")[most]
            raise ConfigError(f"{part} is no policy; it is written {kind}{form}")
        given = [int(number) for number in numbers]
        found[make_policy(kind, *[*given, *(budget, sinks)[len(given) :]])] = None
    if not found:
        raise ConfigError(f"no policy was named; there are {', '.join(KINDS)}")
    return list(found)
