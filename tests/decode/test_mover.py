"""The compiled kernels move cached tokens as PyTorch does."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.cache.layers.codes import dequantize
from streamchat.cache.layers.mover import TORCH, Move, mover_of, set_mover
from streamchat.cache.layers.storage import CodeStorage, NumberStorage, TensorStorage
from streamchat.cache.positions.rotation import TensorRotation
from streamchat.decode.mover import CompiledMover
from streamchat.kernels.library import load_kernels

HEADS, SLOTS, FIRST, TOKENS, POSITION = 3, 12, 4, 5, 1000


@dataclass(frozen=True)
class Angles:
    """Stands for a model's rotary embedding."""

    pairs: int

    def angles_range(self, start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        angles = torch.arange(start, start + count)[:, None] / 10 ** torch.linspace(0, 3, self.pairs)
        return angles.cos().to(device), angles.sin().to(device)

    def wide_range(self, start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        cos, sin = self.angles_range(start, count, device)
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotation(pairs: int, offset: int = 0, interleaved: bool = False, reverse: bool = False) -> TensorRotation:
    source: Any = Angles(pairs)
    return TensorRotation(source, offset, interleaved, reverse)


ROTATIONS = [
    (64, None),
    (64, rotation(32)),
    (80, rotation(16)),
    (80, rotation(8, offset=24, interleaved=True)),
    (96, rotation(48, interleaved=True, reverse=True)),
    (128, rotation(64, reverse=True)),
    (20, rotation(3, offset=2)),
    (256, rotation(128)),
]
FORMATS = ["bfloat16", "float16", "float32", "int8", "int4", "searched"]


@pytest.fixture(scope="module")
def mover() -> CompiledMover:
    kernels = load_kernels("auto")
    if kernels is None:
        pytest.skip("needs a C compiler")
    return CompiledMover(kernels)


def storage(kind: str, batch: int, dim: int) -> TensorStorage:
    like = torch.zeros(batch, HEADS, 0, dim)
    made: TensorStorage
    if kind in ("int8", "int4", "searched"):
        made = CodeStorage(like, SLOTS, 8 if kind == "int8" else 4, searches=kind == "searched")
    else:
        made = NumberStorage(like, SLOTS, getattr(torch, kind))
    made.write(0, torch.randn(batch, HEADS, SLOTS, dim, generator=torch.Generator().manual_seed(1)))
    return made


def move(kind: str, dim: int, how: TensorRotation | None, batch: int = 1) -> Move:
    stored = storage(kind, batch, dim)
    originals = torch.randn(batch, HEADS, TOKENS + 2, dim, generator=torch.Generator().manual_seed(2))
    return Move(stored.raw(FIRST, TOKENS), originals[:, :, 1:-1], how, POSITION, stored.searches)


def twin(of: Move) -> Move:
    return replace(of, slots={name: part.clone() for name, part in of.slots.items()}, originals=of.originals.clone())


def states(of: Move) -> Tensor:
    return dequantize(of.slots[""], of.slots["scales"]) if "scales" in of.slots else of.slots[""].float()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dim", [64, 256])
def test_large_numbers_do_not_overflow_on_the_way(mover: CompiledMover, kind: str, dim: int) -> None:
    """The sum of the numbers of a head is larger than float32 permits; their norm is not."""
    ours = move(kind, dim, None)
    large = torch.zeros_like(ours.originals)
    large[..., 1], large[..., 5] = 1.5e38, -1.5e38
    ours.originals.copy_(large)
    mover.write_slots([ours])
    mover.read_slots([ours])
    torch.testing.assert_close(ours.originals, large, rtol=0, atol=1e36 if kind == "int8" else 2e37)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("dim", "how"), ROTATIONS)
@pytest.mark.parametrize("batch", [1, 2])
def test_slots_and_originals_are_those_of_pytorch(
    mover: CompiledMover, kind: str, dim: int, how: TensorRotation | None, batch: int
) -> None:
    ours = move(kind, dim, how, batch)
    other = twin(ours)
    whole = ours.slots[""]._base
    assert whole is not None
    outside = whole[:, :, :FIRST].clone(), whole[:, :, FIRST + TOKENS :].clone()
    mover.read_slots([ours])
    TORCH.read_slots([other])
    torch.testing.assert_close(ours.originals, other.originals, rtol=0, atol=2e-5)
    ours.originals.mul_(0.5).add_(0.25)
    other.originals.copy_(ours.originals)
    mover.write_slots([ours])
    TORCH.write_slots([other])
    # a number that is halfway between two codes may be rounded to either
    step = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2, "int8": 0.03}.get(kind, 0.6)
    off = (states(ours) - states(other)).abs()
    assert off.max() <= step
    assert (off > step / 100).float().mean() < (1.0 if kind == "float32" else 0.02)
    assert torch.equal(whole[:, :, :FIRST], outside[0])
    assert torch.equal(whole[:, :, FIRST + TOKENS :], outside[1])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_head_is_the_same_to_the_bit_whatever_is_moved_with_it(mover: CompiledMover, kind: str) -> None:
    whole = move(kind, 96, rotation(16, offset=8))
    part = twin(whole)
    mover.write_slots([whole])
    for i in range(TOKENS):
        slots = {name: tensor[:, :, i : i + 1] for name, tensor in part.slots.items()}
        mover.write_slots(
            [replace(part, slots=slots, originals=part.originals[:, :, i : i + 1], position=POSITION + i)]
        )
    for name, tensor in whole.slots.items():
        assert torch.equal(part.slots[name].view(torch.uint8), tensor.contiguous().view(torch.uint8))


@pytest.mark.parametrize("kind", FORMATS)
def test_nan_and_infinity_stay_visible(mover: CompiledMover, kind: str) -> None:
    ours = move(kind, 64, rotation(32))
    ours.originals[0, 0, 0, 3], ours.originals[0, 1, 2, 60] = float("nan"), float("inf")
    mover.write_slots([ours])
    assert not states(ours)[0, 0, 0].isfinite().all()
    assert not states(ours)[0, 1, 2].isfinite().all()
    assert states(ours)[0, 2].isfinite().all()


def test_what_the_kernels_do_not_support_is_moved_by_pytorch(mover: CompiledMover) -> None:
    wide = move("float32", 300, rotation(150))
    strided = move("float32", 64, rotation(32))
    strided = replace(strided, originals=strided.originals.transpose(1, 2).contiguous().transpose(1, 2))
    double = replace(move("float32", 8, None), slots={"": torch.ones(1, HEADS, TOKENS, 8, dtype=torch.float64)})
    ordinary = move("float32", 64, rotation(32))
    empty = replace(ordinary, slots={"": ordinary.slots[""][:, :, :0]}, originals=ordinary.originals[:, :, :0])
    both = [wide, strided, double, empty, ordinary], [*map(twin, (wide, strided, double, empty, ordinary))]
    mover.write_slots(both[0])
    TORCH.write_slots(both[1])
    for ours, other in zip(*both, strict=True):
        torch.testing.assert_close(states(ours), states(other), rtol=0, atol=2e-6)
    mover.read_slots(both[0])
    TORCH.read_slots(both[1])
    for ours, other in zip(*both, strict=True):
        torch.testing.assert_close(ours.originals, other.originals, rtol=0, atol=2e-6)
    mover.write_slots([])


def test_layers_that_differ_only_in_their_rotation_are_kept_apart(mover: CompiledMover) -> None:
    moves = [move("float32", 64, how) for how in (None, rotation(32), rotation(32, reverse=True), rotation(16))]
    mover.write_slots(moves)
    for each in moves:
        other = twin(each)
        TORCH.write_slots([other])
        torch.testing.assert_close(states(each), states(other), rtol=0, atol=2e-6)
    assert not torch.equal(states(moves[0]), states(moves[1]))


def test_copies_of_a_model_share_the_mover(mover: CompiledMover) -> None:
    model = torch.nn.Linear(1, 1)
    assert mover_of(model) is TORCH
    set_mover(model, mover)
    assert mover_of(model) is mover
    copied: Any = mover_of(copy.deepcopy(model))
    assert copied._kernels is mover._kernels
