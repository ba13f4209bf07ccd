"""Methods by name, the same in `ppl`, `sweep` and `bench`: `dense`, `window:512`, `sinks`, `sinks:512:8`.

Imports no torch, because the command line parser needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from streamchat.base.errors import ConfigError, short
from streamchat.base.eviction_policies import POLICIES
from streamchat.base.formatting import parse_whole_number

MIN_BUDGET = 8


@dataclass(frozen=True)
class Kind:
    """One entry of the registry."""

    name: str
    summary: str
    """What the method does, for help and pages."""
    stream: str
    """`module.Class` in this package, imported when the method runs."""
    sizes: tuple[str, ...] = ("BUDGET", "SINKS")
    """Numbers that may follow the name. Without a budget, the cache grows."""
    is_scored: bool = True
    """Whether `ppl` and `sweep` offer it: not if its output always equals that of another method."""

    @property
    def has_streaming_cache(self) -> bool:
        """Whether it runs on a `StreamingCache`."""
        return self.stream.startswith("streaming.")


KINDS = {
    kind.name: kind
    for kind in (
        Kind("dense", "a growing cache; bench times it with transformers' generate", "growing.Dense", ()),
        Kind("window", "the latest tokens", "streaming.RollingWindow", ("BUDGET",)),
        Kind("sinks", "attention sinks and the latest tokens, the paper's rolling window", "streaming.RollingWindow"),
        Kind("streamchat", "sinks and the latest text, evicted by turns or blocks as in a chat", "streaming.Chat"),
        *(
            Kind(name, f"the eviction policy of this name: evicts {evicts}", "streaming.EvictionPolicyStream")
            for name, evicts in POLICIES.items()
        ),
        Kind(
            "no-rerotation",
            "sinks and window by a hook that cuts keys and ignores positions, the classic mistake",
            "no_rerotation.NoRerotation",
        ),
        Kind(
            "key-lists",
            "a hook that shortens lists which caches no longer have: nothing is evicted",
            "key_lists.KeyLists",
            is_scored=False,
        ),
        Kind(
            "sliding-layers",
            "the latest tokens, by transformers' own layers",
            "sliding_layers.SlidingLayers",
            ("BUDGET",),
        ),
        Kind("recompute", "the window, prefilled again without a cache", "recompute.Recompute", ("BUDGET",)),
        Kind(
            "re-read",
            "generate over the whole history at each turn, as `transformers chat` does",
            "growing.ReRead",
            (),
            is_scored=False,
        ),
    )
}
ALIASES = {"generate": "dense", "cut": "no-rerotation"}
"""Names of earlier versions."""
SCORED = tuple(kind.name for kind in KINDS.values() if kind.is_scored)


@dataclass(frozen=True)
class Method:
    """One method with its sizes. Saved sweeps know it by the names of its fields and their values."""

    kind: str
    """A name in `KINDS`."""
    budget: int = 0
    """Tokens, sinks included; 0 if the cache grows."""
    sinks: int = 0
    """First tokens, which are never evicted."""

    @property
    def name(self) -> str:
        """Display name: `dense`, `window 512`, `sinks 512 (4)`."""
        if self.grows:
            return self.kind
        return f"{self.kind} {self.budget}" + (f" ({self.sinks})" if self.has_sinks else "")

    @property
    def grows(self) -> bool:
        """Whether the cache has no budget."""
        return not KINDS[self.kind].sizes

    @property
    def has_sinks(self) -> bool:
        """Whether the number of sinks can be chosen."""
        return "SINKS" in KINDS[self.kind].sizes

    @property
    def spec(self) -> str:
        """The method as written on the command line."""
        return ":".join([self.kind, *map(str, (self.budget, self.sinks)[: len(KINDS[self.kind].sizes)])])


def make_method(kind: str, budget: int, sinks: int) -> Method:
    """Return a method, without the numbers that its kind does not use.

    Raises:
        ConfigError: The sizes are impossible.
    """
    method = Method(kind, *(budget, sinks)[: len(KINDS[kind].sizes)])
    if method.grows:
        return method
    if budget < MIN_BUDGET:
        raise ConfigError(f"{method.spec}: the budget must be at least {MIN_BUDGET} tokens")
    if not 0 <= method.sinks <= budget // 2:
        raise ConfigError(f"{method.spec}: sinks must be from 0 to {budget // 2} for a budget of {budget} tokens")
    return method


def known_kind(name: str, known: Iterable[str] = SCORED) -> str:
    """Return the name of the kind that `name` means.

    Raises:
        ConfigError: It is not among the `known` ones.
    """
    kind = ALIASES.get(name, name)
    if kind not in known:
        raise ConfigError(f"{name} is not a method; choose from {', '.join(known)}")
    return kind


def parse_methods(text: str, budget: int, sinks: int) -> list[Method]:
    """Parse `NAME[:BUDGET[:SINKS]],...` into methods, each once, in order.

    Args:
        text: The text as typed.
        budget: Default budget.
        sinks: Default number of sinks.

    Raises:
        ConfigError: A name or number is invalid.
    """
    return list(dict.fromkeys(_parse(part, (budget, sinks)) for part in split_list(text, "--methods")))


def _parse(text: str, defaults: Sequence[int]) -> Method:
    name, *numbers = text.split(":")
    kind = known_kind(name)
    sizes = KINDS[kind].sizes
    given = [found for number in numbers if (found := parse_whole_number(number)) is not None]
    if len(numbers) > len(sizes) or len(given) < len(numbers):
        raise ConfigError(f"{short(text, 80)} is not a method; write {':'.join((name, *sizes))}")
    return make_method(kind, *[*given, *defaults[len(given) :]])


def parse_kinds(text: str, known: Sequence[str] = SCORED) -> list[str]:
    """Parse `NAME,...` into names of kinds, each once, in order.

    Raises:
        ConfigError: A name is not among the `known` ones, or has sizes.
    """
    if ":" in text:
        raise ConfigError(f"--methods {text}: give names only; other flags set budgets and sinks")
    return list(dict.fromkeys(known_kind(word, known) for word in split_list(text, "--methods")))


def split_list(text: str, flag: str) -> list[str]:
    """Split a comma-separated list, each word once.

    Raises:
        ConfigError: The list is empty.
    """
    found = list(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))
    if not found:
        raise ConfigError(f"{flag} is empty; give a comma-separated list")
    return found
