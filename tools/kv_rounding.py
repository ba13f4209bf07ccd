"""Compares ways to round cached keys and values: `python -m tools.kv_rounding BOOK ...`.

All ways read the same texts in lockstep with a cache in float32. Prints the perplexity of each, its difference from
float32, and the mean KL divergence of the next token's distribution from that with float32, in nats per token.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamchat.cache.arguments import cache_keyword
from streamchat.cache.hook import StreamingHook
from streamchat.cache.layers import codes
from streamchat.cache.layers.storage import LayerStorage, NumberStorage
from streamchat.cache.positions.strategy import choose_fit, make_cache
from streamchat.models.load import load_model

Round = Callable[[Tensor], Tensor]
"""(batch, heads, tokens, head_dim) float32 -> the same, rounded."""
# The 16 numbers that represent a standard normal distribution with the least squared error (Lloyd and Max), positive
# half.
NORMAL = (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6180, 2.0690, 2.7326)


def symmetric(bits: int, group: int = 0) -> Round:
    """Return rounding with a scale for each `group` of neighboring dimensions of a head; 0 for the whole head."""
    most = 2 ** (bits - 1) - 1

    def way(x: Tensor) -> Tensor:
        parts = x.reshape(*x.shape[:-1], -1, group or x.shape[-1])
        scale = (parts.abs().amax(-1, keepdim=True) / most).clamp_min(1e-30)
        rounded: Tensor = (parts / scale).round() * scale
        return rounded.reshape(x.shape)

    return way


def least_squares(bits: int) -> Round:
    """Return rounding with the best of several scales per head, also smaller ones that clip."""
    most = 2 ** (bits - 1) - 1

    def rounded(x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        best, error = x, torch.full_like(largest, math.inf)
        for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65):
            scale = largest * share / most
            found = (x / scale).round().clamp(-most - 1, most) * scale
            off = (found - x).square().sum(-1, keepdim=True)
            best, error = torch.where(off < error, found, best), torch.minimum(off, error)
        return best

    return rounded


def with_minimum(bits: int, group: int = 0) -> Round:
    """Return rounding with a scale and a minimum per group."""

    def way(x: Tensor) -> Tensor:
        parts = x.reshape(*x.shape[:-1], -1, group or x.shape[-1])
        least = parts.amin(-1, keepdim=True)
        scale = ((parts.amax(-1, keepdim=True) - least) / (2**bits - 1)).clamp_min(1e-30)
        rounded: Tensor = ((parts - least) / scale).round() * scale + least
        return rounded.reshape(x.shape)

    return way


def by_channel(bits: int, tokens: int) -> Round:
    """Return rounding with a scale per dimension for each block of `tokens` tokens that arrive together."""

    def rounded(x: Tensor) -> Tensor:
        return torch.cat([symmetric(bits)(each.mT).mT for each in torch.split(x, tokens, dim=2)], dim=2)

    return rounded


def normal_table(x: Tensor) -> Tensor:
    """Round to 16 numbers that suit a normal distribution, with the spread of the head as the scale."""
    table = torch.tensor([*(-each for each in NORMAL), *NORMAL]).sort().values
    edges = (table[1:] + table[:-1]) / 2
    scale = x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    best, error = x, torch.full_like(scale, math.inf)
    for share in (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15):
        found = table[torch.bucketize(x / (scale * share), edges)] * scale * share
        off = (found - x).square().sum(-1, keepdim=True)
        best, error = torch.where(off < error, found, best), torch.minimum(off, error)
    return best


def turned(way: Round) -> Round:
    """Return `way` on head dimensions turned by a Hadamard matrix."""
    return lambda x: codes.turned(way(codes.turned(x)))


def same(x: Tensor) -> Tensor:
    """Return `x`."""
    return x


WAYS: dict[str, tuple[Round, Round]] = {
    "float32": (same, same),
    "bfloat16": (lambda x: x.bfloat16().float(),) * 2,
    "int8, head": (symmetric(8),) * 2,
    "int8, groups of 32": (symmetric(8, 32),) * 2,
    "int8, keys by channel of 32 tokens": (by_channel(8, 32), symmetric(8)),
    "int8, head, turned": (turned(symmetric(8)),) * 2,
    "int8, head, keys turned": (turned(symmetric(8)), symmetric(8)),
    "int4, head": (symmetric(4),) * 2,
    "int4, groups of 32": (symmetric(4, 32),) * 2,
    "int4, head, turned": (turned(symmetric(4)),) * 2,
    "int4, head, turned, least squares": (turned(least_squares(4)),) * 2,
    "int4, head, turned, minimum": (turned(with_minimum(4)),) * 2,
    "int4, groups of 32, turned": (turned(symmetric(4, 32)),) * 2,
    "int4, groups of 32, minimum": (with_minimum(4, 32),) * 2,
    "int4, keys by channel of 32 tokens": (by_channel(4, 32), turned(least_squares(4))),
    "int4, head, turned, normal table": (turned(normal_table),) * 2,
    "k8v4, head, turned": (turned(symmetric(8)), turned(symmetric(4))),
    "k8v4, head, turned, least squares": (turned(symmetric(8)), turned(least_squares(4))),
    "k8v4, head, turned, minimum": (turned(symmetric(8)), turned(with_minimum(4))),
    "int4 keys as above, values in float32": (turned(least_squares(4)), same),
    "int4 values as above, keys in float32": (same, turned(least_squares(4))),
}
"""Name -> rounding of keys and of values."""


class RoundedStorage(NumberStorage):
    """Float32 numbers that were rounded."""

    def __init__(self, like: Tensor, slots: int, way: Round) -> None:
        super().__init__(like, slots, torch.float32)
        self._way = way

    def write(self, first: int, x: Tensor) -> None:
        """Round and store."""
        super().write(first, self._way(x.float()))


@dataclass
class Result:
    """Sums over the tokens of all texts."""

    loss: float = 0.0
    divergence: float = 0.0
    count: int = 0
    caches: list[Any] = field(default_factory=list)


def rounded_cache(model: Any, fit: Any, size: int, ways: tuple[Round, Round]) -> Any:
    """Return a cache of `size` tokens that rounds."""
    made = make_cache(model, fit, cache_size=size, num_sink_tokens=4, dtype=torch.float32)
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    empty = torch.empty(1, config.num_key_value_heads, 0, dim)
    for layer in made.streaming_layers:
        layer.lazy_initialization(empty, empty)
        with torch.inference_mode(False):
            layer.storage = LayerStorage(*(RoundedStorage(empty, layer.slots, way) for way in ways))
    return made


def read_text(model: Any, fit: Any, ids: Tensor, size: int, chunk: int, results: dict[str, Result]) -> None:
    """Add the figures of one text to `results`."""
    name = cache_keyword(model)
    caches = {way: rounded_cache(model, fit, size, WAYS[way]) for way in results}
    for at in range(0, ids.shape[1] - 1, chunk):
        piece, targets = ids[:, at : at + chunk], ids[0, at + 1 : at + chunk + 1]
        exact = None
        for way, result in results.items():
            with StreamingHook(model, caches[way]):
                logits = model(input_ids=piece, use_cache=True, **{name: caches[way]}).logits[0]
            found = logits[: len(targets)].float().log_softmax(-1)
            exact = found if exact is None else exact
            result.loss -= found.gather(1, targets[:, None]).sum().item()
            result.divergence += (exact.exp() * (exact - found)).sum().item()
            result.count += len(targets)


def main() -> None:
    """Print a line per way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("books", nargs="+", type=Path)
    parser.add_argument("--model", default="default")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per book")
    parser.add_argument("--cache-size", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--ways", default="", help="only ways that contain this text")
    args = parser.parse_args()
    loaded = load_model(args.model, device="cpu", dtype="float32", weights="native", kernels="torch", decode="plain")
    fit = choose_fit(loaded.model)
    chosen = [way for way in WAYS if way == "float32" or args.ways in way]
    results = {way: Result() for way in chosen}
    with torch.inference_mode():
        for book in args.books:
            ids = loaded.tokenizer(book.read_text()[: 8 * args.tokens], return_tensors="pt")["input_ids"]
            read_text(loaded.model, fit, ids[:, : args.tokens], args.cache_size, args.chunk, results)
    base = results["float32"].loss / results["float32"].count
    for way, result in results.items():
        loss = result.loss / result.count
        change, divergence = 100 * math.expm1(loss - base), result.divergence / result.count
        print(f"{way:40} {math.exp(loss):9.4f} {change:+8.3f} % {divergence:.6f}")


if __name__ == "__main__":
    main()
