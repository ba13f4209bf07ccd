"""What leaves when the budget is full. A pure function over slots, so that it can be tested without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streamchat.errors import ChunkTooLargeError


@dataclass(frozen=True)
class Occupancy:
    """The cache before a forward, in slots."""

    length: int
    """Tokens held."""
    prefix: int
    """Sinks and pinned tokens at the front, never evicted."""
    cache_size: int
    """The budget."""


def plan_eviction(
    cache: Occupancy,
    incoming: int,
    *,
    reserve: int = 0,
    boundaries: Sequence[int] = (),
    block: int = 1,
    clean_cut: Callable[[int], int] | None = None,
) -> int:
    """How many tokens to drop behind the prefix so that `incoming` new ones fit (StreamingLLM, arXiv:2309.17453, 3.2).

    Oldest whole turns go first, where `boundaries` say where turns begin; tokens of the oldest turn that is left go
    only when whole turns cannot make the room. Without boundaries this is the paper's rolling window.

    Args:
        cache: The cache as it is.
        incoming: New tokens of the next forward; room for these is a must.
        reserve: More room that is wanted, but not at the price of the newest whole turn.
        boundaries: Slots, ascending, at which a turn begins; `cache.length` itself counts when the next token begins
            one.
        block: Token-level cuts drop at least this many, which divides the cost of an eviction.
        clean_cut: Slot -> the same or a later slot that may begin the window: not inside a character or a turn's
            header.

    Returns:
        The count of tokens to drop, 0 when there is room.

    Raises:
        ChunkTooLargeError: `incoming` does not fit beside the prefix even when all else is dropped.
    """
    room = cache.cache_size - cache.prefix
    if incoming > room:
        raise ChunkTooLargeError(
            f"{incoming} new tokens in one forward do not fit beside {cache.prefix} sink and pinned tokens in a cache "
            f"of {cache.cache_size}; prefill in chunks of at most {room}"
        )
    must = cache.length + incoming - cache.cache_size
    if must + reserve <= 0:
        return 0
    droppable = cache.length - cache.prefix
    cuts = [slot - cache.prefix for slot in boundaries if cache.prefix < slot <= cache.length]

    for cut in cuts:  # enough for the reserve as well, the newest whole turn stays
        if cut >= must + reserve and cut < droppable:
            return cut
    enough = [cut for cut in cuts if cut >= must]
    if enough and reserve:
        # The reserve is out of reach: the most whole turns short of everything, or everything where it must be.
        return max([cut for cut in enough if cut < droppable], default=enough[-1] if must > 0 else 0)
    if must <= 0:
        return 0
    if enough:
        return enough[0]
    cut = min(droppable, max(must, block))
    if clean_cut is not None:
        cut = min(droppable, clean_cut(cache.prefix + cut) - cache.prefix)
    return max(cut, must)
