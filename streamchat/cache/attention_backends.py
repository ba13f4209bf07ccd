"""Which of PyTorch's attention kernels may serve a forward on CUDA.

cuDNN builds a plan for every new pair of lengths, queries and keys, and keeps it: on an H100, a chat of 160 turns grew
by 3.6 MB of host memory per turn, and a forward of a new length took 60 ms instead of 18.8 ms. The plain forwards of a
chat have new lengths all the time, so they run without cuDNN. A captured step has one length; there PyTorch chooses,
and cuDNN is the fastest (350 instead of 265 tokens/s).
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from streamchat.base.devices import ATTENTION_ON_GPUS
from streamchat.cache.arguments import given_cache
from streamchat.cache.streaming import StreamingCache

_log = logging.getLogger(__name__)

WITHOUT_PLANS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
"""The backends that keep nothing per shape."""


class _LimitedForward:
    """A forward limited to `WITHOUT_PLANS` in calls with a `StreamingCache`; a deep copy limits that of the copy."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)
        self._forward = forward
        self.without_plans = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(given_cache(kwargs), StreamingCache):
            return self._forward(*args, **kwargs)
        with sdpa_kernel([*WITHOUT_PLANS]):
            return self._forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _LimitedForward:
        return _LimitedForward(copy.deepcopy(self._forward, memo))


def without_plans(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return `forward` limited to `WITHOUT_PLANS` in calls with a `StreamingCache`; other calls do not change.

    The result, and what `functools.wraps` makes of it, has it as its attribute `without_plans`.
    """
    if hasattr(forward, "without_plans"):
        return forward
    _log.info("attention: %s", ATTENTION_ON_GPUS)
    return _LimitedForward(forward)
