"""Rotations of cached tensors: every layout and every kind of rotary module, against complex numbers in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamchat.cache.positions.rotation import PROBE_POSITIONS, RotarySource, TensorRotation, difference

CPU = torch.device("cpu")
PAIRS = 4


def turned(x: Tensor, position: int, *, interleaved: bool, scale: float = 1.0) -> Tensor:
    """Rotate (..., 2 x PAIRS) in float64, one pair after the other."""
    out = x.double().clone()
    for pair in range(PAIRS):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + PAIRS)
        number = torch.complex(x[..., a].double(), x[..., b].double())
        angle = torch.tensor(scale * position * 100.0 ** (-pair / PAIRS), dtype=torch.float64)
        number = number * torch.exp(1j * angle)
        out[..., a], out[..., b] = number.real, number.imag
    return out


class Rotary(nn.Module):
    """A rotary module in one of the forms that families have."""

    frequencies: Tensor

    def __init__(self, form: str, device: torch.device = CPU) -> None:
        super().__init__()
        self.form, self.calls = form, list[Tensor]()
        self.register_buffer("frequencies", 100.0 ** (-torch.arange(PAIRS, device=device) / PAIRS))

    def forward(self, x: Any, position_ids: Tensor, note: str = "") -> Any:
        self.calls.append(position_ids)
        angles = position_ids[..., None].float() * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        match self.form:
            case "halves":
                return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
            case "single":
                return cos, sin
            case "interleaved":
                return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
            case "sine first":
                return sin, cos
            case "complex":
                return torch.complex(cos, sin)
            case "scaled":
                return 1.3 * cos, 1.3 * sin
        raise AssertionError(self.form)


FORMS = ["halves", "single", "interleaved", "sine first", "complex", "scaled"]


def source_of(form: str = "halves", **options: Any) -> RotarySource:
    return RotarySource(Rotary(form), (torch.zeros(2, 9, 3),), {"position_ids": torch.zeros(2, 9).long(), **options})


@pytest.mark.parametrize("form", FORMS)
def test_the_angles_of_every_form_are_unit_pairs(form: str) -> None:
    source = source_of(form)
    for positions in (torch.tensor([0, 3, 50]), torch.tensor([7])):
        cos, sin = source.angles(positions)
        expected = positions[:, None].double() * 100.0 ** (-torch.arange(PAIRS).double() / PAIRS)
        assert cos.dtype == sin.dtype == torch.float32
        torch.testing.assert_close(cos.double(), expected.cos(), atol=1e-5, rtol=0)
        torch.testing.assert_close(sin.double(), expected.sin(), atol=1e-5, rtol=0)


def test_a_call_is_repeated_with_other_positions_and_no_hidden_states() -> None:
    module = Rotary("single")
    seen = list[tuple[Any, ...]]()
    module.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
    plain = module.forward

    def forward(x: Tensor, position_ids: Tensor, note: str) -> Any:
        seen.append((x.shape, x.dtype, position_ids.tolist(), note))
        return plain(x, position_ids)

    setattr(module, "forward", forward)  # noqa: B010 - mypy
    given = (torch.ones(2, 9, 3, dtype=torch.bfloat16), torch.ones(2, 9).long())
    source = RotarySource(module, given, {"note": "as it was"})
    source.angles(torch.tensor([4, 6]))
    assert seen == [
        ((1, 6, 1), torch.float32, [list(PROBE_POSITIONS)], "as it was"),
        ((1, 2, 1), torch.float32, [[4, 6]], "as it was"),
    ]
    assert PROBE_POSITIONS == (0, 1, 2, 5, 11, 23)
    assert source.call == (module, given, {"note": "as it was"})
    assert copy.deepcopy(source) is source


def test_angles_are_computed_on_the_device_of_the_module() -> None:
    asked = torch.zeros(1, 1, dtype=torch.long, device="meta")
    assert source_of()._device == CPU
    module = Rotary("single")
    RotarySource(module, (torch.zeros(1, 1, 1), asked), {})
    assert {call.device for call in module.calls} == {CPU}  # its own buffers come first
    del module.frequencies
    module.frequencies = 1.0 / torch.arange(1, PAIRS + 1)
    assert RotarySource(module, (), {"x": None, "position_ids": torch.zeros(1, 1).long()})._device == CPU


def test_ranges_are_remembered_three_at_a_time() -> None:
    source = source_of("single")
    module: Any = source.call[0]
    module.calls.clear()

    def ask(start: int, count: int = 2, wide: bool = False) -> int:
        found = (source.wide_range if wide else source.angles_range)(start, count, CPU)
        assert found[0].shape == (count, 2 * PAIRS if wide else PAIRS)
        cos, sin = source.angles(torch.arange(start, start + count))
        expected = (torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)) if wide else (cos, sin)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        calls = len(module.calls) - 1
        module.calls.clear()
        return calls

    assert [ask(start) for start in (0, 5, 9, 0, 5, 9)] == [1, 1, 1, 0, 0, 0]
    assert [ask(20), ask(5), ask(9), ask(20), ask(0)] == [1, 0, 0, 0, 1]  # the oldest one is forgotten
    assert ask(9, 3) == 1
    assert [ask(30, wide=True), ask(30, wide=True), ask(30)] == [1, 0, 0]
    assert len(source._memo) == 3


LAYOUTS = [(interleaved, reverse) for interleaved in (False, True) for reverse in (False, True)]


@pytest.mark.parametrize(("interleaved", "reverse"), LAYOUTS)
@pytest.mark.parametrize(("width", "offset"), [(8, 0), (11, 0), (11, 3)])
def test_tensors_are_rotated_and_rotated_back(interleaved: bool, reverse: bool, width: int, offset: int) -> None:
    rotation = TensorRotation(source_of(), offset, interleaved, reverse)
    x = torch.randn(2, 3, 4, width, generator=torch.Generator().manual_seed(0))
    moved = rotation.rotate_to(x, 30)
    expected = x.double().clone()
    for slot in range(4):
        part = slice(offset, offset + 2 * PAIRS)
        sign = -1 if reverse else 1
        expected[..., slot, part] = turned(x[..., slot, part], 30 + slot, interleaved=interleaved, scale=sign)
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved.double(), expected, atol=1e-5, rtol=0)
    angles = rotation.source.angles_range(30, 4, CPU)
    torch.testing.assert_close(rotation.apply(x, angles), moved, atol=1e-6, rtol=0)
    torch.testing.assert_close(rotation.apply(moved, angles, undo=True), x, atol=1e-5, rtol=0)
    start = rotation.source.angles_range(7, 4, CPU)
    step = difference(angles, start)
    torch.testing.assert_close(rotation.apply(rotation.rotate_to(x, 7), step), moved, atol=1e-5, rtol=0)
    half = rotation.apply(x.bfloat16(), angles)
    assert half.dtype == torch.float32
    before = x.clone()
    rotation.apply(x, angles)
    assert torch.equal(x, before)


def test_the_layout_of_the_rotated_part_is_that_of_the_tensor() -> None:
    """Not that of the module: GPT-J's module interleaves nothing, its keys are interleaved."""
    for form in FORMS:
        for interleaved in (False, True):
            rotation = TensorRotation(source_of(form), 0, interleaved)
            x = torch.randn(1, 8)
            expected = turned(x, 12, interleaved=interleaved)
            torch.testing.assert_close(rotation.rotate_to(x, 12).double(), expected, atol=1e-5, rtol=0)


def test_a_module_with_one_pair_or_an_odd_number_of_angles() -> None:
    class Few(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.count = count

        def forward(self, position_ids: Tensor) -> Any:
            angles = position_ids[..., None].float() * torch.arange(1, self.count + 1)
            return angles.cos(), angles.sin()

    for count in (1, 2, 3, 4):
        source = RotarySource(Few(count), (torch.zeros(1, 1).long(),), {})
        cos, sin = source.angles(torch.tensor([5]))
        expected = 5.0 * torch.arange(1, count + 1)
        torch.testing.assert_close(cos[0], expected.cos())
        torch.testing.assert_close(sin[0], expected.sin())
