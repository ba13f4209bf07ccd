"""Rotary positions (RoFormer, arXiv:2104.09864) of cached tensors, computed by the model's own rotary module.

Frequencies are never rebuilt from the configuration: the module is called, whatever scaling the model uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Angles = tuple[Tensor, Tensor]
"""(cos, sin), each (positions, pairs) float32, cos^2 + sin^2 = 1."""

# Unevenly spaced, so that only the right layout fits all of them.
PROBE_POSITIONS = (0, 1, 2, 5, 11, 23)


class RotarySource:
    """One recorded call of a model's rotary module, repeatable at any positions.

    Modules return (cos, sin), (sin, cos) or complex numbers; each pair's angle once or twice (as halves or
    interleaved); scaled or not. The constructor detects which.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._module, self._args, self._kwargs = module, args, kwargs
        self._memo: dict[_Range, Angles] = {}
        self._wide: dict[_Range, Angles] = {}
        given = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        # its own buffers first: arguments may have come from another device
        self._device = next((t.device for t in (*module.buffers(), *given)), torch.device("cpu"))
        first, second = self._call(torch.tensor(PROBE_POSITIONS))
        # at position 0 the sine is 0 everywhere
        self._sin_first = bool(first[0].abs().max() < second[0].abs().max())
        self._copies = _find_copies(first, second)

    def __deepcopy__(self, memo: dict[int, Any]) -> RotarySource:
        return self  # copying a cache must not copy the model's modules

    @property
    def call(self) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """The recorded call: module, arguments, and arguments by name."""
        return self._module, self._args, self._kwargs

    def _call(self, positions: Tensor) -> Angles:
        positions = positions.to(self._device)
        row = positions[None]

        def substitute(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.is_floating_point():  # hidden states: only their dtype and device matter
                return torch.zeros(1, len(positions), 1, dtype=torch.float32, device=positions.device)
            return row

        with torch.inference_mode(False), torch.no_grad():
            # `forward`, not `__call__`: no hooks must run
            out = self._module.forward(
                *(substitute(a) for a in self._args), **{k: substitute(v) for k, v in self._kwargs.items()}
            )
        if isinstance(out, Tensor) and out.is_complex():
            out = (out.real, out.imag)
        first, second = out
        return first.reshape(len(positions), -1).float(), second.reshape(len(positions), -1).float()

    def angles(self, positions: Tensor) -> Angles:
        """Return unit (cos, sin) at absolute `positions` (n,), each (n, pairs) float32, on the rotary module's device.

        Positions must be within the rope's range.
        """
        first, second = self._call(positions)
        cos, sin = (second, first) if self._sin_first else (first, second)
        cos, sin = self._copies.one_of(cos), self._copies.one_of(sin)
        scale = (cos.square() + sin.square()).sqrt()  # yarn and longrope multiply both by an attention factor
        return cos / scale, sin / scale

    def angles_range(self, start: int, count: int, device: torch.device) -> Angles:
        """Return `angles` at start .. start + count - 1 on `device`; caches the last ones, which all layers share."""
        key = (start, count, device)
        if key not in self._memo:
            cos, sin = self.angles(torch.arange(start, start + count, device=self._device))
            _remember(self._memo, key, (cos.to(device), sin.to(device)))
        return self._memo[key]

    def wide_range(self, start: int, count: int, device: torch.device) -> Angles:
        """Return `angles_range` for rotation by halves, each (count, 2 x pairs): (cos | cos) and (-sin | sin)."""
        key = (start, count, device)
        if key not in self._wide:
            cos, sin = self.angles_range(start, count, device)
            _remember(self._wide, key, (torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)))
        return self._wide[key]


_Range = tuple[int, int, torch.device]
_MEMO = 3
"""Ranges that are remembered: a rebase uses three for each layer."""


def _remember(memo: dict[_Range, Angles], key: _Range, angles: Angles) -> None:
    while len(memo) >= _MEMO:
        del memo[next(iter(memo))]
    memo[key] = angles


@dataclass(frozen=True)
class _Copies:
    stride: int  # 1: halves or single, 2: interleaved
    pairs: int

    def one_of(self, x: Tensor) -> Tensor:
        return x[:, :: self.stride][:, : self.pairs]


def _find_copies(first: Tensor, second: Tensor) -> _Copies:
    width = first.shape[-1]
    half = width // 2
    if width % 2 == 0 and half:
        if all(torch.equal(x[:, :half], x[:, half:]) for x in (first, second)):
            return _Copies(1, half)
        if all(torch.equal(x[:, ::2], x[:, 1::2]) for x in (first, second)):
            return _Copies(2, half)
    return _Copies(1, width)


@dataclass(frozen=True)
class TensorRotation:
    """How one cached tensor carries its position."""

    source: RotarySource
    offset: int
    """First rotated dimension of the head."""
    interleaved: bool
    """Pairs are (0, 1), (2, 3), ... instead of (0, h), (1, h + 1), ..."""
    reverse: bool = False
    """Rotates by minus the angle."""

    def rotate_to(self, x: Tensor, start: int) -> Tensor:
        """Rotate unrotated float32 `x` (..., n, head_dim) to absolute positions `start` .. `start + n - 1`."""
        count, device = x.shape[-2], x.device
        angles = self.source.angles_range(start, count, device)
        if self.interleaved or self.reverse or 2 * angles[0].shape[-1] != x.shape[-1]:
            return self.apply(x, angles)
        cos, sin = self.source.wide_range(start, count, device)
        return torch.addcmul(x * cos, torch.roll(x, cos.shape[-1] // 2, -1), sin)

    def apply(self, x: Tensor, angles: Angles, *, undo: bool = False) -> Tensor:
        """Rotate `x` (..., n, head_dim) by angles (n, pairs); returns float32. `undo` rotates back."""
        cos, sin = (angle.to(x.device) for angle in angles)
        if self.reverse != undo:
            sin = -sin
        pairs = cos.shape[-1]
        x = x.float()
        if 2 * pairs == x.shape[-1]:
            return self._rotate(x, cos, sin)
        out = x.clone()
        part = out.narrow(-1, self.offset, 2 * pairs)
        part.copy_(self._rotate(part, cos, sin))
        return out

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate all of (..., n, 2 x pairs): `x * cos + partner * sin`, in few operations for all dimensions."""
        if self.interleaved:
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        partner = torch.roll(x, cos.shape[-1], -1)
        return x * torch.cat([cos, cos], dim=-1) + partner * torch.cat([-sin, sin], dim=-1)


def difference(to: Angles, start: Angles) -> Angles:
    """Return the angles that rotate from positions `start` to positions `to`: R(to) R(start)^-1."""
    (c1, s1), (c0, s0) = to, start
    return c1 * c0 + s1 * s0, s1 * c0 - c1 * s0
