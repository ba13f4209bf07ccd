"""Measures the cost of a forward of several tokens, as a multiple of a forward of one token."""

from __future__ import annotations

from collections import deque
from statistics import median

SIZES = (2, 3, 4, 6, 8, 12, 16)
"""Numbers of tokens per forward to choose from. Each needs its own program of the compiled kernels."""
ASSUMED_COST = 0.25
"""Cost per further token before anything was measured. The default model in int4 on two cores: 0.19."""
OBSERVATIONS = 15
"""Times are medians of this many forwards."""
FIRST_SIZE = 4
"""Largest size to try before any cost was measured; then twice the largest measured one."""
FEWEST_SINGLE = 3
"""Forwards of one token to measure before any costs are used."""
RETRY = 1024
"""If a size was not used in this many forwards, its cost is forgotten: the machine may have been busy when it was
measured."""


class RunningMedian:
    """The median of the last `OBSERVATIONS` values."""

    def __init__(self) -> None:
        self._values = deque[float](maxlen=OBSERVATIONS)
        self._median: float | None = None

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> None:
        """Add a value."""
        self._values.append(value)
        self._median = None

    def clear(self) -> None:
        """Forget all values."""
        self._values.clear()
        self._median = None

    @property
    def value(self) -> float:
        """The median; 0 without values."""
        if self._median is None:
            self._median = median(self._values) if self._values else 0.0
        return self._median


class ForwardCosts:
    """Costs by number of tokens, measured while a conversation runs."""

    def __init__(self) -> None:
        self._single, self._rest = RunningMedian(), RunningMedian()
        self._ratios: dict[int, RunningMedian] = {}
        self._latest: dict[int, int] = {}
        self._forwards = 0
        self._costs: dict[int, float] = {}
        """Costs computed since the last change."""

    def observe(self, tokens: int, seconds: float) -> None:
        """Add a forward of `tokens` tokens. The first one of each size is not counted: it also builds its program."""
        self._forwards += 1
        if self._forwards % RETRY == 0:
            self._forget_old()
        if tokens == 1:
            self._single.add(seconds)
            return
        self._latest[tokens] = self._forwards
        if tokens not in self._ratios:
            self._ratios[tokens] = RunningMedian()
        elif self._single.value:
            self._ratios[tokens].add(seconds / self._single.value)
            self._costs.clear()

    def observe_rest(self, seconds: float) -> None:
        """Add the time per token outside of forwards: sampling and text."""
        self._rest.add(seconds)

    @property
    def known(self) -> bool:
        """Whether the time of one token is known, the unit of all costs."""
        return len(self._single) >= FEWEST_SINGLE

    @property
    def largest(self) -> int:
        """The largest size to use: costs of larger ones are too uncertain."""
        return max((2 * size for size, ratios in self._ratios.items() if len(ratios)), default=FIRST_SIZE)

    def cost(self, tokens: int) -> float:
        """Return the cost of a forward of `tokens` tokens, as a multiple of one token."""
        if tokens not in self._costs:
            self._costs[tokens] = self._estimate(tokens)
        return self._costs[tokens]

    def speedup(self, tokens: int, accepted: float) -> float:
        """Return the speedup over forwards of one token if `accepted` proposed tokens are accepted per forward."""
        rest = self._rest.value / self._single.value if self._single.value else 0.0
        decoded = 1 + accepted
        return decoded * (1 + rest) / (self.cost(tokens) + decoded * rest)

    def _estimate(self, tokens: int) -> float:
        """Return the measured cost, or else one that grows in proportion with that of the nearest measured size.

        It is at least 1: a smaller ratio means that one token was measured on a busy machine, and in proportion to it a
        larger size would cost less than nothing.
        """
        if tokens == 1:
            return 1.0
        measured = [size for size, ratios in self._ratios.items() if len(ratios)]
        if not measured:
            return 1 + ASSUMED_COST * (tokens - 1)
        near = min(measured, key=lambda size: abs(size - tokens))
        return max(1.0, 1 + (self._ratios[near].value - 1) * (tokens - 1) / (near - 1))

    def _forget_old(self) -> None:
        for size, ratios in self._ratios.items():
            if self._forwards - self._latest[size] >= RETRY:
                ratios.clear()
                self._costs.clear()
