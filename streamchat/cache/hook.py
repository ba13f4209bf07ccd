"""The forward pre-hook that streams: finds the cache, evicts to make room, and assigns positions.

It is attached to the causal LM. A hook on an attention module would run too late: mask and positions have already been
computed from the old length. A post-hook would evict too late as well: the forward would already have exceeded the
budget.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamchat.base.errors import CacheError, CacheNotSeenError, ChunkTooLargeError
from streamchat.cache.arguments import by_keyword, cache_keyword, given_cache, given_tokens, parameter_names
from streamchat.cache.recompute import RecomputingCache
from streamchat.cache.room import quarter_of_room
from streamchat.cache.streaming import StreamingCache
from streamchat.cache.wrappers import causal_lm


class StreamingHook:
    """Context manager that attaches the hook to `model` for `cache`, and removes it on exit, also after an error.

    While it is attached, every forward of the model must use the cache: a forward without it raises
    `CacheNotSeenError` instead of silently not streaming.

    If the caller passes `position_ids`, they must continue the text; others raise `CacheError`.

    A forward of more tokens than fit is processed in chunks if the caller wants the last logits only
    (`logits_to_keep=1`, as `generate` does); otherwise it raises `ChunkTooLargeError`.
    """

    def __init__(self, model: nn.Module, cache: StreamingCache) -> None:
        self.model, self.cache = causal_lm(model), cache
        self._names = parameter_names(self.model)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> StreamingHook:
        self.attach()
        return self

    def __exit__(self, *_error: object) -> None:
        self.remove()

    @property
    def attached(self) -> bool:
        """Whether the hook is attached to the model."""
        return bool(self._handles)

    def attach(self) -> None:
        """Attach the hook; does nothing if it is already attached.

        Raises:
            CacheError: Another hook is attached: both would evict from their caches at every forward.
        """
        if not self._handles:
            self._refuse_second_hook()
            self._handles = [self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)]
            if isinstance(self.cache, RecomputingCache):
                self._handles.append(self.model.register_forward_hook(self._after_forward))

    def remove(self) -> None:
        """Remove the hook; does nothing if it is not attached."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _refuse_second_hook(self) -> None:
        owners = [getattr(hook, "__self__", None) for hook in self.model._forward_pre_hooks.values()]
        if any(isinstance(owner, StreamingHook) for owner in owners):
            raise CacheError(
                f"this {type(self.model).__name__} already streams into another cache; exit that StreamingPress or "
                "StreamingHook first"
            )

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = by_keyword(self._names, args, kwargs)
        cache = given_cache(kwargs)
        if cache is not self.cache:
            found = "no cache" if cache is None else f"a {type(cache).__name__}"
            raise CacheNotSeenError(
                f"a forward of {type(module).__name__} under the streaming hook was given {found} instead of the "
                "hook's StreamingCache; pass it as past_key_values (cache from transformers 5.24 on)"
            )
        if kwargs.get("attention_mask") is not None:
            _refuse_partial_mask(kwargs["attention_mask"])
            kwargs["attention_mask"] = None
        tokens = given_tokens(kwargs)
        if tokens.shape[1] == 0:
            raise CacheError(
                "the model was called without new tokens; pass the new tokens only, or the whole text with at least "
                "one new token"
            )
        given_positions = kwargs.pop("position_ids", None)
        if given_positions is not None:
            _refuse_other_positions(given_positions, tokens.shape[1], self.cache)
        tokens = self._feed_first_chunks(tokens, kwargs)
        batch, count = tokens.shape[:2]
        self.cache.make_room(count)
        self.cache.note_input_ids(tokens if tokens.dim() == 2 else None)
        first = self.cache.next_position
        if isinstance(self.cache, RecomputingCache):
            if tokens.dim() == 2:
                tokens = kwargs["input_ids"] = self.cache.refill(tokens)
            first, count = self.cache.next_position + count - tokens.shape[1], tokens.shape[1]
        if "position_ids" in self._names:
            kwargs["position_ids"] = torch.arange(first, first + count, device=tokens.device).expand(batch, -1)
        return (), kwargs

    def _feed_first_chunks(self, tokens: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Feed all but the last chunk of an input that does not fit; sets the last chunk in `kwargs` and returns it."""
        cache, count = self.cache, tokens.shape[1]
        retained = max(cache.num_sink_tokens, cache.num_retained)
        fits = count <= cache.cache_size - (retained if cache.length else 0)
        one_by_one = cache.fit.single_steps and cache.length > 0 and count > 1
        if fits and not one_by_one:
            return tokens
        if kwargs.get("logits_to_keep") != 1:
            if one_by_one:
                raise ChunkTooLargeError(
                    f"this model computes wrong logits for {count} new tokens in one forward when its cache is not "
                    "empty (a bug in transformers' recurrent layers); feed them one at a time"
                )
            return tokens  # `make_room` raises, with the number of tokens that fit
        size = 1 if cache.fit.single_steps else quarter_of_room(cache.cache_size, retained, count)
        name = "input_ids" if tokens.dim() == 2 else "inputs_embeds"
        chunks = torch.split(tokens, size, dim=1)
        for chunk in chunks[:-1]:
            self.model(**{name: chunk, cache_keyword(self.model): cache, "use_cache": True, "logits_to_keep": 1})
        kwargs[name] = chunks[-1]
        return chunks[-1]

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After a refill, return logits of the caller's tokens only."""
        fresh = self.cache.fresh if isinstance(self.cache, RecomputingCache) else 0
        if output.logits.shape[1] > fresh:
            output.logits = output.logits[:, -fresh:]
        return output


def _refuse_partial_mask(mask: Any) -> None:
    """Raise CacheError for masks with zeros: they cover the whole text, not the cache, and would hide wrong slots."""
    if not (isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask != 0).all())):
        raise CacheError(
            "padded or custom attention masks cannot be used with a streaming cache: their columns do not match its "
            "slots after an eviction; use batches of equal length and no mask"
        )


def _refuse_other_positions(given: Any, count: int, cache: StreamingCache) -> None:
    """Raise CacheError unless `given` continues from the text's length, the cache's length or the last position."""
    starts = dict.fromkeys((cache.ledger.next_index, cache.length, cache.next_position))
    if isinstance(given, Tensor) and given.shape[-1] == count:
        steps = torch.arange(count, device=given.device)
        if any(torch.equal(given, (start + steps).expand_as(given)) for start in starts):
            return
    found = given.flatten()[:4].cpu().tolist() if isinstance(given, Tensor) else given
    raise CacheError(
        f"position_ids start with {found}, but the next {count} tokens of this text are at {cache.ledger.next_index} "
        f"to {cache.ledger.next_index + count - 1}; a streaming cache assigns positions itself, so omit position_ids "
        "or make them continue the text"
    )
