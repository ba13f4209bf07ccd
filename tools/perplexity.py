"""Teacher-forced perplexity of one text under several ways to bound the cache, against a slow reference.

    python -m tools.perplexity MODEL TEXT_FILE --tokens 3000 --cache-size 512
    python -m tools.perplexity default TEXT_FILE --dtype bfloat16 --weights int4 --only streamchat,

Prints a line a policy and a JSON line. Also the functions that the tests use.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from streamchat.cache.arguments import cache_keyword
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.fit import fit_positions
from streamchat.cache.streaming import StreamingCache
from streamchat.models.load import load_model
from tests.support.reference import Reference

Feed = Callable[[Tensor], Tensor]
"""(n,) ids -> (n, vocabulary) logits, remembering what came before."""


def pieces(ids: Tensor, size: int) -> Iterator[Tensor]:
    """(n,) ids in chunks."""
    yield from torch.split(ids, size)


def perplexity(feed: Feed, ids: Tensor, chunk: int = 1) -> float:
    """exp of the mean negative log-likelihood of ids 1 .. n-1, each given what the cache holds before it."""
    total, previous = 0.0, None
    for piece in pieces(ids, chunk):
        logits = feed(piece).float().log_softmax(-1)
        rows = logits[:-1] if previous is None else torch.cat([previous, logits[:-1]])
        targets = piece[1:] if previous is None else piece
        total -= rows.gather(1, targets[:, None]).sum().item()
        previous = logits[-1:]
    return math.exp(total / (len(ids) - 1))


def full(model: Any) -> Feed:
    """A growing cache."""
    cache, name = DynamicCache(config=model.config), cache_keyword(model)

    def feed(ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.as_tensor(model(input_ids=ids[None], use_cache=True, **{name: cache}).logits[0])

    return feed


class Policies:
    """Ways to keep the cache of `model` within a budget; each call starts a new stream."""

    def __init__(self, model: Any, cache_size: int, num_sink_tokens: int) -> None:
        self.model, self.cache_size, self.sinks = model, cache_size, num_sink_tokens
        self._fit = fit_positions(model)
        self._name = cache_keyword(model)

    def reference(self) -> Feed:
        """Keys kept un-rotated and rotated anew at every step, in the model's dtype."""
        return Reference(self.model, self.cache_size, self.sinks, self.model.dtype).feed

    def streaming(self, sinks: int | None = None) -> Feed:
        """The product: `StreamingCache` under its hook."""
        kept = self.sinks if sinks is None else sinks
        cache = StreamingCache(self.model.config, self._fit, cache_size=self.cache_size, num_sink_tokens=kept)

        def feed(ids: Tensor) -> Tensor:
            with StreamingHook(self.model, cache):
                return self._logits(ids, cache)

        return feed

    def without_rotation(self) -> Feed:
        """The classic mistake: keys are cut, and positions are left to the cache's new length."""
        cache = DynamicCache(config=self.model.config)

        def feed(ids: Tensor) -> Tensor:
            over = cache.get_seq_length() + len(ids) - self.cache_size
            for layer in cache.layers if over > 0 else ():
                for tensor in ("keys", "values"):
                    x = getattr(layer, tensor)
                    cut = torch.cat([x[:, :, : self.sinks], x[:, :, self.sinks + over :]], dim=2)
                    setattr(layer, tensor, cut)
            return self._logits(ids, cache)

        return feed

    def _logits(self, ids: Tensor, cache: Any) -> Tensor:
        with torch.inference_mode():
            return torch.as_tensor(self.model(input_ids=ids[None], use_cache=True, **{self._name: cache}).logits[0])


def main() -> int:
    """Run all policies on one text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--cache-size", type=int, default=512)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--weights", default="native")
    parser.add_argument("--only", default="", metavar="POLICY", help="policies whose name begins so")
    args = parser.parse_args()
    loaded = load_model(args.model, device="cpu", dtype=args.dtype, weights=args.weights)
    model, tokenizer = loaded.model, loaded.tokenizer
    # a text longer than the model's context is the point
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    text = args.text.read_text(encoding="utf-8-sig")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0, : args.tokens]
    size, sinks = args.cache_size, args.sinks
    known = Policies(model, size, sinks)
    policies: dict[str, Callable[[], Feed]] = {
        f"streamchat, {sinks} sinks": known.streaming,
        "reference (re-rotates everything)": known.reference,
        "streamchat, no sinks": lambda: known.streaming(0),
        "cut without re-rotation": known.without_rotation,
        "full cache": lambda: full(model),
    }
    results = {}
    for name, make in policies.items():
        if not name.startswith(args.only):
            continue
        started = time.perf_counter()
        results[name] = perplexity(make(), ids)
        print(f"{name:<36} {results[name]:10.4f}   {time.perf_counter() - started:6.0f} s", flush=True)
    about = {"tokens": len(ids), "cache_size": size, "sinks": sinks, "dtype": loaded.dtype, "weights": loaded.weights}
    print(json.dumps(about | {"perplexity": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
