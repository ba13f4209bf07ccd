"""Records the ids fed to a cache, to compare them or to feed them again."""

from __future__ import annotations

import torch
from torch import Tensor


class FedTokens:
    """A growing (batch, n) tensor of ids, stored as int32 on the CPU: 4 bytes per token."""

    def __init__(self) -> None:
        self._ids = torch.empty(0, 0, dtype=torch.int32)
        self._count = 0
        self.known = True
        """False after embeddings were fed, which have no ids."""

    def __len__(self) -> int:
        return self._count

    @property
    def rows(self) -> int:
        """The batch size; 0 before the first token."""
        return self._ids.shape[0]

    def append(self, ids: Tensor) -> None:
        """Append (batch, n) ids."""
        count = ids.shape[1]
        # normal tensors even if the model runs in inference mode: a later call may not
        with torch.inference_mode(False), torch.no_grad():
            if self._count == 0:
                self._ids = torch.empty(ids.shape[0], max(256, count), dtype=torch.int32)
            elif self._count + count > self._ids.shape[1]:
                size = max(2 * self._ids.shape[1], self._count + count)
                grown = torch.empty(self._ids.shape[0], size, dtype=torch.int32)
                grown[:, : self._count] = self._ids[:, : self._count]
                self._ids = grown
            self._ids[:, self._count : self._count + count] = ids
        self._count += count

    def truncate(self, count: int) -> None:
        """Keep the first `count` ids."""
        self._count = min(self._count, count)

    def clear(self) -> None:
        """Remove all ids."""
        self.__init__()  # type: ignore[misc]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order; does nothing before the first token."""
        if not self.rows:
            return
        with torch.inference_mode(False):
            self._ids = self._ids[rows.clone().cpu()]

    def repeat(self, times: int) -> None:
        """Repeat each row `times` times."""
        with torch.inference_mode(False):
            self._ids = self._ids.repeat_interleave(times, dim=0)

    def gather(self, runs: list[tuple[int, int]]) -> Tensor:
        """Return the (batch, n) int64 ids at these runs of indices."""
        parts = [self._ids[:, first:stop] for first, stop in runs]
        return torch.cat(parts, dim=1).long() if parts else torch.empty(self.rows, 0, dtype=torch.long)

    def is_prefix_of(self, ids: Tensor) -> bool:
        """Return whether (batch, n) `ids` start with all recorded ids."""
        if ids.shape[0] != self.rows or ids.shape[1] < self._count or not self.known:
            return False
        return bool(torch.equal(ids[:, : self._count].cpu().int(), self._ids[:, : self._count]))
