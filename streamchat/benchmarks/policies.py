"""Cache policies by name: `dense`, `window:512`, `sinks`, `sinks:512:8`, `oldest-turns:512:4`."""

from __future__ import annotations

from dataclasses import dataclass

from streamchat.base.errors import ConfigError
from streamchat.base.eviction_policies import POLICIES

KINDS = ("dense", "window", "sinks", "no-rerotation", "recompute", *POLICIES)
TURN_TOKENS = 64
"""Length of a turn of a text. A text has no turns, so policies that evict whole ones get blocks of equal length: the
same for every policy, tokenizer and chunk size."""


@dataclass(frozen=True)
class Policy:
    """One way to bound the cache."""

    kind: str
    """`dense`: a growing cache; `window`: the last tokens only; `sinks`: attention sinks and the last tokens, as in
    streamchat; `no-rerotation`: the same tokens, but new positions follow the cache's length (a common mistake);
    `recompute`: the last tokens, prefilled again without a cache for every chunk; or a name of
    `streamchat.base.eviction_policies`."""
    budget: int = 0
    """Tokens, sinks included; 0 for `dense`."""
    sinks: int = 0
    """First tokens, which are never evicted; not for `dense`, `window` and `recompute`."""

    @property
    def name(self) -> str:
        """Display name: `dense`, `window 512`, `sinks 512 (4)`."""
        if self.kind == "dense":
            return self.kind
        return f"{self.kind} {self.budget}" + (f" ({self.sinks})" if self.has_sinks else "")

    @property
    def has_sinks(self) -> bool:
        """Whether this kind of policy uses sinks."""
        return has_sinks(self.kind)

    @property
    def spec(self) -> str:
        """The policy as written on the command line."""
        numbers = [] if self.kind == "dense" else [self.budget, *([self.sinks] if self.has_sinks else [])]
        return ":".join([self.kind, *map(str, numbers)])


def has_sinks(kind: str) -> bool:
    """Whether policies of this kind use sinks."""
    return kind not in ("dense", "window", "recompute")


def make_policy(kind: str, budget: int, sinks: int) -> Policy:
    """Return a policy, without the numbers that its kind does not use.

    Raises:
        ConfigError: The sizes are impossible.
    """
    if kind == "dense":
        return Policy(kind)
    policy = Policy(kind, budget, sinks if has_sinks(kind) else 0)
    if budget < MIN_BUDGET:
        raise ConfigError(f"{policy.spec}: the budget must be at least {MIN_BUDGET} tokens")
    if not 0 <= policy.sinks <= budget // 2:
        raise ConfigError(f"{policy.spec}: sinks must be from 0 to {budget // 2} for a budget of {budget} tokens")
    return policy


MIN_BUDGET = 8


def parse_policies(text: str, budget: int, sinks: int) -> list[Policy]:
    """Parse `KIND[:BUDGET[:SINKS]],...` into policies, each once, in order.

    Args:
        text: The text as typed.
        budget: Default budget.
        sinks: Default number of sinks.

    Raises:
        ConfigError: A name or number is invalid.
    """
    found: dict[Policy, None] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind, *numbers = part.split(":")
        if kind not in KINDS:
            raise ConfigError(f"{kind} is not a policy; choose from {', '.join(KINDS)}")
        most = 2 if has_sinks(kind) else 0 if kind == "dense" else 1
        if len(numbers) > most or not all(number.isdecimal() for number in numbers):
            form = ("", ":BUDGET", ":BUDGET:SINKS")[most]
            raise ConfigError(f"{part} is not a policy; write {kind}{form}")
        given = [int(number) for number in numbers]
        found[make_policy(kind, *[*given, *(budget, sinks)[len(given) :]])] = None
    if not found:
        raise ConfigError(f"no policy given; choose from {', '.join(KINDS)}")
    return list(found)
