"""Named checks of the recorded modes, each with the figures that decided it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from streamchat.base.formatting import plural
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.dtype import cache_dtype
from streamchat.cache.hook import StreamingHook
from streamchat.cache.layers.codes import INT4, key_and_value_dtype
from streamchat.cache.layers.kinds import kind_of
from streamchat.cache.logits import logit_distance
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.selfcheck import SelfCheck
from streamchat.cache.positions.strategy import make_cache
from streamchat.cache.token_ids import as_input
from streamchat.verify.measure import hook_count
from streamchat.verify.modes import ModeRun
from streamchat.verify.reference import RerotatingReference, prefill_logits

# Root mean square difference from the reference, as a share of the logits' spread. Measured: float32 1e-6, 16 bits
# 0.005 to 0.024 (at most the rounding error of the reference in that dtype); unmoved sinks give 0.06 to 0.5.
LOGIT_TOLERANCE = {torch.float32: 1e-4}
LOGIT_TOLERANCE_16_BIT = 5e-2
# In 4 bits, rounding changes logits as much as unmoved sinks do: the check then only finds noise. Keys in 8 bits and
# values in 4 give up to 0.12.
LOGIT_TOLERANCE_INT4 = 0.7
# Additional slots of a layer's buffers, in which the window advances: a quarter of the budget, but at least this.
SLACK_TOKENS = 16


@dataclass(frozen=True)
class Check:
    """One statement about the cache, and whether it holds."""

    name: str
    ok: bool
    detail: str
    """The figures, as text."""


def check_self(fit: PositionFit, check: SelfCheck | None) -> Check:
    """Check that the numeric self-check passed."""
    name = "rotating cached positions gives the model's own logits"
    if check is None:
        return Check(name, True, "not needed: cached tokens are prefilled again after an eviction")
    if not fit.rotates:
        return Check(name, check.ok, "not needed: no cached tensor carries a position")
    detail = f"moved by the model {check.floor:.1e}, by rotation {check.rotated:.1e}, not moved {check.control:.1e}"
    return Check(name, check.ok, f"{detail} (rms / logits' spread)")


def check_control(model: Any, plain: ModeRun) -> Check:
    """Check that the measurement detects growth without eviction; otherwise the other lengths would prove nothing."""
    fed = sum(step.fed for step in plain.steps)
    layers: list[Any] = list(DynamicCache(config=model.config).layers)
    windows = [layer.sliding_window - 1 for layer in layers if kind_of(layer) == "sliding"]
    # if all layers of the model slide, they stop growing without us
    expected = min(fed, max(windows)) if len(windows) == len(layers) else fed
    cached = plain.steps[-1].after
    return Check("plain: without eviction the cache grows", cached == expected, f"{fed} tokens fed, {cached} cached")


def check_lengths(run: ModeRun, expected: list[int]) -> Check:
    """Check that every layer has the length of the ledger, at every step."""
    wrong = [
        (step.number, want, step.lengths)
        for step, want in zip(run.steps, expected, strict=True)
        if any(length != want for length in step.lengths)
    ]
    name = f"{run.mode}: every layer has the length of the ledger"
    if wrong:
        number, want, lengths = wrong[0]
        return Check(name, False, f"step {number}: ledger {want}, layers {sorted(set(lengths))}; {len(wrong)} steps")
    return Check(name, True, f"{len(run.steps)} steps x {len(run.steps[-1].lengths)} layers")


def check_budget(run: ModeRun, cache_size: int) -> Check:
    """Check that layers reach the budget and never exceed it."""
    longest = max(step.after for step in run.steps)
    name = f"{run.mode}: the budget is reached and never exceeded"
    return Check(name, longest == cache_size, f"longest layer {longest}, budget {cache_size}")


def check_evicted(run: ModeRun) -> Check:
    """Check that the counters agree with the tokens fed and cached."""
    fed = sum(step.fed for step in run.steps)
    cached = run.steps[-1].after
    ok = run.tokens_evicted == fed - cached > 0 and run.compressions > 0
    compressions = plural(run.compressions, "compression")
    detail = f"{compressions}, {run.tokens_evicted:,} evicted = {fed:,} fed - {cached:,} cached"
    return Check(f"{run.mode}: the counters are correct", ok, detail)


def check_memory(run: ModeRun, cache_size: int) -> Check:
    """Check that the storage of keys and values stops growing, within a bound that depends on the budget only."""
    bound = (cache_size + max(SLACK_TOKENS, cache_size // 4)) * run.token_bytes
    # the last forward before the first eviction has filled the cache
    full = [step.storage_bytes for step in run.steps if step.before == cache_size or step.after == cache_size]
    ok = len(set(full)) == 1 and 0 < full[-1] <= bound
    low, high = min(full, default=0), max(full, default=0)
    detail = f"{low:,} to {high:,} bytes of storage once full, bound {bound:,}"
    return Check(f"{run.mode}: memory is bounded, not only the visible length", ok, detail)


def check_logits(model: Any, fit: PositionFit, run: ModeRun, cache_size: int, num_sink_tokens: int) -> Check:
    """Compare the logits of the manual loop with the slow reference, at every step."""
    ids = as_input(model, run.ids)
    ours, theirs = [], []
    if fit.method == "recompute":
        name = "manual: logits equal those of a prefill of all cached tokens"
        for logits, cached, count in _rebuilds(model, fit, run, ids, cache_size, num_sink_tokens):
            ours.append(logits)
            theirs.append(prefill_logits(model, ids, cached, count))
    else:
        name = "manual: logits equal those of re-rotating every key at every step"
        reference = RerotatingReference(model, fit, cache_size, num_sink_tokens)
        at = 0
        for step, logits in zip(run.steps, run.logits, strict=True):
            ours.append(logits)
            theirs.append(reference.feed(ids[:, at : at + step.fed]))
            at += step.fed
        if reference.cached != run.cached:
            return Check(name, False, "the reference evicted other tokens")
    rms, largest = _distance(torch.cat(ours), torch.cat(theirs))
    tolerance = _tolerance(model)
    detail = f"rms {rms:.1e} of their spread (allowed {tolerance:.0e}), largest difference {largest:.1e}"
    return Check(name, rms <= tolerance, detail)


def _rebuilds(
    model: Any, fit: PositionFit, run: ModeRun, ids: Tensor, cache_size: int, num_sink_tokens: int
) -> list[tuple[Tensor, list[int], int]]:
    """Repeat the run; returns logits, cached token indices and number of fed tokens per step."""
    cache = make_cache(model, fit, cache_size=cache_size, num_sink_tokens=num_sink_tokens)
    result, at = [], 0
    with StreamingHook(model, cache), torch.inference_mode():
        for step in run.steps:
            chunk = ids[:, at : at + step.fed]
            logits = model(input_ids=chunk, use_cache=True, **{cache_keyword(model): cache}).logits[0].float()
            result.append((logits, list(cache.ledger), step.fed))
            at += step.fed
    return result


def _tolerance(model: Any) -> float:
    """Return the allowed difference of logits, by the less precise of the model and its cache."""
    dtypes = (model.dtype, *key_and_value_dtype(cache_dtype(model)))
    if INT4 in dtypes:
        return LOGIT_TOLERANCE_INT4
    return max(LOGIT_TOLERANCE.get(dtype, LOGIT_TOLERANCE_16_BIT) for dtype in dtypes)


def check_generate(model: Any, manual: ModeRun, generate: ModeRun) -> Check:
    """Check that `generate` agrees with the manual loop until two tokens are about equally likely."""
    name = "generate: agrees with the manual loop"
    tolerance = _tolerance(model)
    pairs = enumerate(zip(manual.ids, generate.ids, strict=True))
    same = next((index for index, (a, b) in pairs if a != b), len(manual.ids)) - len(manual.ids) + len(manual.logits)
    steps = min(len(generate.logits), same + 1)
    ours = torch.stack([logits.reshape(-1, logits.shape[-1])[-1] for logits in generate.logits[:steps]])
    theirs = torch.stack([logits[-1] for logits in manual.logits[:steps]])
    rms, _ = _distance(ours, theirs)
    detail = f"{same} of {len(manual.logits)} tokens equal, rms {rms:.1e}"
    return Check(name, rms <= tolerance, detail)


def check_hooks(model: Any, fit: PositionFit, runs: list[ModeRun]) -> Check:
    """Check that no hook is left on the model, also after an exception inside the block."""
    before = hook_count(model)
    left = {run.mode: run.hooks_left for run in runs if run.hooks_left}
    cache = make_cache(model, fit, cache_size=16, num_sink_tokens=1)
    try:
        with StreamingHook(model, cache):
            inside = hook_count(model) - before
            raise KeyError("on purpose")
    except KeyError:
        pass
    after = hook_count(model) - before
    ok = not left and after == 0 and inside > 0
    detail = f"{inside} inside a block, {after} after an exception in it" + (f", left by {left}" if left else "")
    return Check("hooks are removed", ok, detail)


def _distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the `logit_distance`, and the largest difference; inf if any is not finite."""
    distance = logit_distance(a, b)
    return distance, (a - b).abs().max().item() if distance < float("inf") else distance
