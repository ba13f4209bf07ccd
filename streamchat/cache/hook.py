"""The one forward pre-hook: finds the cache, makes room, hands out positions.

It sits on the causal LM. On an attention module it would come too late: mask and positions are already built from
the old length by then. As a post-hook it would shrink nothing that the next forward reads.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamchat.cache.arguments import by_keyword, given_cache, given_tokens, parameter_names
from streamchat.cache.streaming import StreamingCache
from streamchat.errors import CacheError, CacheNotSeenError


class StreamingHook:
    """Context manager that attaches the hook to `model` for `cache`, and removes it on every way out.

    While it is attached, every forward of the model must use the cache: a forward without it raises
    `CacheNotSeenError` instead of quietly streaming nothing.
    """

    def __init__(self, model: nn.Module, cache: StreamingCache) -> None:
        self.model, self.cache = model, cache
        self._names = parameter_names(model)
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> StreamingHook:
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def attach(self) -> None:
        """Attach the hook; does nothing when it is attached."""
        if self._handle is None:
            self._handle = self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def remove(self) -> None:
        """Remove the hook; does nothing when it is not attached."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

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
        tokens = given_tokens(kwargs)
        batch, count = tokens.shape[:2]
        self.cache.make_room(count)
        if "position_ids" in self._names:
            first = self.cache.next_position
            kwargs["position_ids"] = torch.arange(first, first + count, device=tokens.device).expand(batch, -1)
        if kwargs.get("attention_mask") is not None:
            _refuse_partial_mask(kwargs["attention_mask"])
            kwargs["attention_mask"] = None
        return (), kwargs


def _refuse_partial_mask(mask: Any) -> None:
    """A mask is as long as the conversation, not as the cache: one with holes would hide the wrong slots."""
    if not (isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask != 0).all())):
        raise CacheError(
            "padded or custom attention masks cannot be used with a streaming cache: their columns no longer match its "
            "slots; use batches of equal length and no mask"
        )
