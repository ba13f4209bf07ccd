"""A stand-in for `llama_cpp.Llama`."""

from __future__ import annotations

import ctypes
from typing import Any


class FakeLlama:
    """Keeps positions as llama.cpp does, and refuses what its context does not hold."""

    def __init__(self, n_ctx: int, **rest: Any) -> None:
        self._n_ctx, self._ctx, self.n_tokens = n_ctx, self, 0
        self.cells: dict[int, int] = {}
        self.largest = 0
        self.read = 0

    def reset(self) -> None:
        self.n_tokens, self.cells = 0, {}

    def eval(self, tokens: list[int]) -> None:
        for _ in tokens:
            self.cells[self.n_tokens] = self.read
            self.n_tokens += 1
            self.read += 1
        self.largest = max(self.largest, len(self.cells))
        assert sorted(self.cells) == list(range(self.n_tokens))
        assert self.n_tokens <= self._n_ctx

    def kv_cache_seq_rm(self, sequence: int, first: int, stop: int) -> bool:
        self.cells = {at: token for at, token in self.cells.items() if not first <= at < stop}
        return True

    def kv_cache_seq_shift(self, sequence: int, first: int, stop: int, shift: int) -> None:
        self.cells = {at + shift if first <= at < stop else at: token for at, token in self.cells.items()}

    def get_logits_ith(self, index: int) -> Any:
        return (ctypes.c_float * 4)(0.0, 0.0, 1.0, 0.0)

    def n_vocab(self) -> int:
        return 4
