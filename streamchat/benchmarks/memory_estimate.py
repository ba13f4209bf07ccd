"""Memory estimate for scoring a text, checked before the run: a growing cache can exhaust the machine's memory."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from streamchat.base.errors import ConfigError
from streamchat.base.formatting import human_bytes
from streamchat.benchmarks.methods.registry import KINDS, Method
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.dtype import bytes_per_number, cache_dtype
from streamchat.cache.token_ids import input_device
from streamchat.conversation.chunk_size import PREFILL_CHUNK
from streamchat.models.device import free_memory
from streamchat.models.load import LoadedModel

PROBE_TOKENS = 4
DENSE = Method("dense")
USABLE_SHARE = 0.9
"""Share of the free memory that may be used."""


@dataclass(frozen=True)
class TokenCost:
    """Memory per token, measured on the model's own cache."""

    layer_bytes: tuple[int, ...]
    """Bytes of keys and values per token, by layer."""
    windows: tuple[int | None, ...]
    """Sliding window of each layer in tokens; None = the layer keeps growing."""
    heads: int
    key_value_heads: int
    vocabulary: int
    streaming_share: float = 1.0
    """Bytes per token in a `StreamingCache`, as a share of those in a plain one."""

    def cache_bytes(self, tokens: int) -> int:
        """Return the bytes of keys and values of `tokens` tokens in a plain cache."""
        pairs = zip(self.layer_bytes, self.windows, strict=True)
        return sum(each * (tokens if window is None else min(tokens, window)) for each, window in pairs)


@torch.inference_mode()
def measure_cost(model: Any) -> TokenCost:
    """Run `PROBE_TOKENS` tokens with a plain cache and measure its tensors."""
    cache, device = DynamicCache(config=model.config), input_device(model)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(PROBE_TOKENS, device=device)[None] % vocabulary
    model(input_ids=ids, use_cache=True, **{cache_keyword(model): cache})
    sizes, windows, groups = [], [], 1
    layers: list[Any] = cache.layers
    for layer in layers:
        tensors = [x for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(x, Tensor)]
        if tensors and tensors[0].dim() == 4:
            groups = max(groups, tensors[0].shape[1])
        sizes.append(sum(x.nbytes for x in tensors) // PROBE_TOKENS)
        windows.append(layer.sliding_window if getattr(layer, "is_sliding", False) else None)
    heads = getattr(model.config.get_text_config(), "num_attention_heads", groups)
    share = bytes_per_number(cache_dtype(model)) / model.dtype.itemsize
    return TokenCost(tuple(sizes), tuple(windows), heads, groups, vocabulary, share)


def predicted_bytes(method: Method, tokens: int, cost: TokenCost, chunk: int, eager: bool) -> int:
    """Estimate the memory at the end of a text, in bytes, without the weights.

    Counts keys and values; for a growing cache, also one layer's copy of them (appending a token copies), and that copy
    repeated for every query head if heads share keys; the attention scores of a chunk if attention is eager; and the
    logits of a chunk in the model's dtype and twice in float32.

    Args:
        method: How the cache is bounded.
        tokens: Length of the text.
        cost: Memory per token of this model.
        chunk: Tokens per forward.
        eager: Whether attention materializes its scores.
    """
    cached = tokens if method.grows else min(tokens, method.budget)
    fed = max(chunk, PREFILL_CHUNK) if method.grows else chunk
    if method.kind == "recompute":
        fed = cached
    layer = max(cost.layer_bytes, default=0) * cached
    copies = layer * (1 + cost.heads // max(1, cost.key_value_heads))
    scores = 3 * 4 * cost.heads * fed * cached if eager else 0
    share = cost.streaming_share if KINDS[method.kind].has_streaming_cache else 1
    return int(share * cost.cache_bytes(cached)) + copies + scores + 10 * min(fed, tokens) * cost.vocabulary


def check_memory(methods: Sequence[Method], tokens: int, loaded: LoadedModel, chunk: int) -> None:
    """Refuse methods that would not fit into the memory that is free now; see `require_memory`."""
    eager = str(loaded.model.config._attn_implementation) == "eager"
    require_memory(methods, tokens, measure_cost(loaded.model), chunk, eager, free_memory(loaded.device))


def require_memory(
    methods: Sequence[Method], tokens: int, cost: TokenCost, chunk: int, eager: bool, free: int | None
) -> None:
    """Refuse methods that would not fit into memory, before anything runs.

    Args:
        methods: Methods that will run, one after the other.
        tokens: Length of the longest text.
        cost: Memory per token of this model.
        chunk: Tokens per forward.
        eager: Whether attention materializes its scores.
        free: Bytes that can be allocated; None if unknown.

    Raises:
        ConfigError: A method would not fit; the message has the sizes and how many tokens would fit.
    """
    if free is None:
        return
    usable = int(USABLE_SHARE * free)
    for method in methods:
        need = predicted_bytes(method, tokens, cost, chunk, eager)
        if need <= usable:
            continue
        what = f"{method.name} over {tokens:,} tokens would take {human_bytes(need)} of memory and "
        what += f"{human_bytes(free)} are free"
        if not method.grows:
            raise ConfigError(f"{what}; give a smaller budget than {method.budget}")
        # the first length that does not fit; a BOS token may be added to the requested tokens
        first = bisect.bisect_right(range(tokens), usable, key=lambda n: predicted_bytes(DENSE, n, cost, chunk, eager))
        raise ConfigError(f"{what}; give --max-tokens {max(first - 2, 1)} or less, or leave dense out of --methods")
