"""The paper's sliding window with re-computation: no cache, the window is prefilled again for each chunk or token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamchat.benchmarks.methods.stream import ModelStream
from streamchat.cache.room import quarter_of_room


class Recompute(ModelStream):
    """Keeps the latest ids, and prefills them again."""

    has_slow_steps = True

    def begin(self) -> None:
        self._window = self.tensor([]).long()

    def fitting(self, chunk: int) -> int:
        return quarter_of_room(self.method.budget, 0, chunk)

    def feed(self, ids: Tensor, keep: int = 0) -> Tensor:
        self._add(ids)
        return self.forward(self._window, keep or len(ids), use_cache=False)

    def prefill(self, ids: Sequence[int], reserve: int = 0) -> int:
        return int(self.feed(self.tensor(ids), keep=1).argmax())

    def append(self, ids: Sequence[int], reserve: int = 0) -> None:
        self._add(self.tensor(ids))

    def _add(self, ids: Tensor) -> None:
        self._window = torch.cat([self._window, ids])[-self.method.budget :]
