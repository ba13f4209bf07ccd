"""Named checks over the recorded modes, each with the figures that decided it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from streamchat.base.formatting import plural
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.hook import StreamingHook
from streamchat.cache.layers.kinds import kind_of
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.selfcheck import SelfCheck
from streamchat.cache.positions.strategy import make_cache
from streamchat.verify.measure import hook_count
from streamchat.verify.modes import ModeRun
from streamchat.verify.reference import RerotatingReference, reread_logits

# Root mean square of the difference to the reference, as a share of the logits' spread. Measured: float32 1e-6, 16
# bits 0.005 to 0.024 (at or below what the same format does to the reference); sinks not moved give 0.06 to 0.5.
LOGIT_TOLERANCE = {torch.float32: 1e-4}
LOGIT_TOLERANCE_16_BIT = 5e-2
# Room behind the budget in which the window moves on: a quarter of it, or this.
SLACK_TOKENS = 16


@dataclass(frozen=True)
class Check:
    """One statement about the cache, and whether it holds."""

    name: str
    ok: bool
    detail: str
    """The figures, in words."""


def check_self(fit: PositionFit, check: SelfCheck | None) -> Check:
    """The numeric self-check at load."""
    name = "positions are moved as the model itself moves them"
    if check is None:
        return Check(name, True, "not needed: kept tokens are read again after an eviction")
    if not fit.rotates:
        return Check(name, check.ok, "no cached tensor carries a position, so nothing has to be moved")
    detail = f"moved by the model {check.floor:.1e}, by us {check.rotated:.1e}, not moved {check.control:.1e}"
    return Check(name, check.ok, f"{detail} (rms of the logits' spread)")


def check_control(model: Any, plain: ModeRun) -> Check:
    """The measurement notices growth where nothing is evicted: else none of the other lengths proves anything."""
    fed = sum(step.fed for step in plain.steps)
    layers: list[Any] = list(DynamicCache(config=model.config).layers)
    windows = [layer.sliding_window - 1 for layer in layers if kind_of(layer) == "sliding"]
    # where all layers of the library slide, they stop growing by themselves
    expected = min(fed, max(windows)) if len(windows) == len(layers) else fed
    held = plain.steps[-1].after
    return Check("plain: without eviction the cache grows", held == expected, f"{fed} tokens fed, {held} held")


def check_lengths(run: ModeRun, expected: list[int]) -> Check:
    """Every layer holds as many tokens as the bookkeeping says, at every step."""
    wrong = [
        (step.number, want, step.lengths)
        for step, want in zip(run.steps, expected, strict=True)
        if any(length != want for length in step.lengths)
    ]
    name = f"{run.mode}: every layer is as long as the ledger says"
    if wrong:
        number, want, lengths = wrong[0]
        return Check(name, False, f"step {number}: ledger {want}, layers {sorted(set(lengths))}; {len(wrong)} steps")
    return Check(name, True, f"{len(run.steps)} steps x {len(run.steps[-1].lengths)} layers")


def check_budget(run: ModeRun, cache_size: int) -> Check:
    """No layer ever holds more than the budget, and it is used."""
    longest = max(step.after for step in run.steps)
    return Check(
        f"{run.mode}: the budget is kept", longest == cache_size, f"longest layer {longest}, budget {cache_size}"
    )


def check_evicted(run: ModeRun) -> Check:
    """The counters agree with what was fed and what is held."""
    fed = sum(step.fed for step in run.steps)
    held = run.steps[-1].after
    ok = run.tokens_evicted == fed - held > 0 and run.compressions > 0
    detail = f"{plural(run.compressions, 'compression')}, {run.tokens_evicted:,} evicted = {fed:,} fed - {held:,} held"
    return Check(f"{run.mode}: the counters tell the truth", ok, detail)


def check_memory(run: ModeRun, cache_size: int) -> Check:
    """The storage behind keys and values stops growing, within a bound that only the budget decides."""
    bound = (cache_size + max(SLACK_TOKENS, cache_size // 4)) * run.token_bytes
    # the last forward before the first eviction has filled the cache
    full = [step.storage_bytes for step in run.steps if step.before == cache_size or step.after == cache_size]
    ok = len(set(full)) == 1 and 0 < full[-1] <= bound
    low, high = min(full, default=0), max(full, default=0)
    detail = f"{low:,} to {high:,} bytes of storage once full, bound {bound:,}"
    return Check(f"{run.mode}: memory is bounded, not only its views", ok, detail)


def check_logits(model: Any, fit: PositionFit, run: ModeRun, cache_size: int, num_sink_tokens: int) -> Check:
    """Logits of the manual loop against the slow reference, at every step."""
    ids = torch.tensor([run.ids], device=model.get_input_embeddings().weight.device)
    ours, theirs = [], []
    if fit.method == "recompute":
        name = "manual: logits equal those of reading all kept tokens again"
        for logits, kept, count in _rebuilds(model, fit, run, ids, cache_size, num_sink_tokens):
            ours.append(logits)
            theirs.append(reread_logits(model, ids, kept, count))
    else:
        name = "manual: logits equal those of re-rotating every key at every step"
        reference = RerotatingReference(model, fit, cache_size, num_sink_tokens)
        at = 0
        for step, logits in zip(run.steps, run.logits, strict=True):
            ours.append(logits)
            theirs.append(reference.feed(ids[:, at : at + step.fed]))
            at += step.fed
        if reference.kept != run.kept:
            return Check(name, False, "the reference kept other tokens")
    rms, largest = _distance(torch.cat(ours), torch.cat(theirs))
    tolerance = LOGIT_TOLERANCE.get(model.dtype, LOGIT_TOLERANCE_16_BIT)
    detail = f"rms {rms:.1e} of their spread (allowed {tolerance:.0e}), largest difference {largest:.1e}"
    return Check(name, rms <= tolerance, detail)


def _rebuilds(
    model: Any, fit: PositionFit, run: ModeRun, ids: Tensor, cache_size: int, num_sink_tokens: int
) -> list[tuple[Tensor, list[int], int]]:
    """The run once more, with what is kept after each step."""
    cache = make_cache(model, fit, cache_size=cache_size, num_sink_tokens=num_sink_tokens)
    found, at = [], 0
    with StreamingHook(model, cache), torch.inference_mode():
        for step in run.steps:
            chunk = ids[:, at : at + step.fed]
            logits = model(input_ids=chunk, use_cache=True, **{cache_keyword(model): cache}).logits[0].float()
            found.append((logits, list(cache.ledger), step.fed))
            at += step.fed
    return found


def check_generate(manual: ModeRun, generate: ModeRun, dtype: torch.dtype) -> Check:
    """`generate` writes what the manual loop writes; they may part only where two tokens are equally likely."""
    name = "generate: writes what the manual loop writes"
    tolerance = LOGIT_TOLERANCE.get(dtype, LOGIT_TOLERANCE_16_BIT)
    same = 0
    for a, b in zip(manual.ids, generate.ids, strict=True):
        if a != b:
            break
        same += 1
    steps = min(len(generate.logits), same - (len(manual.ids) - len(manual.logits)) + 1)
    ours = torch.stack([logits.reshape(-1, logits.shape[-1])[-1] for logits in generate.logits[:steps]])
    theirs = torch.stack([logits[-1] for logits in manual.logits[:steps]])
    rms, _ = _distance(ours, theirs)
    detail = f"{same - (len(manual.ids) - len(manual.logits))} of {len(manual.logits)} tokens, rms {rms:.1e}"
    return Check(name, rms <= tolerance, detail)


def check_hooks(model: Any, fit: PositionFit, runs: list[ModeRun]) -> Check:
    """Nothing is left on the model, also after an exception inside the block."""
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
    """(root mean square in units of `b`'s spread, largest) difference; infinite where something is not finite."""
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("inf"), float("inf")
    difference = a - b
    spread = b.std().clamp_min(1e-9)
    return (difference.square().mean().sqrt() / spread).item(), difference.abs().max().item()
