"""Verifies one model: runs the modes and their checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamchat.base.errors import ConfigError
from streamchat.cache.context import context_length
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.selfcheck import SelfCheck, self_check
from streamchat.cache.positions.strategy import choose_fit
from streamchat.cache.token_ids import as_input
from streamchat.verify import checks
from streamchat.verify.checks import Check
from streamchat.verify.modes import ModeRun, run_generate, run_manual, run_plain


@dataclass(frozen=True)
class PitfallResult:
    """Result of one way to handle the cache."""

    name: str
    counter: int
    """Its own count of compressions."""
    length: int
    """Length of the longest layer at the end."""
    storage_bytes: int
    perplexity: float
    """Perplexity of the tokens after the first `cache_size`."""


@dataclass
class Verification:
    """Results of a verification."""

    cache_size: int
    num_sink_tokens: int
    fit: PositionFit
    runs: list[ModeRun]
    checks: list[Check]
    pitfalls: list[PitfallResult] = field(default_factory=list)
    """Results of the classic mistakes, if they were run."""

    @property
    def ok(self) -> bool:
        """Whether all checks passed."""
        return all(check.ok for check in self.checks)


def verify(
    model: Any,
    ids: Sequence[int],
    *,
    cache_size: int = 64,
    num_sink_tokens: int = 4,
    new_tokens: int | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Verification:
    """Run all modes and checks on `model`.

    Args:
        model: A causal LM in eval mode.
        ids: Token ids of a text; the first `cache_size // 2` are the prompt.
        cache_size: The budget in tokens.
        num_sink_tokens: Number of tokens at the start that are never evicted.
        new_tokens: Tokens to generate; by default those that fill the budget plus 64.
        progress: Called with the name of each stage.

    Raises:
        UnsupportedModelError: The model cannot stream.
        ConfigError: The sizes are impossible with this model, or too small to evict anything.
    """
    prompt_tokens = cache_size // 2
    new_tokens = cache_size - prompt_tokens + 64 if new_tokens is None else new_tokens
    if prompt_tokens + new_tokens <= cache_size + 1:
        raise ConfigError(
            f"{new_tokens} new tokens after a prompt of {prompt_tokens} do not fill cache_size = {cache_size}, so "
            f"nothing would be evicted; ask for at least {cache_size - prompt_tokens + 2}"
        )
    if len(ids) < prompt_tokens:
        raise ConfigError(f"the prompt has {len(ids)} tokens; it must have at least {prompt_tokens}")
    progress("Measuring positions")
    fit = choose_fit(model, check_eviction=False)  # an error in attention becomes a failed check
    own_check: SelfCheck | None = None if fit.method == "recompute" else self_check(model, fit)
    if fit.position_limit is not None and cache_size > fit.position_limit:
        raise ConfigError(
            f"cache_size = {cache_size} is too large: this model can use {fit.position_limit} positions; cache_size "
            f"must be at most {fit.position_limit}"
        )
    prompt = as_input(model, ids[:prompt_tokens])
    progress("Loop without eviction")
    addressable = context_length(model.config) or 1 << 62
    plain = run_plain(model, prompt, min(new_tokens, addressable - prompt_tokens))
    progress("Loop with eviction")
    manual = run_manual(model, fit, prompt, new_tokens, cache_size, num_sink_tokens)
    progress("generate() in a StreamingPress")
    generate = run_generate(model, fit, prompt, new_tokens, cache_size, num_sink_tokens)
    progress("Slow reference")
    results = [
        checks.check_self(fit, own_check),
        checks.check_control(model, plain),
        *(
            check
            for run in (manual, generate)
            for check in (
                checks.check_lengths(run, manual.ledger_lengths),
                checks.check_budget(run, cache_size),
                checks.check_evicted(run),
                checks.check_memory(run, cache_size),
            )
        ),
        checks.check_logits(model, fit, manual, cache_size, num_sink_tokens),
        checks.check_generate(model, manual, generate),
        checks.check_hooks(model, fit, [plain, manual, generate]),
    ]
    return Verification(cache_size, num_sink_tokens, fit, [plain, manual, generate], results)
