"""CPU time of evicting 100 tokens, of paging them in, and of undoing that: `python -m tools.paging_speed`.

Prints medians for each `kv_dtype`, in turn on one thread, with sinks and pins at the front of the cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from streamchat.cache.eviction.policy import Cut
from streamchat.cache.history import CacheHistory, evicted_by
from streamchat.cache.hook import StreamingHook
from streamchat.cache.layers.codes import QUANTIZED, CacheDtype
from streamchat.cache.paging import page_in
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.strategy import make_cache
from streamchat.cache.streaming import StreamingCache
from streamchat.models.checked_fit import choose_checked_fit
from streamchat.models.load import LoadedModel, load_model

DTYPES: dict[str, CacheDtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32, **QUANTIZED}
Times = dict[str, list[float]]


def full_cache(loaded: LoadedModel, fit: PositionFit, dtype: CacheDtype, size: int, retained: int) -> StreamingCache:
    """Return a cache of `size` tokens, of which the first `retained` are never evicted."""
    cache = make_cache(loaded.model, fit, cache_size=size, num_sink_tokens=4, dtype=dtype)
    ids = torch.randint(5, 1000, (1, size), generator=torch.Generator().manual_seed(0))
    with StreamingHook(loaded.model, cache):
        for part in torch.split(ids, 256, dim=1):
            loaded.model(input_ids=part, past_key_values=cache, use_cache=True)
    if retained > 4:
        cache.pin(4, retained)
    cache.history = CacheHistory(cache)
    return cache


def timed(times: Times, name: str, run: Callable[[], object]) -> None:
    """Run, and note the milliseconds of this thread."""
    started = time.thread_time()
    run()
    times.setdefault(name, []).append(1000 * (time.thread_time() - started))


def one_round(cache: StreamingCache, tokens: int, times: Times) -> None:
    """Evict tokens behind the retained ones, page them in, and undo both."""
    history = cache.history
    assert history is not None
    mark, stop, retained = history.mark, cache.ledger.next_index, cache.num_retained
    timed(times, "evict", lambda: cache._cut(Cut(retained, tokens)))
    kept = [each for step in history.since(mark) if (each := evicted_by(step)) is not None]
    middle = history.mark
    timed(times, "page in", lambda: page_in(cache, kept, [(retained, retained + tokens)]))
    timed(times, "undo paging", lambda: history.undo_to(middle, stop))
    timed(times, "undo eviction", lambda: history.undo_to(mark, stop))


@torch.inference_mode()
def main() -> None:
    """Print one line per dtype."""
    parser = argparse.ArgumentParser(prog="python -m tools.paging_speed", description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--cached", type=int, default=1024)
    parser.add_argument("--retained", type=int, default=34, help="sinks and pinned tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16", *QUANTIZED])
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(args.model, device="cpu")
    fit = choose_checked_fit(loaded.model)
    caches = {name: full_cache(loaded, fit, DTYPES[name], args.cached, args.retained) for name in args.dtypes}
    times: dict[str, Times] = {name: {} for name in caches}
    for _ in range(args.rounds):
        for name, cache in caches.items():
            one_round(cache, args.tokens, times[name])
    for name, each in times.items():
        parts = (f"{what} {statistics.median(values):5.1f} ms" for what, values in each.items())
        print(f"{name:>9}: {', '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
