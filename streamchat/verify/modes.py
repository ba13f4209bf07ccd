"""Runs the three ways to use a cache, and records every layer at every step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from streamchat.cache.arguments import cache_keyword, parameter_names
from streamchat.cache.dtype import cache_dtype
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.strategy import make_cache
from streamchat.cache.press import StreamingPress
from streamchat.cache.streaming import StreamingCache
from streamchat.verify.measure import RecordedStep, hook_count, recorded_steps

Mode = Literal["plain", "manual", "generate"]


@dataclass
class ModeRun:
    """The recorded run of one mode."""

    mode: Mode
    steps: list[RecordedStep]
    ids: list[int]
    """Prompt and greedily chosen tokens; the last one was not fed."""
    logits: list[Tensor]
    """float32 logits (n, vocabulary) of each forward: of all its tokens, or in `generate` of the last one."""
    hooks_left: int
    """Hooks on the model after the run that were not there before."""
    ledger_lengths: list[int] = field(default_factory=list)
    """Length of the cache's ledger after each step."""
    cached: list[int] = field(default_factory=list)
    """Index in the stream of each token cached at the end."""
    compressions: int = 0
    tokens_evicted: int = 0
    token_bytes: int = 0
    """Bytes of keys and values per token, over all layers."""


def run_plain(model: Any, prompt: Tensor, new_tokens: int) -> ModeRun:
    """Run a custom loop on a plain `DynamicCache`, which never evicts: the control of all length checks."""
    cache = DynamicCache(config=model.config)
    before = hook_count(model)
    with recorded_steps(model, lambda: cache) as steps:
        ids, logits = _greedy_loop(model, cache, prompt, new_tokens, give_positions=True)
    return ModeRun("plain", steps, ids, logits, hook_count(model) - before)


def run_manual(
    model: Any, fit: PositionFit, prompt: Tensor, new_tokens: int, cache_size: int, num_sink_tokens: int
) -> ModeRun:
    """Run a custom loop on a `StreamingCache` under its hook."""
    cache = make_cache(model, fit, cache_size=cache_size, num_sink_tokens=num_sink_tokens)
    before = hook_count(model)
    ledger: list[int] = []
    with recorded_steps(model, lambda: cache) as steps, StreamingHook(model, cache):
        ids, logits = _greedy_loop(model, cache, prompt, new_tokens, ledger=ledger)
    run = ModeRun("manual", steps, ids, logits, hook_count(model) - before, ledger, list(cache.ledger))
    run.compressions, run.tokens_evicted = cache.compression_count, cache.tokens_evicted
    run.token_bytes = cache.token_bytes
    return run


def run_generate(
    model: Any, fit: PositionFit, prompt: Tensor, new_tokens: int, cache_size: int, num_sink_tokens: int
) -> ModeRun:
    """Run `model.generate` inside a `StreamingPress`."""
    before = hook_count(model)
    press = StreamingPress(
        model, cache_size=cache_size, num_sink_tokens=num_sink_tokens, fit=fit, dtype=cache_dtype(model)
    )
    with _neutral_generation(model), recorded_steps(model, lambda: press.cache) as steps, press:
        out = model.generate(
            prompt,
            generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=0,
            ),
        )
    ids: list[int] = out.sequences[0].tolist()
    run = ModeRun("generate", steps, ids, [row.float() for row in out.logits], hook_count(model) - before)
    run.cached = list(press.cache.ledger)
    run.compressions, run.tokens_evicted = press.compression_count, press.tokens_evicted
    run.token_bytes = press.cache.token_bytes
    return run


@contextmanager
def _neutral_generation(model: Any) -> Iterator[None]:
    """Context manager: ignore the model's generation settings, such as end tokens and penalties."""
    original, model.generation_config = model.generation_config, GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = original


@torch.inference_mode()
def _greedy_loop(
    model: Any,
    cache: DynamicCache,
    prompt: Tensor,
    new_tokens: int,
    *,
    give_positions: bool = False,
    ledger: list[int] | None = None,
) -> tuple[list[int], list[Tensor]]:
    """Feed (1, n) ids, then `new_tokens - 1` tokens, each the most likely one, like greedy `generate`."""
    ids: list[int] = prompt[0].tolist()
    logits: list[Tensor] = []
    chunk = prompt
    for _ in range(new_tokens):
        more: dict[str, Any] = {cache_keyword(model): cache}
        if give_positions and "position_ids" in parameter_names(model):
            first = len(ids) - chunk.shape[1]
            more["position_ids"] = torch.arange(first, len(ids), device=prompt.device)[None]
        logits.append(model(input_ids=chunk, use_cache=True, **more).logits[0].float())
        if ledger is not None and isinstance(cache, StreamingCache):
            ledger.append(cache.length)
        chunk = logits[-1][-1:].argmax(-1)[None]
        ids.append(int(chunk))
    return ids, logits
