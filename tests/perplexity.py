"""Teacher-forced perplexity of one text under several ways to bound the cache; the first row is a slow reference.

    python -m tests.perplexity MODEL_FOLDER TEXT_FILE --tokens 3000 --cache-size 512

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
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from streamchat.cache.arguments import cache_keyword
from streamchat.cache.fit import fit_positions
from streamchat.cache.hook import StreamingHook
from streamchat.cache.streaming import StreamingCache
from tests.reference import Reference

Feed = Callable[[Tensor], Tensor]
"""(n,) ids -> (n, vocabulary) logits, remembering what came before."""


def pieces(ids: Tensor, size: int) -> Iterator[Tensor]:
    """(n,) ids in chunks."""
    yield from ids.split(size)


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


def streaming(model: Any, cache_size: int, sinks: int) -> Feed:
    """The product: `StreamingCache` under its hook (which stays attached; use one model per run or remove it)."""
    cache = StreamingCache(model.config, fit_positions(model), cache_size=cache_size, num_sink_tokens=sinks)
    name = cache_keyword(model)

    def feed(ids: Tensor) -> Tensor:
        with StreamingHook(model, cache), torch.inference_mode():
            return torch.as_tensor(model(input_ids=ids[None], use_cache=True, **{name: cache}).logits[0])

    return feed


def full(model: Any) -> Feed:
    """A growing cache."""
    cache, name = DynamicCache(config=model.config), cache_keyword(model)

    def feed(ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.as_tensor(model(input_ids=ids[None], use_cache=True, **{name: cache}).logits[0])

    return feed


def without_rotation(model: Any, cache_size: int, sinks: int) -> Feed:
    """The classic mistake: keys are cut, and positions are left to the cache's new length."""
    cache, name = DynamicCache(config=model.config), cache_keyword(model)

    def feed(ids: Tensor) -> Tensor:
        over = cache.get_seq_length() + len(ids) - cache_size
        if over > 0:
            for layer in cache.layers:
                for tensor in ("keys", "values"):
                    x = getattr(layer, tensor)
                    setattr(layer, tensor, torch.cat([x[:, :, :sinks], x[:, :, sinks + over :]], dim=2))
        with torch.inference_mode():
            return torch.as_tensor(model(input_ids=ids[None], use_cache=True, **{name: cache}).logits[0])

    return feed


def main() -> int:
    """Run all policies on one text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--cache-size", type=int, default=512)
    parser.add_argument("--sinks", type=int, default=4)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = args.text.read_text(encoding="utf-8-sig")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0, : args.tokens]
    size, sinks = args.cache_size, args.sinks
    policies: dict[str, Callable[[], Feed]] = {
        "reference (re-rotates everything)": lambda: Reference(model, size, sinks, torch.float32).feed,
        f"streamchat, {sinks} sinks": lambda: streaming(model, size, sinks),
        "streamchat, no sinks": lambda: streaming(model, size, 0),
        "cut without re-rotation": lambda: without_rotation(model, size, sinks),
        "full cache": lambda: full(model),
    }
    results = {}
    for name, make in policies.items():
        started = time.perf_counter()
        results[name] = perplexity(make(), ids)
        print(f"{name:<36} {results[name]:10.4f}   {time.perf_counter() - started:6.0f} s", flush=True)
    print(json.dumps({"tokens": len(ids), "cache_size": size, "sinks": sinks, "perplexity": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
