"""The policy `key-diversity`: turns that say the same as others go first.

The idea is that of KeyDiff (arXiv:2504.15364): keys that resemble the others add little, so evict those and keep the
keys diverse. It needs no attention scores, which fused attention never forms. Differences from the paper:

- Whole turns are evicted, not single tokens, so that what stays is text that the model can read.
- A turn is the mean of its keys, per layer and head; a mean is cheap, and a turn is short.
- Keys are compared without their rotation. Rotated ones differ by their distance alone, so the newest turns would look
  alike and the oldest ones diverse.
- After each turn the others are compared anew, so that of two equal turns one stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamchat.cache.eviction.policies.oldest_turns import POLICY as OLDEST_TURNS
from streamchat.cache.eviction.policy import CacheView, Cut, Run, cuts_of


def similarities(view: CacheView, turns: tuple[Run, ...]) -> Tensor:
    """Return the cosines of the turns' mean keys, (turns, turns) in float64, averaged over layers, heads and batch.

    Reads the keys of one layer at a time. A cosine that is not a number (a model in float16 can overflow) counts as 0.
    """
    assert view.fetch_keys is not None
    first, stop = turns[0][0], turns[-1][1]
    total, layers = torch.zeros(len(turns), len(turns), dtype=torch.float64), 0
    for keys in view.fetch_keys(first, stop):
        means = torch.stack([keys[:, :, a - first : b - first].mean(dim=-2) for a, b in turns])  # (turns, B, H, D)
        units = torch.nn.functional.normalize(means, dim=-1).flatten(1, 2)
        cosines = torch.einsum("ihd,jhd->ij", units, units) / units.shape[1]
        total += torch.nan_to_num(cosines, nan=0.0).double().cpu()
        layers += 1
    return total / max(1, layers)


@dataclass(frozen=True)
class KeyDiversity:
    """Evicts the turns whose keys are most like those of the other turns; the older one of equals.

    The newest turn in the cache is not a candidate. Without keys, or if whole turns do not make enough room, this is
    `oldest-turns`.
    """

    name: str = "key-diversity"

    def plan(self, view: CacheView) -> list[Cut]:
        """See `EvictionPolicy`."""
        turns = view.turns
        freed = sum(stop - first for first, stop in turns[:-1])
        if view.fetch_keys is None or freed < max(1, view.must_evict):
            return OLDEST_TURNS.plan(view)
        alike, left, gone = similarities(view, turns), list(range(len(turns))), list[Run]()
        wanted = view.wanted
        while wanted > 0 and len(left) > 1:
            rows = alike[left][:, left]
            mean = (rows.sum(dim=1) - rows.diagonal())[:-1]
            most = left.pop(int(mean.argmax()))
            gone.append(turns[most])
            wanted -= turns[most][1] - turns[most][0]
        return cuts_of(gone)


POLICY = KeyDiversity()
